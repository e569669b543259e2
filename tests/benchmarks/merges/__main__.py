"""Times merges beside mergekit and beside what their bytes cost anyway; writes one table and one plot.

    python -m tests.benchmarks.merges [--parameters 1.5B] [--rows 'linear,ties*'] [--repeat 3] [--work FOLDER]

Every row measures its contenders in turn, in processes of their own, with the parents in the page cache:

    floor       a plain loop: reads every parent but one, and copies this one; for a resident model, a copy of the
                model from memory to memory by two threads
    synced      the same floor, and waits until the disk has it, as mergeyard does
    mergeyard   `mergeyard merge`, or a grid of points; seconds are per point
    mergekit    mergekit 0.1.5 from .venv-mergekit on the same document; always one merge, written

Rows, of synthetic parents:

    METHOD           one merge, written
    METHOD-16        a grid of 16 points, all written
    METHOD-resident  linear and ties: 16 points into a resident model, none written
    METHOD-hashed    the same with the digest of every tensor, as an evaluation makes it for a new point
    document-FORM    slices, stages, a LoRA adapter: one merge, written
    moe              a mixture of three experts, routers by hidden states; without floors
    extract-lora     an adapter of rank 16, of all projections and the embeddings; without floors
    memory-N         ties: the memory of one worker that merges N points
    memory-7b-N      the same with the widths of a 7B model, of which two layers are made
    tiny             a merge of a tiny model, from the shell

A row is written to WORK/results.jsonl when it is complete, and skipped when it is there: run the same command again to
go on, or measure some rows now and others later. mergekit is not repeated once its runs took 100 s. At the end
WORK/table.md and WORK/merges.svg show all rows; `--publish` puts the results, plot and table into tests/benchmarks/.
Room on the disk: three parents and 16 points, 60 GB for 1.5B.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.benchmarks.make_checkpoints import SIZES, write_adapter, write_family
from tests.benchmarks.merges import copying, figures
from tests.benchmarks.merges.documents import FORMS, MIXTURE, RECIPES, document, filled, grid_job
from workers.methods import METHODS

ROOT = Path(__file__).parents[3]
MERGEKIT = ROOT / ".venv-mergekit" / "bin" / "mergekit-yaml"
MERGEYARD = Path(sys.executable).with_name("mergeyard")
POINTS = 16
MAKING = ("moe", "extract-lora")
ENOUGH_SECONDS = 100.0
"""mergekit's runs of one row together; after that it is not repeated."""


@dataclass(frozen=True)
class Sample:
    """One run: seconds, and the highest sum over the process tree of all resident and of anonymous memory, in bytes."""

    wall: float
    cpu: float
    rss: int
    anonymous: int

    def per_point(self, points: int) -> Sample:
        """The same with seconds per point."""
        return replace(self, wall=self.wall / points, cpu=self.cpu / points)


Contender = Callable[[Path], Sample]
"""Runs once in an empty folder."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `limit_bytes` is for rows of memory."""

    name: str
    parents: Path
    contenders: Mapping[str, Contender]
    points: int = 1
    limit_bytes: int | None = None


