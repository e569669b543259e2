"""Times merges against mergekit and against the machine itself, in one go, with the page cache warm.

    python -m tests.benchmarks.merge_speed PARENTS [--rows read-copy,mergekit-linear,linear] [--repeat 1] [--json]

PARENTS holds base, cos and fmt, as make_checkpoints.py writes them. Rows:

    read-copy        a plain loop reads cos whole, and copies fmt: the least that any merge of two must move
    read-copy-fsync  the same, and waits until the disk has it
    mergekit-linear  mergekit 0.1.5 from .venv-mergekit, 0.7 cos + 0.3 fmt, bf16
    linear           mergeyard merge of the same document
    mergekit-ties    density 0.5, weights 0.7 and 0.3, on base
    ties             mergeyard merge of the same document
    grid             mergeyard run of 16 linear points, all written, on a Ray of its own
    grid-in-process  the same without Ray

For each: wall seconds; CPU seconds, user and system, of the process and its children; the highest sum of resident
memory over the process tree, and of its anonymous part (what is not page cache), sampled every 50 ms; for linear, the
share of elements that are the float64 result rounded once to bf16 (to either side at half-way points), over a sample
spread through all tensors. Before each row the parents are read once, earlier outputs deleted and the disk synced.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from safetensors import safe_open

from tests.conformance.measures import correctly_rounded

ROOT = Path(__file__).parents[2]
MERGEKIT = ROOT / ".venv-mergekit" / "bin" / "mergekit-yaml"
MERGEYARD = Path(sys.executable).with_name("mergeyard")
ROWS = ("read-copy", "read-copy-fsync", "mergekit-linear", "linear", "mergekit-ties", "ties", "grid", "grid-in-process")
DEFAULT_ROWS = "read-copy,read-copy-fsync,mergekit-linear,linear"
WEIGHTS = {"cos": 0.7, "fmt": 0.3}
GRID = [round(w / 15, 4) for w in range(16)]
BLOCK = 16 << 20
SAMPLED_ELEMENTS = 20_000_000

READ_AND_COPY = f"""
import os, sys
def blocks(path):
    buffer = bytearray({BLOCK})
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield memoryview(buffer)[:count]
read, copied, out, fsync = sys.argv[1].split(":"), sys.argv[2].split(":"), sys.argv[3], sys.argv[4] == "fsync"
for path in read:
    for block in blocks(path):
        pass
for path in copied:
    with open(os.path.join(out, os.path.basename(path)), "wb", buffering=0) as target:
        for block in blocks(path):
            target.write(block)
        if fsync:
            os.fsync(target.fileno())
"""


@dataclass(frozen=True)
class Measured:
    """One row of the table; bytes of memory at the peak, seconds, and a share from 0 to 1 or None."""

    row: str
    wall_seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_anonymous: int
    correctly_rounded: float | None


@dataclass
class TreeWatch:
    """Follows a process and all that descend from it, until stopped."""

    root: psutil.Process
    peak_rss: int = 0
    peak_anonymous: int = 0

    def __post_init__(self) -> None:
        self.cpu_by_process: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more samples after this."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(0.05):
            rss = anonymous = 0
            for process in self._tree():
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    times = process.cpu_times()
                except (OSError, psutil.Error):
                    continue
                rss += _kilobytes(status, "VmRSS:")
                anonymous += _kilobytes(status, "RssAnon:")
                self.cpu_by_process[process.pid] = times.user + times.system
            self.peak_rss = max(self.peak_rss, rss)
            self.peak_anonymous = max(self.peak_anonymous, anonymous)

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self.root, *self.root.children(recursive=True)]
        except psutil.Error:
            return []


def main() -> None:
    """Runs the rows asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parents", type=Path)
    parser.add_argument("--rows", default=DEFAULT_ROWS, help=f"comma-separated, of {', '.join(ROWS)}; or all")
    parser.add_argument("--out", type=Path, help="scratch folder on the disk to measure (default: PARENTS/../merges)")
    parser.add_argument("--repeat", type=int, default=1, help="times each row is run; the fastest is shown")
    parser.add_argument("--json", action="store_true", help="one JSON object a row instead of the table")
    options = parser.parse_args()
    rows = ROWS if options.rows == "all" else options.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    parents, out = options.parents.resolve(), (options.out or options.parents.parent / "merges").resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not options.json:
        print(
            f"{'':<16} {'wall s':>8} {'CPU s':>8} {'peak RSS':>10} {'anonymous':>10} {'rounded once':>13}", flush=True
        )
    for row in rows:
        best = min((measure(row, parents, out) for _ in range(options.repeat)), key=lambda m: m.wall_seconds)
        print(json.dumps(asdict(best)) if options.json else line(best), flush=True)


