"""The files of a tokenizer with further tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.tokenizers import AddedToken


def with_tokens(files: Mapping[str, bytes], added: Sequence[AddedToken]) -> dict[str, bytes]:
    """The files of one tokenizer, by name, with these tokens under these ids; the same if there are none.

    Pieces go into the model of subwords without a merge, so that texts are cut as before; into one of unigrams, and
    where there is no tokenizer.json, they go as added tokens.
    """
    found = dict(files)
    if not added:
        return found
    beside = added
    if "tokenizer.json" in found:
        tokenizer = json.loads(found["tokenizer.json"])
        pieces = [token for token in added if token.piece and isinstance(tokenizer["model"]["vocab"], dict)]
        beside = [token for token in added if token not in pieces]
        found["tokenizer.json"] = _json(_of_tokenizer_json(tokenizer, pieces, beside))
    config = _fields(found.get("tokenizer_config.json", b"{}"))
    if found.keys() & {"added_tokens.json", "tokenizer.model"} or "tokenizer.json" not in found:
        listed = _fields(found.get("added_tokens.json", b"{}"))
        found["added_tokens.json"] = _json({**listed, **{token.content: token.id for token in beside}})
    if "added_tokens_decoder" in config or "tokenizer.json" not in found:
        decoder = {**(config.get("added_tokens_decoder") or {}), **{str(token.id): _entry(token) for token in beside}}
        found["tokenizer_config.json"] = _json({**config, "added_tokens_decoder": decoder})
    return found


def _of_tokenizer_json(
    tokenizer: dict[str, Any], pieces: Sequence[AddedToken], beside: Sequence[AddedToken]
) -> dict[str, Any]:
    model = tokenizer["model"]
    listed = [*(tokenizer.get("added_tokens") or ()), *({"id": token.id, **_entry(token)} for token in beside)]
    listed.sort(key=lambda entry: entry["id"])
    if pieces:
        # a token that the model has keeps its id; those beside the model are counted on from the size of the model
        ids = {token.content: token.id for token in pieces} | {entry["content"]: entry["id"] for entry in listed}
        model = {**model, "vocab": {**model["vocab"], **ids}}
    return {**tokenizer, "added_tokens": listed, "model": model}


def _fields(data: bytes) -> dict[str, Any]:
    """The fields of a JSON file; none of a damaged one, of which the libraries complain."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _entry(token: AddedToken) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(token).items() if key not in ("id", "piece")}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
