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
from tests.conformance.oracle import MISSING, ORACLE_PYTHON, Answer, Merge, run_mergekit
from tests.conformance.reference import checkpoint
from tests.tokenizer_models import EMBEDDINGS, HEAD, tokenizer, write_model

MERGES = ("a b", "c d", "ab cd")
LINEAR = """
merge_method: linear
models:
- {model: PARENTS/base, parameters: {weight: 0.5}}
- {model: PARENTS/chat, parameters: {weight: 0.5}}
dtype: float32
"""
THREE = """
merge_method: linear
models:
- {model: PARENTS/base, parameters: {weight: 0.5}}
- {model: PARENTS/chat, parameters: {weight: 0.3}}
- {model: PARENTS/other, parameters: {weight: 0.2}}
dtype: float32
"""
TASKS = """
merge_method: task_arithmetic
base_model: PARENTS/base
models:
- {model: PARENTS/chat, parameters: {weight: 0.6}}
- {model: PARENTS/other, parameters: {weight: 0.5}}
dtype: float32
"""
TIED = TASKS.replace("/chat", "/chat-tied").replace("/other", "/other-tied")
BASE = "base_model: PARENTS/base\n"
NO_BASE = "union of three without a base"
"""There it is any model, by Python's hash seed."""
ALIKE = {
    "tokenizer_source base": LINEAR + BASE + "tokenizer_source: base\n",
    "source base": LINEAR + BASE + "tokenizer: {source: base}\n",
    "tokenizer_source union": LINEAR + BASE + "tokenizer_source: union\n",
    "no source is union": LINEAR + BASE + "tokenizer: {pad_to_multiple_of: 1}\n",
    "union of equal vocabularies": LINEAR.replace("/chat", "/twin") + BASE + "tokenizer: {source: union}\n",
    "a model": LINEAR + BASE + "tokenizer_source: PARENTS/chat\n",
    "a model in the long form": LINEAR + BASE + "tokenizer: {source: {model: {path: PARENTS/chat}}}\n",
    "a model of another vocabulary": TASKS + "tokenizer_source: PARENTS/other\n",
    "a model that is merged nowhere": LINEAR + BASE + "tokenizer_source: PARENTS/other\n",
    "union of three": TASKS + "tokenizer_source: union\n",
    NO_BASE: THREE + "tokenizer_source: union\n",
    "base of three": TASKS + "tokenizer_source: base\n",
    "slerp": LINEAR.replace("linear", "slerp").replace(", parameters: {weight: 0.5}", "")
    + BASE
    + "parameters: {t: 0.3}\ntokenizer_source: union\n",
    "ties": TASKS.replace("task_arithmetic", "ties") + "tokenizer_source: union\n",
    "tied and untied": TIED + "tokenizer_source: union\n",
    "pad_to_multiple_of": TASKS + "tokenizer: {source: union, pad_to_multiple_of: 16}\n",
    "pad_to_multiple_of the exact size": LINEAR + BASE + "tokenizer: {source: base, pad_to_multiple_of: 13}\n",
    "a source of a token": TASKS + "tokenizer: {source: union, tokens: {'<x>': {source: PARENTS/chat}}}\n",
    "a forced source": TASKS + "tokenizer: {source: union, tokens: {'cd': {source: PARENTS/other, force: true}}}\n",
    "zero": TASKS + "tokenizer: {source: union, tokens: {'<x>': {source: {kind: zero}}}}\n",
    "zero, forced": TASKS + "tokenizer: {source: base, tokens: {'a': {source: {kind: zero}, force: true}}}\n",
    "model_token by token": TASKS
    + "tokenizer: {source: union, tokens: {'<new>': {source: {kind: model_token, model: PARENTS/chat, token: '<y>'}}}}"
    "\n",
    "model_token by id": TASKS
    + "tokenizer: {source: base, tokens: {'</s>': {source: {kind: model_token, model: PARENTS/chat, token_id: 13},"
    " force: true}}}\n",
    "a template of the recipe": LINEAR + BASE + "tokenizer_source: union\nchat_template: chatml\n",
    "the commonest template": LINEAR + BASE + "tokenizer_source: union\nchat_template: auto\n",
    "Jinja": LINEAR
    + BASE
    + "tokenizer_source: base\nchat_template: '{% for m in messages %}{{ m.content }}{% endfor %}'\n",
}
PADDED = {
    "base": LINEAR.replace("base,", "padded,") + "base_model: PARENTS/padded\ntokenizer_source: base\n",
    "union": LINEAR.replace("base,", "padded,") + "base_model: PARENTS/padded\ntokenizer: {source: union}\n",
    "a model": LINEAR.replace("base,", "padded,") + "tokenizer_source: PARENTS/padded\n",
}


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


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; twin, of the same vocabulary; chat, with two more special tokens; other, with other subwords in another
    order; padded, base's with 20 rows."""
    root = tmp_path_factory.mktemp("vocabularies")
    plain, chat, other = tokenizer(MERGES), tokenizer(MERGES, ["<x>", "<y>"]), tokenizer(("c d", "e f", "g h"), ["<y>"])
    write_model(root / "base", plain, template="base {{ messages }}")
    write_model(root / "twin", plain)
    write_model(root / "chat", chat, template="chat {{ messages }}")
    write_model(root / "chat-tied", chat, tied=True)
    write_model(root / "other", other, template="chat {{ messages }}")
    write_model(root / "other-tied", other, tied=True)
    write_model(root / "padded", plain, rows=20)
    return root