def main() -> None:
    """Measures the rows that are missing, and writes the table and the plot of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", default="1.5B", help=f"of {', '.join(SIZES)}; default 1.5B")
    parser.add_argument("--rows", default="*", help="comma-separated names, with * and ?; default: all")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contender; the table shows the middle one")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder on the disk to measure")
    parser.add_argument("--without-mergekit", action="store_true", help="leave the peer out")
    parser.add_argument("--publish", action="store_true", help="renew the table and plot in tests/benchmarks")
    options = parser.parse_args()
    size = options.parameters.lower()
    if size not in SIZES:
        parser.error(f"--parameters {options.parameters}: there are {', '.join(SIZES)}")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each contender compiles its libraries at every start
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results = work / "results.jsonl"
    every = rows(size, work)
    wanted = [row for row in every if any(fnmatch.fnmatch(row, each) for each in options.rows.split(","))]
    if not wanted:
        parser.error(f"--rows {options.rows}: there are {', '.join(every)}")
    for name in wanted:
        done = figures.read(results)
        if any(each["row"] == name and each["parameters"] == size for each in done):
            print(f"{name}: in {results}", flush=True)
            continue
        row, known = every[name](), peer_of(name, size, done)
        if name not in MAKING:
            for program, once in rows("tiny", work)[name]().contenders.items():
                if program == "mergeyard" or (program == "mergekit" and not options.without_mergekit and not known):
                    in_empty_folder(once, work / "scratch")  # compiles its code
        samples = measured(row, work / "scratch", options.repeat, without=options.without_mergekit or bool(known))
        result = described(row, size, {**samples, **({"mergekit": known} if known else {})})
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(figures.line(result), flush=True)
    found = figures.read(results)
    figures.write(found, work)
    if options.publish:
        figures.publish(found)


# ---------------------------------------------------------------- rows


def rows(size: str, work: Path) -> Mapping[str, Callable[[], Row]]:
    """Every row by name; making one makes its parents."""
    made: dict[str, Callable[[], Row]] = {}
    methods = [name for name in RECIPES if name in METHODS]
    for method in methods:
        made[method] = lambda method=method: written(method, method, family(work, size))
    for method in ("linear", "ties"):
        for program in ("resident", "hashed"):
            made[f"{method}-{program}"] = lambda method=method, program=program: resident(
                method, program, family(work, size)
            )
    for method in methods:
        if RECIPES[method].varied:
            made[f"{method}-{POINTS}"] = lambda method=method: grid(method, family(work, size))
    for points in (1, 64):
        made[f"memory-{points}"] = lambda points=points: memory(f"memory-{points}", points, family(work, size))
        made[f"memory-7b-{points}"] = lambda points=points: memory(
            f"memory-7b-{points}", points, family(work, "7b", layers=2)
        )
    for form in FORMS:
        made[f"document-{form}"] = lambda form=form: of_form(form, family(work, size))
    for program in MAKING:
        made[program] = lambda program=program: making(program, family(work, size))
    made["tiny"] = lambda: written("tiny", "linear", family(work, "tiny"))
    return made


def written(name: str, method: str, parents: Path) -> Row:
    """One merge of a method, by the command."""
    return Row(name, parents, {
        "floor": floor(RECIPES[method].parents, parents, 1, "plain"),
        "synced": floor(RECIPES[method].parents, parents, 1, "synced"),
        "mergeyard": merge(MERGEYARD, "merge", method, parents),
        "mergekit": merge(MERGEKIT, None, method, parents),
    })  # fmt: skip


def of_form(form: str, parents: Path) -> Row:
    """One merge of a document of several parts, by the command; its adapter is made at the first use."""
    adapter = parents / "adapter"
    if form == "lora" and not adapter.exists():
        write_adapter(parents / "cos", adapter)
    peer = [str(MERGEKIT), "{config}", "{folder}/merge", "--lora-merge-cache", "{folder}/lora"]
    if form == "stages":
        multi = str(MERGEKIT.with_name("mergekit-multi"))
        peer = [multi, "{config}", "-I", "{folder}/between", "--out-path", "{folder}/merge"]

    return Row(f"document-{form}", parents, {
        "floor": floor(FORMS[form].parents, parents, 1, "plain"),
        "synced": floor(FORMS[form].parents, parents, 1, "synced"),
        "mergeyard": command([str(MERGEYARD), "merge", "{config}", "{folder}/merge"], FORMS[form].text, parents),
        "mergekit": command(peer, FORMS[form].text, parents),
    })  # fmt: skip


def making(program: str, parents: Path) -> Row:
    """A mixture of experts, or an adapter."""
    arguments = ["{config}", "{folder}/made"]
    if program == "extract-lora":
        arguments = ["--model", f"{parents}/cos", "--base-model", f"{parents}/base", "--out-path", "{folder}/made"]
        arguments += ["--max-rank", "16"]
    peer = str(MERGEKIT.with_name(f"mergekit-{program}"))
    return Row(program, parents, {
        "mergeyard": command([str(MERGEYARD), program, *arguments], MIXTURE, parents),
        "mergekit": command([peer, *arguments], MIXTURE, parents),
    })  # fmt: skip


def command(words: Sequence[str], text: str, parents: Path) -> Contender:
    """A command with a document as its {config}."""

    def once(folder: Path) -> Sample:
        config = folder / "config.yaml"
        config.write_text(filled(text, parents))
        return run([*(word.format(config=config, folder=folder) for word in words), "--quiet"], folder)[0]

    return once


def resident(method: str, program: str, parents: Path) -> Row:
    """16 points of a method into a model in memory."""

    def mergeyard(folder: Path) -> Sample:
        return reported([program, str(job_file(method, parents, folder, POINTS))], folder)

    return Row(f"{method}-{program}", parents, {
        "floor": lambda folder: reported(["copy", str(parents / "cos")], folder),
        "mergeyard": mergeyard,
        "mergekit": merge(MERGEKIT, None, method, parents),
    }, POINTS)  # fmt: skip


def grid(method: str, parents: Path) -> Row:
    """16 points of a method, all written."""

    def mergeyard(folder: Path) -> Sample:
        job = job_file(method, parents, folder, POINTS)
        return run([str(MERGEYARD), "run", str(job), "--in-process", "--quiet"], folder)[0].per_point(POINTS)

    return Row(f"{method}-{POINTS}", parents, {
        "floor": floor(RECIPES[method].parents, parents, POINTS, "plain"),
        "synced": floor(RECIPES[method].parents, parents, POINTS, "synced"),
        "mergeyard": mergeyard,
        "mergekit": merge(MERGEKIT, None, method, parents),
    }, POINTS)  # fmt: skip


def memory(name: str, points: int, parents: Path) -> Row:
    """The memory of one worker that merges a ties grid; the limit is 1.5 GiB and the largest tensor of one parent."""

    def mergeyard(folder: Path) -> Sample:
        return reported(["task", str(job_file("ties", parents, folder, points))], folder).per_point(points)

    return Row(name, parents, {"mergeyard": mergeyard}, points, (3 << 29) + largest_tensor(parents))


def floor(names: Sequence[str], parents: Path, points: int, synced: str) -> Contender:
    """The least that a merge of these parents into so many points reads and writes."""
    *read, copied = (str(weights) for who in names for weights in weights_of(parents / who))
    return lambda folder: run(
        [sys.executable, copying.__file__, str(folder), str(points), synced, copied, *read], folder
    )[0].per_point(points)


def merge(program: Path, verb: str | None, method: str, parents: Path) -> Contender:
    """A merge of the method's document by mergeyard or mergekit."""

    def once(folder: Path) -> Sample:
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(document(method, parents), sort_keys=False))
        verbs = [verb] if verb else []
        return run([str(program), *verbs, str(config), str(folder / "merge"), "--quiet"], folder)[0]

    return once


