"""Runs on a cluster that things happen to: what each should come to, whether it did, and how soon it went on."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from tests.benchmarks.make_checkpoints import Size, shapes, split, write_shard, write_small_files
from tests.chaos.cluster import BUCKET, Cluster
from tests.end_to_end.command import Command, Ended
from tests.end_to_end.conftest import JOB, PARENTS, SHARDS
from workers.evaluating.scores import read_scores

TRY_AGAIN = 75
RUNS_AT_MOST = 6
POLL_SECONDS = 0.1
LOOK_SECONDS = 0.3
DISK_MEGABYTES = 40
POINTS, STEP = 11, 0.1


@dataclass(frozen=True)
class Work:
    """A job: what it is called, its text, how many shards it merges, and how fast the nodes' links are meanwhile."""

    name: str
    text: str
    points: int = 0
    shards: int = 0
    megabits: float = 10
    on_disk: bool = False

    @property
    def units(self) -> int:
        return self.points * self.shards


def _evaluation() -> str:
    lines: dict[str, Any] = {
        "name": "grid",
        "parents": {name: f"s3://{BUCKET}/parents/{name}" for name in ("long", "fmt")},
        "recipe": {
            "merge_method": "linear",
            "dtype": "bfloat16",
            "models": [
                {"model": "long", "parameters": {"weight": "${w}"}},
                {"model": "fmt", "parameters": {"weight": "${1 - w}"}},
            ],
        },
        "grid": {"w": [0.5, 0.7, 0.9, 1]},
        "point": "w{w}",
        "evaluate": {"ruler": {"tasks": ["niah_single_1"], "lengths": [256, 512], "items": 48}},
        "keep": "none",
        "workers": {"cpus": 1, "memory": "1200MB"},
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()) + "output: OUTPUT\n"


_MERGE = JOB.format(parents=f"s3://{BUCKET}/parents", workers="cpus: 1, memory: 2GB", step=STEP, output="OUTPUT")
MERGE = Work("grid", _MERGE, POINTS, SHARDS)
MERGE_TO_DISK = replace(MERGE, on_disk=True)
MERGE_IN_PARTS = Work(
    "grid of large shards",
    _MERGE.replace("/parents/", "/large/").replace("200KB", "21MB").replace("step: 0.1", "step: 1"),
    points=2,
    shards=2,
    megabits=80,
)
"""Two shards of each point, of more than 16 MiB: they are uploaded in parts."""

EVALUATION = Work("evaluation", _evaluation())
EVALUATED_ROWS = (4 + 1) * 2 * 48  # the points and a parent; the other parent is a point
LARGE = Size(layers=4, hidden=512, intermediate=2304, heads=4, kv_heads=4, vocabulary=2048, tied=True)


@dataclass(frozen=True)
class Later:
    """Something else that happens so many seconds after a fault, whether or not the run has ended."""

    seconds: float
    action: Callable[[], None]


