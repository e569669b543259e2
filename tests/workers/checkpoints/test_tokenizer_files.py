"""New tokens in the files of a tokenizer: transformers loads them, with their ids, and cuts texts as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.tokenizers import AddedToken
from tests.tokenizer_models import tokenizer
from workers.checkpoints.tokenizer_files import with_tokens

ADDED = (
    AddedToken(content="ef", id=12, piece=True),
    AddedToken(content="<y>", id=13, special=True, normalized=False),
    AddedToken(content="zz", id=14),
)
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
DECODER = {"0": {"content": "<s>", "special": True}, "11": {"content": "<x>", "special": True}}


@pytest.mark.parametrize(
    "config", [CONFIG, {**CONFIG, "added_tokens_decoder": DECODER}], ids=["without a decoder", "with a decoder"]
)
def test_transformers_finds_the_tokens_and_cuts_texts_as_before(tmp_path: Path, config: dict[str, object]) -> None:
    from transformers import AutoTokenizer

    files = {
        "tokenizer.json": json.dumps(tokenizer(("a b",), ["<x>"])).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "added_tokens.json": b'{"<x>": 11}',
    }
    new = with_tokens(files, ADDED)
    for name, data in new.items():
        (tmp_path / name).write_bytes(data)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert {token: loaded.get_vocab()[token] for token in ("ab", "<x>", "ef", "<y>", "zz")} == {
        "ab": 10, "<x>": 11, "ef": 12, "<y>": 13, "zz": 14,
    }  # fmt: skip
    assert loaded("abef<x> zz<y>", add_special_tokens=False).tokens() == ["ab", "e", "f", "<x>", "zz", "<y>"]
    assert loaded.decode([12, 13], skip_special_tokens=True) == "ef"
    assert json.loads(new["added_tokens.json"]) == {"<x>": 11, "<y>": 13, "zz": 14}


def test_subwords_become_added_tokens_where_there_is_no_model_to_add_them_to() -> None:
    new = with_tokens({"vocab.json": b'{"a": 0}', "tokenizer_config.json": b"{}"}, ADDED)
    assert json.loads(new["added_tokens.json"]) == {"ef": 12, "<y>": 13, "zz": 14}
    decoder = json.loads(new["tokenizer_config.json"])["added_tokens_decoder"]
    assert decoder["13"]["special"] and not decoder["12"]["special"] and decoder["12"]["normalized"]
    unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}, "added_tokens": []}
    listed = json.loads(with_tokens({"tokenizer.json": json.dumps(unigram).encode()}, ADDED)["tokenizer.json"])
    assert [entry["content"] for entry in listed["added_tokens"]] == ["ef", "<y>", "zz"]
    assert listed["model"] == unigram["model"]


def test_no_token_changes_no_byte() -> None:
    files = {"tokenizer.json": b"{", "tokenizer_config.json": b"["}
    assert with_tokens(files, ()) == files
