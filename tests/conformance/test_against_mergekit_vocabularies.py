"""Vocabularies token by token: mergekit's ids, rows, templates and special tokens, and where ours differ on purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.conformance.conftest import merge_ours
from tests.conformance.oracle import Answer
from tests.conformance.reference import checkpoint
from tests.conformance.vocabulary_cases import ALIKE, NO_BASE, PADDED, document
from tests.tokenizer_models import EMBEDDINGS, HEAD


@dataclass(frozen=True)
class Merged:
    """The output of one document."""

    folder: Path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder)

    def rows(self, name: str) -> Mapping[str, torch.Tensor]:
        """Token to row."""
        table = checkpoint(str(self.folder))[name]
        return {token: table[number] for token, number in self.tokenizer.get_vocab().items()}


def tokens_of(of: Mapping[str, Any]) -> set[str]:
    """The tokens of a tokenizer.json."""
    return {*of["model"]["vocab"], *(entry["content"] for entry in of["added_tokens"])}


def merged(text: str, vocabularies: Path, out: Path) -> Merged:
    settings = ["--config-from", str(vocabularies / "base")] if "tied" in text else []
    assert merge_ours(yaml.safe_dump(document(text, vocabularies)), out, "float32", *settings) == 0
    return Merged(out)


@pytest.mark.parametrize("case", ALIKE)
def test_a_merge_of_vocabularies_is_mergekit_s(
    case: str, vocabularies: Path, mergekit: Mapping[str, Answer], tmp_path: Path
) -> None:
    assert mergekit[f"vocabulary {case}"].error is None
    expected, actual = (
        Merged(mergekit[f"vocabulary {case}"].folder),
        merged(ALIKE[case], vocabularies, tmp_path / "merge"),
    )
    old, new = expected.tokenizer, actual.tokenizer
    assert new.get_vocab().keys() == old.get_vocab().keys()
    own = json.loads((vocabularies / "base" / "tokenizer.json").read_text())
    ids = [
        {token: vocab[token] for token in tokens_of(own) & vocab.keys()} for vocab in (old.get_vocab(), new.get_vocab())
    ]
    chat = [{"role": "user", "content": "ab"}]
    if case != NO_BASE:
        assert ids[0] == ids[1]
        assert new.apply_chat_template(chat, tokenize=False) == old.apply_chat_template(chat, tokenize=False)
    assert sorted(old.get_vocab().values()) == sorted(new.get_vocab().values())
    assert new.special_tokens_map == old.special_tokens_map
    for name in (EMBEDDINGS, HEAD):
        ours, rows = actual.rows(name), expected.rows(name)
        for token in rows:
            assert torch.allclose(ours[token], rows[token], rtol=1e-5, atol=1e-6), (name, token)
    tables, mine = checkpoint(str(expected.folder)), checkpoint(str(actual.folder))
    assert {name: tensor.shape for name, tensor in mine.items()} == {name: t.shape for name, t in tables.items()}
    config = json.loads((actual.folder / "config.json").read_text())
    assert config["vocab_size"] == len(mine[EMBEDDINGS]) == len(mine[HEAD])
    assert (actual.folder / "generation_config.json").exists()
    if case in ("union of three", "tied and untied"):
        AutoModelForCausalLM.from_pretrained(actual.folder)


@pytest.mark.parametrize("case", PADDED)
def test_padding_that_mergekit_cuts_stays(
    case: str, vocabularies: Path, mergekit: Mapping[str, Answer], tmp_path: Path
) -> None:
    """Qwen2.5 has 152064 rows and 151665 tokens: mergekit #425."""
    expected, actual = (
        Merged(mergekit[f"vocabulary padded {case}"].folder),
        merged(PADDED[case], vocabularies, tmp_path / "merge"),
    )
    stored = checkpoint(str(vocabularies / "padded"))
    for name in (EMBEDDINGS, HEAD):
        rows = actual.rows(name)
        assert all(torch.allclose(rows[token], row, rtol=1e-5, atol=1e-6) for token, row in expected.rows(name).items())
        table = checkpoint(str(actual.folder))[name]
        assert len(checkpoint(str(expected.folder))[name]) < len(table) == 20
        assert torch.equal(table[15:], stored[name][15:])