def job_file(method: str, parents: Path, folder: Path, points: int) -> Path:
    """Writes the job of a grid; returns its path."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(grid_job(method, parents, folder / "runs", points), sort_keys=False))
    return path


# ---------------------------------------------------------------- parents


def family(work: Path, size: str, layers: int | None = None) -> Path:
    """base, cos and fmt of that size, made at the first use."""
    folder = work / f"parents-{size}{f'-{layers}-layers' if layers else ''}"
    if not folder.exists():
        print(f"making {folder}", flush=True)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_family(partial, replace(SIZES[size], layers=layers or SIZES[size].layers))
        partial.rename(folder)
    return folder


def largest_tensor(parents: Path) -> int:
    """Bytes of the largest tensor of one parent."""
    config = json.loads((parents / "base" / "config.json").read_text())
    return 2 * config["vocab_size"] * config["hidden_size"]


def weights_of(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order."""
    return sorted(folder.glob("*.safetensors"))


def warm(parents: Path) -> None:
    """Reads all parents once, so that the page cache holds them if it can."""
    for path in sorted(parents.glob("*/*.safetensors")):
        for _ in copying.blocks(path):
            pass


# ---------------------------------------------------------------- measuring


def measured(row: Row, scratch: Path, repeat: int, *, without: bool) -> dict[str, list[Sample]]:
    """The samples of each contender; they take turns, so that load from elsewhere meets them alike.

    The floor runs once before. A host takes free pages of a virtual machine back and gives new ones out twenty times as
    slowly as the machine's own: the first contender would wait for them, and the next ones have its memory.
    """
    contenders = {name: run for name, run in row.contenders.items() if name != "mergekit" or not without}
    if "mergekit" in contenders and not MERGEKIT.exists():
        raise SystemExit(f"{MERGEKIT} is missing: `make oracle` installs it, or give --without-mergekit")
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    if "floor" in contenders:
        in_empty_folder(contenders["floor"], scratch)
    for _ in range(repeat):
        for name, contender in contenders.items():
            if name == "mergekit" and sum(sample.wall for sample in samples[name]) > ENOUGH_SECONDS:
                continue
            warm(row.parents)
            samples[name].append(in_empty_folder(contender, scratch))
    return samples


