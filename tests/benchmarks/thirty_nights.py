"""Thirty nights of two parents that are trained on: is the one that forgets long contexts caught, and is any other?

    python -m tests.benchmarks.thirty_nights --nights 30 --planted 17

Every night both parents are the tiny ones of jobs/examples with a little noise of that night on every weight, which
changes answers but takes nothing away. In the planted night `long` is `base` instead: the fine-tune that had taught
1,024 tokens is lost, at 256 tokens all is well. Every fifth night no parent is new. The merge is 0.9 of `long` and 0.1
of `fmt`; its anchor is the `long` of the first day, which nobody trains on.

Real commands (`mergeyard nightly --in-process`), real models; a table on stdout, the page of trends in the folder.
Not covered: slow decay over many nights, for which the anchor is there (tests/orchestrator/nightly/test_tonight.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from orchestrator.cli import main as mergeyard

PARENTS = Path(__file__).parents[2] / "jobs" / "examples" / "parents"
NOISE = 0.03
"""Standard deviation of what a night adds to a weight, relative to the weight."""

JOB: dict[str, Any] = {
    "name": "soup",
    "recipe": {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "models": [{"model": "long", "parameters": {"weight": 0.9}}, {"model": "fmt", "parameters": {"weight": 0.1}}],
    },
    "point": "long0.9_fmt0.1",
    "evaluate": {"ruler": {"tasks": ["niah_single_1"], "lengths": [256, 1024], "items": 24}},
    "gate": {"baseline": "released", "margin": 15, "length_margin": 25, "budget": 72},
}


@dataclass(frozen=True, slots=True)
class Told:
    """What one call of `mergeyard nightly` said: its exit code, its facts, and how long it took."""

    night: int
    code: int
    facts: dict[str, Any]
    seconds: float


class NightlyFolder:
    """A folder with the parents of each night, and a nightly job over them; `job` changes keys of JOB."""

    def __init__(self, folder: Path, **job: Any) -> None:
        self.folder, self.job = folder, folder / "nightly.yaml"
        for name, of in (("long", "long"), ("fmt", "fmt"), ("released", "long")):
            shutil.copytree(PARENTS / of, folder / "parents" / name)
        parents = {name: str(folder / "parents" / name) for name in ("long", "fmt", "released")}
        keys = {**JOB, "parents": parents, "output": str(folder / "runs"), **job}
        self.job.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))

    @property
    def run(self) -> Path:
        """Where the nights lie."""
        return self.folder / "runs" / str(JOB["name"])

    def train(self, parent: str, night: int, *, of: str | None = None) -> None:
        """Leaves tonight's version of a parent: that of the examples, or `of`, with tonight's noise."""
        generator = torch.Generator().manual_seed(1000 * night + len(parent))
        weights = {
            name: (weight.float() * (1 + NOISE * torch.randn(weight.shape, generator=generator))).to(weight.dtype)
            for name, weight in load_file(PARENTS / (of or parent) / "model.safetensors").items()
        }
        save_file(weights, self.folder / "parents" / parent / "model.safetensors", metadata={"format": "pt"})

    def night(self, number: int, *options: str) -> Told:
        """Runs the command."""
        began, said = time.monotonic(), StringIO()
        with redirect_stdout(said):
            code = mergeyard(["nightly", str(self.job), "--in-process", "--json", *options])
        return Told(number, code, json.loads(said.getvalue()), time.monotonic() - began)

    def nights(self, count: int, planted: Collection[int], quiet: Collection[int]) -> Iterator[Told]:
        """So many nights; `long` is `base` in the planted ones, nothing is new in the quiet ones."""
        for number in range(1, count + 1):
            if number not in quiet:
                self.train("long", number, of="base" if number in planted else None)
                self.train("fmt", number)
            yield self.night(number)


def line(told: Told) -> str:
    """One line of the table."""
    night, blessed = told.facts["night"], told.facts["blessed"]
    where = f"{told.night:5}  {told.code:4}"
    if told.facts["ending"] == "unchanged":
        return f"{where}  unchanged {'':34}{blessed['night'] if blessed else '':15}{told.seconds:6.1f}"
    scores = "  ".join(f"{night['scores']['candidate'][length]['mean']:6.1f}" for length in ("256", "1024"))
    found = next(iter(night["verdicts"].values()))["lines"][0]["difference"]
    return (
        f"{where}  {night['outcome']:12}{scores}  {found:+8.1f}  {night['items']:6}  "
        f"{blessed['night'] if blessed else '':15}{told.seconds:6.1f}"
    )


def _main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--nights", type=int, default=30)
    options.add_argument("--planted", type=int, default=17, help="the night of the regression; 0 for none")
    options.add_argument("--folder", type=Path, help="where to leave it all; default: a temporary folder, removed")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        yard = NightlyFolder(asked.folder or Path(temporary))
        print("night  exit  outcome        256    1024  against   items  blessed        seconds")
        quiet = range(5, asked.nights + 1, 5)
        for told in yard.nights(asked.nights, {asked.planted}, quiet):
            print(line(told), flush=True)


if __name__ == "__main__":
    _main()
