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
from workers.checkpoint import open_checkpoint
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


SLOW = ("mappings", "shape")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.heavy] * (kind in SLOW)) for kind in BOMBS])
def test_headers_of_24_megabytes_are_refused_within_bounds(kind: str) -> None:
    program = PROGRAM.format(bomb=BOMBS[kind], files=FILES, most=MOST_BYTES)
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr[-500:]
    length, _, line = ended.stdout.partition(" ")
    assert int(length) < 1500
    assert "model-" in line