@dataclass
class Trial:
    """One run that something happens to; `commands` are the calls of `mergeyard run` it took.

    It has recovered when the shards are there that were at hand when it was struck; an evaluation, with its next
    scores.
    """

    yard: FaultyCluster
    name: str
    work: Work
    job: Path
    output: str
    random: random.Random
    commands: list[Command] = field(default_factory=list[Command])
    struck_at: float = 0.0
    recovered_at: float | None = None
    ended_at: float = 0.0
    _at_hand: set[str] = field(default_factory=set[str])
    _before: int = 0

    @property
    def cluster(self) -> Cluster:
        return self.yard.cluster

    def start(self, machine: str = "head") -> Command:
        """Runs the job, from the beginning or on from where it was left."""
        self.commands.append(self.cluster.run(self.job, on=machine))
        return self.commands[-1]

    def receipts(self) -> list[str]:
        return self.keys("receipts/")

    def keys(self, prefix: str) -> list[str]:
        """What lies below a prefix of the run, by the rest of its key; nothing while the store does not answer."""
        if self.work.on_disk:
            folder = Path(self.output, "grid", prefix)
            files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
            return [str(path.relative_to(folder)) for path in files]
        with suppress(BotoCoreError, ClientError):
            return self.yard.keys(f"{self.name}/grid/{prefix}")
        return []

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        """What the condition says once it is true, while the command runs."""
        return self.commands[-1].until(condition, seconds)

    def strikes(self) -> None:
        """Notes that a fault strikes now, and what is at hand: the shards that come next, one a node."""
        self.struck_at, self.recovered_at = time.monotonic(), None
        names = [f"model-{number:05d}-of-{self.work.shards:05d}" for number in range(1, 1 + self.work.shards)]
        done = self._shards()
        open_ones = [name for name in names if sum(name in key for key in done) < self.work.points]
        self._at_hand = set(open_ones[: len(self.cluster.nodes)])
        self._before = len(self.keys("scores/"))

    def look(self) -> None:
        """Notes that the run has recovered, if it has."""
        if self.recovered_at is None and self._has_recovered():
            self.recovered_at = time.monotonic()

    def finish(self, later: Later | None = None) -> Ended:
        """Waits for the end, running the command again each time it says so or was killed, as its user would."""
        began = time.monotonic()
        looked = 0.0
        for _ in range(RUNS_AT_MOST):
            command = self.commands[-1]
            while command.process.poll() is None:
                if later is not None and time.monotonic() - began > later.seconds:
                    later.action()
                    later = None
                if time.monotonic() - looked > LOOK_SECONDS:
                    self.look()
                    looked = time.monotonic()
                if time.monotonic() - began > 400:
                    raise Wrong(f"still running after 400 s: {command.process.args}")
                time.sleep(POLL_SECONDS)
            ended = command.ended()
            if ended.code == 0:
                self.ended_at = time.monotonic()
                self.look()
                if later is not None:
                    time.sleep(max(0.0, later.seconds - (time.monotonic() - began)))
                    later.action()
                return ended
            if ended.code > 0 and (ended.code != TRY_AGAIN or len(ended.err.splitlines()) != 1):
                raise Wrong(f"exit code {ended.code}: {ended.err[-2000:]}")
            self.cluster.repair(["head"])
            self.start()
        raise Wrong(f"not whole after {RUNS_AT_MOST} calls")

    def _has_recovered(self) -> bool:
        if not self.work.shards:
            return len(self.keys("scores/")) > self._before
        done = self._shards()
        return all(sum(name in key for key in done) == self.work.points for name in self._at_hand)

    def _shards(self) -> list[str]:
        return [key for key in self.keys("points/") if key.endswith(".safetensors")]


class Wrong(Exception):
    """What no fault may bring about."""