def measure(row: str, parents: Path, out: Path) -> Measured:
    """Runs one row in a process of its own, with warm parents, a synced disk and an empty folder; deletes what it
    wrote."""
    folder = out / row
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    warm(parents)
    os.sync()
    command = command_of(row, parents, folder)
    log = out / f"{row}.log"
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        watch = TreeWatch(psutil.Process(process.pid))
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    watch.stop()
    if process.returncode:
        raise SystemExit(f"{row} failed with exit code {process.returncode}; its output is {log}")
    # wait4 counts the children that were waited for; a daemon's CPU time is seen only by the samples
    cpu = max(usage.ru_utime + usage.ru_stime, sum(watch.cpu_by_process.values()))
    share = share_rounded_once(folder / "merge", parents) if row.endswith("linear") else None
    shutil.rmtree(folder)
    return Measured(row, wall, cpu, watch.peak_rss, watch.peak_anonymous, share)


def command_of(row: str, parents: Path, folder: Path) -> Sequence[str]:
    """The command line of a row, its configuration written into `folder`; a merge goes to `folder/merge`."""
    if row.startswith("read-copy"):
        read, copied = (":".join(map(str, files(parents / who))) for who in ("cos", "fmt"))
        return [sys.executable, "-c", READ_AND_COPY, read, copied, str(folder), row.removeprefix("read-copy-")]
    config, merge = folder / "config.yaml", str(folder / "merge")
    if row.startswith("grid"):
        config.write_text(yaml.safe_dump(grid_job(parents, folder), sort_keys=False))
        return [str(MERGEYARD), "run", str(config), "--quiet", *(["--in-process"] if row == "grid-in-process" else [])]
    config.write_text(yaml.safe_dump(document(row.removeprefix("mergekit-"), parents), sort_keys=False))
    if row.startswith("mergekit-"):
        return [str(MERGEKIT), str(config), merge, "--quiet"]
    return [str(MERGEYARD), "merge", str(config), merge, "--quiet"]


def document(method: str, parents: Path) -> dict[str, object]:
    """The mergekit document of a row."""
    density = {"density": 0.5} if method == "ties" else {}
    models = [{"model": str(parents / who), "parameters": {"weight": w, **density}} for who, w in WEIGHTS.items()]
    base = {"base_model": str(parents / "base")} if method == "ties" else {}
    return {"merge_method": method, **base, "models": models, "dtype": "bfloat16"}


def grid_job(parents: Path, folder: Path) -> dict[str, object]:
    """A job of 16 linear points, all written, none evaluated."""
    models = [
        {"model": "cos", "parameters": {"weight": "${w}"}},
        {"model": "fmt", "parameters": {"weight": "${1 - w}"}},
    ]
    return {
        "name": "speed",
        "parents": {who: str(parents / who) for who in WEIGHTS},
        "recipe": {"merge_method": "linear", "models": models, "dtype": "bfloat16"},
        "grid": {"w": GRID},
        "keep": "all",
        "output": str(folder / "runs"),
    }


def share_rounded_once(merge: Path, parents: Path) -> float:
    """Of a sample of all elements of a linear merge, the share that is the float64 sum rounded once to bf16."""
    inputs = {who: dict(lazy(parents / who)) for who in WEIGHTS}
    stride = max(1, sum(path.stat().st_size for path in files(merge)) // 2 // SAMPLED_ELEMENTS)
    hits = seen = 0
    for name, tensor in lazy(merge):
        parts = {who: inputs[who][name].flatten()[::stride].double().numpy() for who in WEIGHTS}
        exact = sum(weight * parts[who] for who, weight in WEIGHTS.items())
        hits += int(correctly_rounded(tensor.flatten()[::stride], np.asarray(exact)).sum())
        seen += exact.size
    return hits / seen


def lazy(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a checkpoint, mapped from disk and read where they are touched."""
    for path in files(folder):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):  # a file is no dict
                yield name, file.get_tensor(name)


def warm(parents: Path) -> None:
    """Reads all parents once, so that the page cache holds them if it can."""
    buffer = bytearray(BLOCK)
    for who in ("base", *WEIGHTS):
        for path in files(parents / who):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order."""
    return sorted(folder.glob("*.safetensors"))


def line(measured: Measured) -> str:
    """A row of the table; memory in GiB."""
    share = "" if measured.correctly_rounded is None else f"{measured.correctly_rounded:.4%}"
    rss, anonymous = (f"{size / 2**30:.2f} GiB" for size in (measured.peak_rss, measured.peak_anonymous))
    times = f"{measured.wall_seconds:>8.1f} {measured.cpu_seconds:>8.1f}"
    return f"{measured.row:<16} {times} {rss:>10} {anonymous:>10} {share:>13}"


def _kilobytes(status: str, field: str) -> int:
    at = status.find(field)
    return int(status[at + len(field) :].split(maxsplit=1)[0]) * 1024 if at >= 0 else 0


if __name__ == "__main__":
    main()