@pytest.fixture(scope="module")
def theirs(vocabularies: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Answer]:
    if not ORACLE_PYTHON.exists():
        pytest.skip(MISSING)
    merges = [Merge(name, document(text, vocabularies)) for name, text in ALIKE.items()]
    merges += [Merge(f"padded {name}", document(text, vocabularies)) for name, text in PADDED.items()]
    return run_mergekit(merges, tmp_path_factory.mktemp("mergekit"))


def document(text: str, vocabularies: Path) -> dict[str, Any]:
    return yaml.safe_load(text.replace("PARENTS", str(vocabularies)))


def tokens_of(of: Mapping[str, Any]) -> set[str]:
    """The tokens of a tokenizer.json."""
    return {*of["model"]["vocab"], *(entry["content"] for entry in of["added_tokens"])}


def merged(text: str, vocabularies: Path, out: Path) -> Merged:
    settings = ["--config-from", str(vocabularies / "base")] if "tied" in text else []
    assert merge_ours(yaml.safe_dump(document(text, vocabularies)), out, "float32", *settings) == 0
    return Merged(out)


@pytest.mark.parametrize("case", ALIKE)
def test_a_merge_of_vocabularies_is_mergekit_s(
    case: str, vocabularies: Path, theirs: Mapping[str, Answer], tmp_path: Path
) -> None:
    assert theirs[case].error is None
    expected, actual = Merged(theirs[case].folder), merged(ALIKE[case], vocabularies, tmp_path / "merge")
    old, new = expected.tokenizer, actual.tokenizer
    assert new.get_vocab().keys() == old.get_vocab().keys()
    own = json.loads((vocabularies / "base" / "tokenizer.json").read_text())
    ids = [
        {token: vocab[token] for token in tokens_of(own) & vocab.keys()} for vocab in (old.get_vocab(), new.get_vocab())
    ]
    assert ids[0] == ids[1] or case == NO_BASE
    assert sorted(old.get_vocab().values()) == sorted(new.get_vocab().values())
    assert new.special_tokens_map == old.special_tokens_map
    chat = [{"role": "user", "content": "ab"}]
    assert new.apply_chat_template(chat, tokenize=False) == old.apply_chat_template(chat, tokenize=False)
    for name in (EMBEDDINGS, HEAD):
        ours, rows = actual.rows(name), expected.rows(name)
        for token in rows:
            assert torch.allclose(ours[token], rows[token], rtol=1e-5, atol=1e-6), (name, token)
    tables, mine = checkpoint(str(expected.folder)), checkpoint(str(actual.folder))
    assert {name: tensor.shape for name, tensor in mine.items()} == {name: t.shape for name, t in tables.items()}
    config = json.loads((actual.folder / "config.json").read_text())
    assert config["vocab_size"] == len(mine[EMBEDDINGS]) == len(mine[HEAD])
    assert (actual.folder / "generation_config.json").exists()
    AutoModelForCausalLM.from_pretrained(actual.folder)
