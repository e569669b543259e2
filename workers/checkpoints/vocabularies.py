"""The vocabulary of a tokenizer, from whichever of its files a checkpoint has."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jobs.errors import CorruptData
from workers.storage import ObjectInfo, Store

LARGEST_TOKENIZER = 50_000_000
"""Of vocabularies of 260,000 tokens, tokenizer.json has 35 MB."""


@dataclass(frozen=True)
class Vocabulary:
    """Token to id, and the merges of a BPE in order. `tokens` is empty if the file is in no format that is read."""

    file: str
    sha256: str
    tokens: Mapping[str, int]
    merges: Sequence[str] = ()

    def difference(self, other: Vocabulary) -> str | None:
        """The first difference in words, or None.

        Files of two kinds may list the special tokens or not: the larger vocabulary must have all of the smaller.
        """
        if not (self.tokens and other.tokens):
            same = (self.file, self.sha256) == (other.file, other.sha256)
            files = " and ".join(dict.fromkeys((self.file, other.file)))
            return None if same else f"the bytes of {files}, which cannot be read as a vocabulary"
        both = self.tokens.keys() | other.tokens.keys()
        if self.file != other.file:
            both = min(self.tokens, other.tokens, key=len).keys()
        for token in sorted(both, key=lambda token: self.tokens.get(token, 1 << 60)):
            here, there = self.tokens.get(token, "missing"), other.tokens.get(token, "missing")
            if here != there:
                return f"token {token!r} is {here} and {there}"
        if self.merges and other.merges and self.merges != other.merges:
            pairs = enumerate(zip(self.merges, other.merges, strict=False))
            at, pair = next(((at, pair) for at, pair in pairs if pair[0] != pair[1]), (None, None))
            return f"merge {at} is {pair[0]!r} and {pair[1]!r}" if pair else "one has more merges than the other"
        return None


def vocabulary_files(names: Collection[str]) -> list[str]:
    """The files among `names` that hold a vocabulary, the most exact first."""
    fixed = [name for name in ("tokenizer.json", "tekken.json", "vocab.json", "vocab.txt") if name in names]
    return fixed + sorted(name for name in names if "/" not in name and name.endswith((".tiktoken", ".spm", ".model")))


def read_vocabulary(store: Store, files: Mapping[str, ObjectInfo], name: str) -> Vocabulary:
    """The vocabulary in `files[name]`; `CorruptData` if the file is too large for one."""
    data = _read(store, files[name])
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        if name == "tokenizer.json":
            return _of_tokenizer_json(json.loads(data), sha256)
        tokens = _tokens(name, data) | _added(store, files)
        merges = _read(store, files["merges.txt"]).decode() if name == "vocab.json" and "merges.txt" in files else ""
        lines = [line for line in merges.split("\n") if line.strip() and not line.startswith("#version")]
        return Vocabulary(name, sha256, tokens, lines)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):  # any content of the file
        return Vocabulary(name, sha256, {})


def _read(store: Store, info: ObjectInfo) -> bytes:
    if info.size > LARGEST_TOKENIZER:
        raise CorruptData(
            f"{store.url}/{info.key}: has {info.size} bytes, at most {LARGEST_TOKENIZER} are read;"
            " is it the right file?"
        )
    return bytes(store.read(info.key, etag=info.etag))


def _of_tokenizer_json(tokenizer: Any, sha256: str) -> Vocabulary:
    """Of a tokenizer.json (https://huggingface.co/docs/tokenizers)."""
    model = tokenizer.get("model", {})
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: [token, score] in the order of ids
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    return Vocabulary("tokenizer.json", sha256, {**vocabulary, **added}, merges)


def _tokens(name: str, data: bytes) -> dict[str, int]:
    """Token to id of any file but tokenizer.json; bytes of tokens are written as tokenizer.json writes them."""
    if name == "vocab.json":
        return dict(json.loads(data))
    if name == "vocab.txt":
        return {line: number for number, line in enumerate(data.decode().rstrip("\n").split("\n"))}
    if name == "tekken.json":
        tekken = json.loads(data)
        special, size = (tekken["config"][f"default_{name}"] for name in ("num_special_tokens", "vocab_size"))
        used = tekken["vocab"][: size - special]
        return {_bytes(entry["token_bytes"]): special + entry["rank"] for entry in used}
    try:
        pairs = [line.split() for line in data.decode("ascii").splitlines() if line]
        return {_bytes(token): int(rank) for token, rank in pairs}  # tiktoken, as Llama 3 has it in tokenizer.model
    except ValueError:
        return _pieces(data)


def _pieces(data: bytes) -> dict[str, int]:
    """Of a model of sentencepiece (https://github.com/google/sentencepiece)."""
    from google.protobuf.message import DecodeError
    from transformers.utils import sentencepiece_model_pb2_new

    messages: Any = sentencepiece_model_pb2_new
    try:
        model = messages.ModelProto.FromString(data)
    except DecodeError as error:
        raise ValueError from error
    return {piece.piece: number for number, piece in enumerate(model.pieces)}


def _bytes(encoded: str) -> str:
    return "".join(_letters()[byte] for byte in base64.b64decode(encoded, validate=True))


@cache
def _letters() -> Mapping[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def _added(store: Store, files: Mapping[str, ObjectInfo]) -> dict[str, int]:
    """The tokens that were added to a vocabulary, from the files beside it."""
    found: dict[str, int] = {}
    if "added_tokens.json" in files:
        found |= json.loads(_read(store, files["added_tokens.json"]))
    if "tokenizer_config.json" in files:
        decoder = json.loads(_read(store, files["tokenizer_config.json"])).get("added_tokens_decoder") or {}
        found |= {entry["content"]: int(number) for number, entry in decoder.items()}
    return found
