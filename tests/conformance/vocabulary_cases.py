"""Merges of models with different vocabularies: documents on which mergekit and mergeyard must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.tokenizer_models import tokenizer, write_model

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
    "the commonest template": TASKS + "tokenizer_source: union\nchat_template: auto\n",
    "Jinja": LINEAR
    + BASE
    + "tokenizer_source: base\nchat_template: '{% for m in messages %}{{ m.content }}{% endfor %}'\n",
}
PADDED = {
    "base": LINEAR.replace("base,", "padded,") + "base_model: PARENTS/padded\ntokenizer_source: base\n",
    "union": LINEAR.replace("base,", "padded,") + "base_model: PARENTS/padded\ntokenizer: {source: union}\n",
    "a model": LINEAR.replace("base,", "padded,") + "tokenizer_source: PARENTS/padded\n",
}


def write_vocabularies(root: Path) -> None:
    """base; twin, of the same vocabulary; chat, with two more special tokens; other, with other subwords in another
    order; padded, base's with 20 rows."""
    plain, chat, other = tokenizer(MERGES), tokenizer(MERGES, ["<x>", "<y>"]), tokenizer(("c d", "e f", "g h"), ["<y>"])
    write_model(root / "base", plain, template="base {{ messages }}")
    write_model(root / "twin", plain)
    write_model(root / "chat", chat, template="chat {{ messages }}")
    write_model(root / "chat-tied", chat, tied=True)
    write_model(root / "other", other, template="chat {{ messages }}")
    write_model(root / "other-tied", other, tied=True)
    write_model(root / "padded", plain, rows=20)


def document(text: str, vocabularies: Path) -> dict[str, Any]:
    """The document with the folder of `write_vocabularies` for PARENTS."""
    return yaml.safe_load(text.replace("PARENTS", str(vocabularies)))
