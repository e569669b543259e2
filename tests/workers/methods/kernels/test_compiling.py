"""Kernels are compiled once and kept in the user's cache; a cache that is damaged or read-only is no obstacle."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.workers.methods.kernels.room import of_room
from workers.methods.kernels.compiling import Kernel, Pointer, kernel
from workers.methods.kernels.memory import address

ROOT = Path(__file__).parents[4]
OF_C = {"memset", "memcpy", "memmove", "_GLOBAL_OFFSET_TABLE_"}


def _doubled(values: Pointer, count: int) -> None:
    for i in range(count):
        values[i] = values[i] + values[i]


def doubled() -> Kernel:
    """A kernel that this process has not loaded yet."""
    return kernel("f32*", "i64")(_doubled)


def works(each: Kernel) -> bool:
    values = np.arange(100, dtype=np.float32)
    each(address(values), values.size)
    return bool((values == 2 * np.arange(100)).all())


@pytest.fixture(scope="module")
def compiled() -> bytes:
    """The object code of `doubled`."""
    return doubled().compiled()


@pytest.fixture
def never_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Kernel) -> bytes:
        raise AssertionError("compiled")

    monkeypatch.setattr(Kernel, "compiled", refuse)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch, compiled: bytes) -> list[str]:
    """Grows by a name at each compilation, which takes no time."""
    names: list[str] = []

    def compile_(self: Kernel) -> bytes:
        names.append(self.name)
        return compiled

    monkeypatch.setattr(Kernel, "compiled", compile_)
    return names


def test_a_kernel_is_compiled_once_and_then_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert works(doubled()) and works(doubled()) and works(doubled())
    assert compilations == ["doubled"]
    assert [*tmp_path.rglob("*.*")] == [doubled().cached_at()]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "zeros"])
def test_a_damaged_object_file_is_compiled_anew_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str], damage: str
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert works(doubled())
    path = doubled().cached_at()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes({"cut": whole[:-1], "flipped": bytes(flipped), "empty": b"", "zeros": b"\0" * 40}[damage])
    assert works(doubled())
    assert compilations == ["doubled", "doubled"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("cache", ["/dev/null", "file"])
def test_without_a_cache_a_kernel_is_compiled_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str], cache: str
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    assert works(doubled()) and works(doubled())
    assert compilations == ["doubled", "doubled"]


def test_a_user_without_a_home_needs_none(monkeypatch: pytest.MonkeyPatch, compilations: list[str]):
    def no_home(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert works(doubled())


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]):
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "replace", full)
    assert works(doubled())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_other_libraries_and_another_processor_have_their_own_file(monkeypatch: pytest.MonkeyPatch):
    import llvmlite.binding as llvm

    here = doubled().cached_at()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "0")
        assert doubled().cached_at() != here
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "generic")
    assert doubled().cached_at() != here


def test_processes_that_compile_at_the_same_time_all_succeed(tmp_path: Path):
    script = "from tests.workers.methods.kernels.test_compiling import *; assert works(doubled())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    script += "; import sys; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, timeout=120)
    assert [*tmp_path.rglob("*.*")] == [*tmp_path.rglob("doubled-*.o")]


def test_the_methods_import_no_compiler():
    script = "import workers.methods, workers.methods.running, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"numba", "llvmlite", "torch"} & set(loaded.stdout.split()) == set()


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_every_object_file_needs_nothing_but_the_c_library(tmp_path: Path):
    found = [*of_room()]
    assert found
    for each in found:
        (tmp_path / "kernel.o").write_bytes(each.object_code())
        done = subprocess.run(["nm", "-u", tmp_path / "kernel.o"], capture_output=True, text=True, check=True)
        assert {line.split()[-1] for line in done.stdout.splitlines()} <= OF_C, each.name


MERGED = """
import hashlib, ml_dtypes, numpy as np
from workers.methods.kernels.consensus import Mixture, Trimmed, run_mixtures
from workers.methods.kernels.unit_sums import Product, unit_sums
from workers.methods.kernels.weighted_sum import Sum, WeightedSums
bits = np.random.default_rng(0).integers(0, 1 << 16, (3, 70_000), np.uint16)
parents = [*np.where(bits & 0x7F80 == 0x7F80, 0, bits).astype(np.uint16).view(ml_dtypes.bfloat16)]
outputs = [np.empty(70_000, np.float16) for _ in range(2)]
WeightedSums(3, [Sum(((0, 0.3), (1, 0.7))), Sum(((0, 0.3), (1, 1.1)), base=2)], "float32").run(parents, outputs)
halves = [np.empty(70_000, ml_dtypes.bfloat16) for _ in range(3)]
WeightedSums(3, [Sum(((0, 1e-9), (1, 2e-9))), Sum(((0, 1e-9),), base=2)], "float32").run(parents, halves[:2])
mixture = Mixture(2, ((0, 1e-9), (1, 3e-9)), True, True, 0.7)
run_mixtures(parents, [Trimmed(0, 2), Trimmed(1, 2)], [mixture], halves[2:], "float32")
sums = unit_sums(parents, [Product(0, 1), Product((0, 2))], unit=1 << 13, dtype="float32")
print(hashlib.sha256(b"".join(each.tobytes() for each in (*outputs, *halves, sums))).hexdigest())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a processor of x86")
def test_bits_do_not_depend_on_the_processor(tmp_path: Path):
    """The oldest processor has vectors of 16 bytes, and no fused multiply-add to tempt a compiler."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    oldest = {**environment, "XDG_CACHE_HOME": str(tmp_path), "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    said = [
        subprocess.run([sys.executable, "-c", MERGED], env=each, capture_output=True, text=True, check=True).stdout
        for each in (environment, oldest)
    ]
    assert said[0] == said[1] and len({*tmp_path.rglob("*.o")}) >= 4