def in_empty_folder(contender: Contender, scratch: Path) -> Sample:
    """One run, on a disk without waiting writes; its output is removed."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    os.sync()
    try:
        return contender(scratch)
    finally:
        shutil.rmtree(scratch)


def run(command: Sequence[str], folder: Path) -> tuple[Sample, str]:
    """Runs a command to its end; returns its sample and its output."""
    log = folder / "log"
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        watch = TreeWatch(psutil.Process(process.pid))
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    watch.stop()
    text = log.read_text(errors="replace")
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} … failed with exit code {process.returncode}:\n{text[-2000:]}")
    # wait4 counts the children that were waited for; a daemon's CPU time is seen only by the samples
    cpu = max(usage.ru_utime + usage.ru_stime, sum(watch.cpu_by_process.values()))
    return Sample(wall, cpu, watch.peak_rss, watch.peak_anonymous), text


def reported(arguments: Sequence[str], folder: Path) -> Sample:
    """Runs worker.py; the seconds are those that it prints."""
    sample, text = run([sys.executable, "-m", "tests.benchmarks.merges.worker", *arguments], folder)
    return replace(sample, **json.loads(text.splitlines()[-1]))


WATCH_SECONDS = 0.2
"""A look at all processes takes 2 ms of a core that a contender with a thread for each would use."""


class TreeWatch:
    """Follows a process and all that descend from it, until stopped."""

    def __init__(self, root: psutil.Process) -> None:
        self.root = root
        self.peak_rss = self.peak_anonymous = 0
        self.cpu_by_process: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more samples after this."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(WATCH_SECONDS):
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


def _kilobytes(status: str, field: str) -> int:
    at = status.find(field)
    return int(status[at + len(field) :].split(maxsplit=1)[0]) * 1024 if at >= 0 else 0


# ---------------------------------------------------------------- results


def peer_of(row: str, size: str, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """mergekit's samples of the same merge, if another row has them."""
    method = row if row.startswith("document-") else row.partition("-")[0]
    found = [
        each
        for each in results
        if method in (each["row"], each["row"].partition("-")[0]) and each["parameters"] == size
    ]
    return next((each["samples"]["mergekit"] for each in found if "mergekit" in each["samples"]), [])


def described(row: Row, size: str, samples: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """A line of results.jsonl."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "row": row.name,
        "parameters": size,
        "points": row.points,
        "limit_bytes": row.limit_bytes,
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "samples": {
            name: [each if isinstance(each, dict) else vars(each) for each in runs] for name, runs in samples.items()
        },
    }


if __name__ == "__main__":
    main()
