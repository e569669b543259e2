"""Damaged indexes and configs of checkpoints in several files, and what must come of every one of them.

Damaged as headers are. Whatever comes in, the answer is a refusal, in one short line, or the checkpoint whose every
tensor lies in the file that the index names for it.
"""

from __future__ import annotations

import json
import random

from jobs.errors import MergeyardError
from tests.fuzz.headers import damaged_text
from workers.checkpoints.opening import open_checkpoint
from workers.checkpoints.safetensors import header_bytes
from workers.storage import open_store

URL = "memory://fuzz-index"
FILES = {"a.safetensors": ("x", "y"), "b.safetensors": ("z", "é")}
INDEX, CONFIG = "model.safetensors.index.json", "config.json"


def corpus() -> list[tuple[str, bytes]]:
    """Names and texts as checkpoints have them."""
    weight_map = {name: file for file, names in FILES.items() for name in names}
    config = {"model_type": "qwen2", "num_hidden_layers": 2, "rope_scaling": {"type": "yarn"}, "layer_types": ["full"]}
    return [
        (INDEX, json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}, indent=2).encode()),
        (INDEX, json.dumps({"weight_map": dict(list(weight_map.items())[:3])}, ensure_ascii=False).encode()),
        (CONFIG, json.dumps(config).encode()),
        (CONFIG, b"{}"),
    ]


def damaged(draw: random.Random, known: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """A file with one to four damages."""
    name, text = draw.choice(known)
    return name, damaged_text(draw, text, [text for _, text in known])


def check(given: tuple[str, bytes]) -> bool:
    """Whether the checkpoint was accepted; `AssertionError` when what came of it must not be."""
    name, text = given
    store = open_store(URL)
    for file, tensors in FILES.items():
        store.write(file, header_bytes([(tensor, "U8", (1,)) for tensor in tensors]) + bytes(len(tensors)))
    for other, valid in corpus()[::2]:
        store.write(other, valid)
    store.write(name, text)
    try:
        found = open_checkpoint(URL, "stranger")
    except MergeyardError as refusal:
        assert str(refusal).isprintable(), "one line"
        assert len(str(refusal)) < 2500
        return False
    weight_map = json.loads(bytes(store.read(INDEX)))["weight_map"]
    assert {tensor: found.files[place.file].key for tensor, place in found.tensors.items()} == weight_map
    assert found.config == json.loads(bytes(store.read(CONFIG)))
    return True