class FaultyCluster:
    """A cluster, the parents in its store, and what every run has to come to."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.random = random.Random(seed)
        self._client = cluster.server.client()
        self._trials = 0
        self.expected = cache(self._alone)
        self._large_parents = cache(
            lambda: upload_synthetic(cluster, LARGE, {"long": "large/long", "fmt": "large/fmt"})
        )
        self._upload_parents()

    def trial(self, work: Work = MERGE) -> Trial:
        """A run that has not begun."""
        self._trials += 1
        name = f"trial{self._trials}"
        job = self.cluster.folder / f"{name}.yaml"
        output = f"s3://{BUCKET}/{name}" if not work.on_disk else str(self._disk() / name)
        job.write_text(work.text.replace("OUTPUT", output))
        self.cluster.limit(work.megabits)
        if "/large/" in work.text:
            self._large_parents()
        return Trial(self, name, work, job, output, random.Random(self.random.random()))

    def check(self, trial: Trial, ended: Ended) -> None:
        """Raises `Wrong` if anything is lost, doubled or other than it should be."""
        units = trial.work.units
        if units and len(trial.receipts()) != units:
            raise Wrong(f"{len(trial.receipts())} receipts of {units} units")
        if units and ended.facts["units_found"] + ended.facts["units_merged"] != units:
            raise Wrong(f"units lost or doubled: {ended.facts}")
        found, expected = self._outcome(trial, ended), self.expected(replace(trial.work, on_disk=False))
        if found.keys() != expected.keys():
            raise Wrong(f"lost or doubled: {sorted(found.keys() ^ expected.keys())}")
        if different := [key for key in found if found[key] != expected[key]]:
            raise Wrong(f"other than of an undisturbed run: {different}")

    def keys(self, prefix: str) -> list[str]:
        """The rest of every key below a prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", ())]

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix, by the rest of its key."""
        return {
            key: self._client.get_object(Bucket=BUCKET, Key=prefix + key)["Body"].read() for key in self.keys(prefix)
        }

    def close(self) -> None:
        """Gives back the small disk."""
        subprocess.run(["umount", "-l", self.cluster.folder / "disk"], capture_output=True, check=False)

    def _alone(self, work: Work) -> dict[str, Any]:
        """What the work comes to in one process."""
        trial = self.trial(work)
        ended = self.cluster.command("run", trial.job, "--in-process", "--json").ended()
        outcome = self._outcome(trial, ended)
        assert ended.facts["units_merged"] == work.units if work.units else len(outcome) > EVALUATED_ROWS
        return outcome

    def _outcome(self, trial: Trial, ended: Ended) -> dict[str, Any]:
        """Every object of every point; of an evaluation, its rows, but for how long each took, and the leaderboard."""
        if trial.work.on_disk:
            folder = Path(trial.output, "grid", "points")
            return {key: (folder / key).read_bytes() for key in trial.keys("points/")}
        if trial.work.shards:
            return self.objects(f"{trial.name}/grid/points/")
        key = ended.facts["results"].removeprefix(f"s3://{BUCKET}/")
        [file] = self.objects(key).values()
        rows = [replace(row, seconds=0.0) for row in read_scores(file, key)]
        return {**{f"row {number}": row for number, row in enumerate(rows)}, "board": ended.facts["leaderboard"]}

    def _upload_parents(self) -> None:
        """The example's parents as points of an earlier run, whose manifests have their tensors' digests."""
        made = self.cluster.folder / "parents.yaml"
        job = JOB.format(parents=PARENTS, workers="cpus: 1, memory: 2GB", step=STEP, output=f"s3://{BUCKET}/made")
        made.write_text(job.replace("{from: 0, to: 1, step: 0.1}", "[0, 1]").replace("200KB", "1GB"))
        assert self.cluster.command("run", made, "--in-process", "--json").ended().facts["units_merged"] == 2
        for name, point in (("long", "long1_fmt0"), ("fmt", "long0_fmt1")):
            for key, content in self.objects(f"made/grid/points/{point}/").items():
                self._client.put_object(Bucket=BUCKET, Key=f"parents/{name}/{key}", Body=content)

    def _disk(self) -> Path:
        """A disk of its own that is soon full."""
        disk = self.cluster.folder / "disk"
        if not disk.is_mount():
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", disk], check=True)
        return disk


def upload_synthetic(cluster: Cluster, size: Size, prefixes: dict[str, str]) -> int:
    """Writes two synthetic checkpoints and puts each below its prefix in the bucket; the bytes of one's weights."""
    folders = {who: cluster.folder / "synthetic" / who for who in ("base", *prefixes)}
    for folder in folders.values():
        folder.mkdir(parents=True)
        write_small_files(folder, size)
    [tensors] = split(list(shapes(size)), 10**12)
    write_shard({who: folder / "model.safetensors" for who, folder in folders.items()}, tensors, 0.001)
    for who, prefix in prefixes.items():
        for path in folders[who].iterdir():
            cluster.server.client().upload_file(str(path), BUCKET, f"{prefix}/{path.name}")
    return (folders["base"] / "model.safetensors").stat().st_size
