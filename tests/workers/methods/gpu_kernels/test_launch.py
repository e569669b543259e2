"""Rows in a launch, on CPU tensors by Triton's interpreter; and the machine code, which a GPU is not needed for."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workers.methods.gpu_kernels import launch as launching
from workers.methods.gpu_kernels import rows
from workers.methods.gpu_kernels.language import interprets, tl
from workers.methods.gpu_kernels.launch import launch
from workers.methods.gpu_kernels.points import points
from workers.methods.gpu_kernels.rows import BLOCK, Head, Row, Term

pytestmark = pytest.mark.skipif(not interprets(), reason="Triton is not interpreted here; `make triton` does")

ROOT = Path(__file__).parents[4]
CPU = torch.device("cpu")


def bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def test_a_launch_writes_tensors_of_every_length_each_with_its_own_numbers() -> None:
    sizes = [1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 7]
    models = [torch.arange(size, dtype=torch.float32) for size in sizes]
    outputs = [torch.full((size + 3,), -1.0) for size in sizes]
    launch(
        [
            Row(rows.SUM, 0, "float32", "float32", Head(out.data_ptr(), 0, 0, size, 0), (Term(x.data_ptr(), bits(w)),))
            for w, (size, x, out) in enumerate(zip(sizes, models, outputs, strict=True))
        ],
        "float32",
        CPU,
    )
    for w, (size, x, out) in enumerate(zip(sizes, models, outputs, strict=True)):
        assert torch.equal(out[:size], x * w)
        assert out[size:].tolist() == [-1.0] * 3  # nothing behind the end is written


@pytest.mark.parametrize("elements_before", [1 << 31, 1 << 33])
def test_elements_beyond_two_to_the_31_are_where_they_belong(elements_before: int) -> None:
    """The last blocks of a tensor, whose first element would lie so many elements before its memory."""
    size = BLOCK + 100
    base, model = torch.zeros(size), torch.arange(size, dtype=torch.float32) % 3
    output = torch.empty(size)
    away = 4 * elements_before
    tie = elements_before + BLOCK + 7
    threshold = int(torch.tensor(2.0).view(torch.int32))
    kept = Term(model.data_ptr() - away, bits(1.0), keep=threshold, keep_last=tie)
    first = -(elements_before // BLOCK)  # so that program 0 is not the first of its row
    head = Head(output.data_ptr() - away, 0, first, elements_before + size, 0, base.data_ptr() - away, scale=bits(1.0))
    table, segments, flags = torch.tensor([[*head, *kept]]), torch.zeros(2, dtype=torch.int32), torch.zeros(1)
    kind, number = (rows.CONSENSUS, rows.BASED | rows.TRIMS, 1), tl.float32
    points[(2,)](table, segments, flags, *kind, number, number, number, 4, BLOCK)
    places = torch.arange(size) + elements_before
    assert torch.equal(output, torch.where((model == 2) & (places <= tie), 2.0, 0.0))


def test_where_triton_cannot_compile_the_formulas_merge(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(launching, "interprets", lambda: False)
    monkeypatch.setattr(torch, "zeros", refused)
    assert not launching.runs_on("cuda:7")
    assert "(Failed to find C compiler.); slower torch formulas merge there; install a C compiler" in caplog.text
    assert not launching.runs_on("card"), "Triton has no such device"


COMPILED = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workers.methods.gpu_kernels import rows
from workers.methods.gpu_kernels.language import tl
from workers.methods.gpu_kernels.points import points

names = ["KIND", "MODE", "MODELS", "STORED", "OUT", "ARITHMETIC", "ALIGNMENT", "BLOCK"]
signature = {"table": "*i64", "segments": "*i32", "flags": "*i32", **dict.fromkeys(names, "constexpr")}
attributes = {(place,): [["tt.divisibility", 16]] for place in range(3)}
elects = rows.BASED | rows.ELECTS | rows.NORMALIZES
found = {}
for name, kind, mode in [
    ("linear", rows.SUM, 0),
    ("task_arithmetic", rows.SUM, rows.BASED),
    ("ties", rows.CONSENSUS, elects | rows.TRIMS),
    ("dare_ties", rows.CONSENSUS, elects | rows.DRAWS | rows.FACTORED),
    ("sce", rows.SELECTED, rows.BASED | rows.TRIMS),
    ("ram", rows.OVERLAP, rows.BASED),
]:
    values = [kind, mode, 2, tl.bfloat16, tl.bfloat16, tl.float32, 16, rows.BLOCK]
    source = ASTSource(points, signature, dict(zip(names, values, strict=True)), attributes)
    options = {"enable_fp_fusion": False, "num_warps": 8}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found[name] = {
        "fused": len(re.findall(r"\\bfma\\b", ptx)),
        "subnormals to zero": len(re.findall(r"\\.ftz\\b", ptx)),
        "rough divisions": len(re.findall(r"\\bdiv\\.(full|approx)", ptx)),
        "wide reads": len(re.findall(r"ld\\.global[\\w.:]*\\.v4\\.b32", ptx)),
        "wide writes": len(re.findall(r"st\\.global[\\w.:]*\\.v4\\.b32", ptx)),
    }
print(json.dumps(found))
"""


def test_the_machine_code_rounds_every_operation_and_reads_each_parent_once_in_wide_words() -> None:
    """For compute capability 9.0: Triton compiles without a GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sound = {"fused": 0, "subnormals to zero": 0, "rough divisions": 0, "wide writes": 1}
    assert json.loads(done.stdout) == {
        "linear": sound | {"wide reads": 2},
        **{method: sound | {"wide reads": 3} for method in ("task_arithmetic", "ties", "dare_ties", "sce", "ram")},
    }
