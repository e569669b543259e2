"""The vocabulary of a tokenizer, from whichever of its files a checkpoint has."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from jobs.errors import CorruptData
from workers.storage import ObjectInfo, Store

LARGEST_TOKENIZER = 50_000_000
"""Of vocabularies of 260,000 tokens, tokenizer.json has 35 MB."""

_VOCABULARY = re.compile(r"[^/]*\.(tiktoken|spm|model)|[^/]*(vocab|bpe)[^/]*\.(txt|codes|bpe)", re.IGNORECASE)
"""`bpe.codes`, `rwkv_vocab_v20230424.txt` and the like are compared by their bytes."""


@dataclass(frozen=True)
class Vocabulary:
    """Token to id, the merges of a BPE in order, and the scores of a unigram model or of sentencepiece.

    `added` are the tokens beside the model of subwords, each with the fields of an added token of `tokenizers`. `kind`
    is the type of the model if the file states it. `tokens` is empty if the file is in no format that is read.
    """

    file: str
    sha256: str
    tokens: Mapping[str, int]
    merges: Sequence[str] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    kind: str = ""
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(type(number) is int for number in self.tokens.values()):
            raise ValueError(f"{self.file} is no vocabulary")

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
        if self.kind and other.kind and self.kind != other.kind:
            return f"the model is {self.kind} and {other.kind}"
        for token, score in self.scores.items() if self.file == other.file else ():  # a conversion sets some anew
            if not math.isclose(score, other.scores.get(token, score), rel_tol=1e-5):
                return f"the score of {token!r} is {score:g} and {other.scores[token]:g}"
        return None


def vocabulary_files(names: Collection[str]) -> list[str]:
    """The files among `names` that hold a vocabulary: tokenizer.json, which has all of it, comes first."""
    fixed = [name for name in ("tokenizer.json", "tekken.json", "vocab.json", "vocab.txt") if name in names]
    return fixed + sorted(name for name in names if name not in fixed and _VOCABULARY.fullmatch(name))


def read_vocabulary(store: Store, files: Mapping[str, ObjectInfo], name: str) -> Vocabulary:
    """The vocabulary in `files[name]`; `CorruptData` if the file is too large for one."""
    data = _read(store, files[name])
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        if name == "tokenizer.json":
            return _of_tokenizer_json(json.loads(data), sha256)
        found = _of_file(name, data, sha256)
        merges = _lines(_read(store, files["merges.txt"])) if name == "vocab.json" and "merges.txt" in files else []
        added = _added(store, files)
        return replace(
            found,
            tokens={**found.tokens, **{token: entry["id"] for token, entry in added.items()}},
            added=added,
            merges=[line for line in merges if line.strip() and not line.startswith("#version")],
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):  # any content of the file
        return Vocabulary(name, sha256, {})


def _read(store: Store, info: ObjectInfo) -> bytes:
    if info.size > LARGEST_TOKENIZER:
        raise CorruptData(
            f"{store.url}/{info.key}: has {info.size} bytes, at most {LARGEST_TOKENIZER} are read;"
            " is it the right file?"
        )
    return bytes(store.read(info.key, etag=info.etag))


def _lines(data: bytes) -> list[str]:
    return data.decode().replace("\r\n", "\n").rstrip("\n").split("\n")


def _of_tokenizer_json(tokenizer: Any, sha256: str) -> Vocabulary:
    """Of a tokenizer.json (https://huggingface.co/docs/tokenizers)."""
    model = tokenizer.get("model", {})
    vocabulary = model.get("vocab", {})
    scores: dict[str, float] = {}
    if isinstance(vocabulary, list):  # unigram: [token, score] in the order of ids
        scores = {entry[0]: float(entry[1]) for entry in vocabulary}
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    added = {token["content"]: token for token in tokenizer.get("added_tokens", [])}
    tokens = {**vocabulary, **{token: entry["id"] for token, entry in added.items()}}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    return Vocabulary("tokenizer.json", sha256, tokens, merges, scores, str(model.get("type") or ""), added)


def _of_file(name: str, data: bytes, sha256: str) -> Vocabulary:
    """Of any file but tokenizer.json; bytes of tokens are written as tokenizer.json writes them."""
    if name == "vocab.json":
        return Vocabulary(name, sha256, dict(json.loads(data)))
    if name == "vocab.txt":
        return Vocabulary(name, sha256, {line: number for number, line in enumerate(_lines(data))})
    if name == "tekken.json":
        tekken = json.loads(data)
        special, size = (tekken["config"][f"default_{name}"] for name in ("num_special_tokens", "vocab_size"))
        used = tekken["vocab"][: size - special]
        return Vocabulary(name, sha256, {_bytes(entry["token_bytes"]): special + entry["rank"] for entry in used})
    try:
        pairs = [line.split() for line in data.decode("ascii").splitlines() if line]
        # tiktoken, as Llama 3 has it in tokenizer.model
        return Vocabulary(name, sha256, {_bytes(token): int(rank) for token, rank in pairs})
    except ValueError:
        return _of_sentencepiece(name, data, sha256)


def _of_sentencepiece(name: str, data: bytes, sha256: str) -> Vocabulary:
    """Of a model of sentencepiece (https://github.com/google/sentencepiece)."""
    from google.protobuf.message import DecodeError
    from transformers.utils import sentencepiece_model_pb2_new

    messages: Any = sentencepiece_model_pb2_new
    try:
        model = messages.ModelProto.FromString(data)
    except DecodeError as error:
        raise ValueError from error
    return Vocabulary(
        name,
        sha256,
        tokens={piece.piece: number for number, piece in enumerate(model.pieces)},
        scores={piece.piece: piece.score for piece in model.pieces},
        kind={1: "Unigram", 2: "BPE"}.get(model.trainer_spec.model_type, "") if model.HasField("trainer_spec") else "",
    )


def _bytes(encoded: str) -> str:
    return "".join(_letters()[byte] for byte in base64.b64decode(encoded, validate=True))


@cache
def _letters() -> Mapping[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def _added(store: Store, files: Mapping[str, ObjectInfo]) -> dict[str, dict[str, Any]]:
    """The tokens that were added to a vocabulary, from the files beside it."""
    found: dict[str, dict[str, Any]] = {}
    if "added_tokens.json" in files:
        listed = json.loads(_read(store, files["added_tokens.json"]))
        found |= {token: {"content": token, "id": number} for token, number in listed.items()}
    if "tokenizer_config.json" in files:
        decoder = json.loads(_read(store, files["tokenizer_config.json"])).get("added_tokens_decoder") or {}
        found |= {entry["content"]: {**entry, "id": int(number)} for number, entry in decoder.items()}
    return found
