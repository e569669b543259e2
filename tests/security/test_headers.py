"""A parent from a stranger costs bounded memory and time, whatever its headers hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_BYTES = 1_500_000_000
FILES = 5
BOMBS = {
    "lists": 'b\'{"x":[\' + b"[]," * 8_000_000 + b"[]]}"',
    "mappings": 'b\'{"x":[\' + b"{}," * 8_000_000 + b"{}]}"',
    "nesting": 'b"{" + b\'"a":{\' * 4_000_000',
    "shape": 'b\'{"x":{"dtype":"U8","data_offsets":[0,0],"shape":[\' + b"1," * 12_000_000 + b"1]}}"',
    "name": "b'{\"' + b\"x\" * 24_000_000 + b'\":1}'",
    "digits": 'b\'{"x":\' + b"9" * 24_000_000 + b"}"',
    "spaces": 'b"{" + b" " * 24_000_000 + b"}"',
}
PROGRAM = """
import json, resource, sys
from jobs.errors import CorruptData
from workers.checkpoints.opening import open_checkpoint
from workers.storage import open_store
header = {bomb}
store = open_store("memory://bomb")
names = [f"model-{{number}}.safetensors" for number in range({files})]
for name in names:
    store.write(name, len(header).to_bytes(8, "little") + header)
store.write("model.safetensors.index.json", json.dumps({{"weight_map": dict(zip(names, names))}}).encode())
store.write("config.json", b"{{}}")
resource.setrlimit(resource.RLIMIT_AS, ({most}, {most}))
try:
    print(open_checkpoint("memory://bomb", "stranger"))
except CorruptData as refusal:
    print(len(str(refusal)), refusal)
"""


TEXTS = {"config.json": 1_900_000, "model.safetensors.index.json": 24_000_000}
PROGRAM_OF_JSON = """
import resource
from jobs.errors import MergeyardError
from workers.checkpoints.opening import open_checkpoint
from workers.checkpoints.safetensors import header_bytes
from workers.storage import open_store
store = open_store("memory://bomb")
store.write("model.safetensors", header_bytes([]))
store.write("config.json", b"{{}}")
store.write({name!r}, ({bomb})[:{size}])
resource.setrlimit(resource.RLIMIT_AS, ({most}, {most}))
try:
    print(0, open_checkpoint("memory://bomb", "stranger"))
except MergeyardError as refusal:
    print(len(str(refusal)), refusal)
"""

SLOW = ("mappings", "shape")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.heavy] * (kind in SLOW)) for kind in BOMBS])
def test_headers_of_24_megabytes_are_refused_within_bounds(kind: str) -> None:
    assert "model-" in said(PROGRAM.format(bomb=BOMBS[kind], files=FILES, most=MOST_BYTES))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.heavy] * (kind in SLOW)) for kind in BOMBS])
@pytest.mark.parametrize("name", TEXTS)
def test_a_config_and_an_index_of_the_largest_size_are_refused_within_bounds(name: str, kind: str) -> None:
    """Cut at the size that is still read, so that all but the spaces are no JSON at their end."""
    program = PROGRAM_OF_JSON.format(name=name, bomb=BOMBS[kind], size=TEXTS[name], most=MOST_BYTES)
    assert f"{name}: not readable as JSON" in said(program)


def said(program: str) -> str:
    """The one short line that the program prints."""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr[-500:]
    length, _, line = ended.stdout.partition(" ")
    assert 0 < int(length) < 1500
    return line
