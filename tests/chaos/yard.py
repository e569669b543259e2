"""A grid on a cluster that things happen to: what it should come to, and whether it did."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.cluster import BUCKET, Cluster
from tests.end_to_end.command import Command, Ended
from tests.end_to_end.conftest import JOB, PARENTS, UNITS

TRY_AGAIN = 75
RUNS_AT_MOST = 6
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Later:
    """Something else that happens so many seconds after a fault, whether or not the run has ended."""

    seconds: float
    action: Callable[[], None]


@dataclass
class Trial:
    """One run that something happens to; `commands` are the calls of `mergeyard run` it took."""

    yard: Yard
    name: str
    job: Path
    random: random.Random
    commands: list[Command] = field(default_factory=list[Command])

    @property
    def cluster(self) -> Cluster:
        return self.yard.cluster

    @property
    def prefix(self) -> str:
        """Of the run's keys in the bucket."""
        return f"{self.name}/grid/"

    def start(self) -> Command:
        """Runs the job, from the beginning or on from where it was left."""
        self.commands.append(self.cluster.run(self.job))
        return self.commands[-1]

    def receipts(self) -> list[str]:
        return self.yard.keys(f"{self.prefix}receipts/")

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        """What the condition says once it is true, while the command runs."""
        return self.commands[-1].until(condition, seconds)

    def finish(self, later: Later | None = None) -> Ended:
        """Waits for the end, running the command again each time it says so or was killed, as its user would."""
        began = time.monotonic()
        for _ in range(RUNS_AT_MOST):
            command = self.commands[-1]
            while command.process.poll() is None:
                if later is not None and time.monotonic() - began > later.seconds:
                    later.action()
                    later = None
                if time.monotonic() - began > 400:
                    raise Wrong(f"still running after 400 s: {command.process.args}")
                time.sleep(POLL_SECONDS)
            ended = command.ended()
            if ended.code == 0:
                self.ended_at = time.monotonic()
                if later is not None:
                    time.sleep(max(0.0, later.seconds - (time.monotonic() - began)))
                    later.action()
                return ended
            if ended.code > 0 and (ended.code != TRY_AGAIN or len(ended.err.splitlines()) != 1):
                raise Wrong(f"exit code {ended.code}: {ended.err[-2000:]}")
            self.cluster.repair(["head"])
            self.start()
        raise Wrong(f"not whole after {RUNS_AT_MOST} calls")


class Wrong(Exception):
    """What no fault may bring about."""


class Yard:
    """A cluster, the parents in its store, and what every run of the grid has to come to."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.random = random.Random(seed)
        self._client = cluster.server.client()
        self._trials = 0
        for file in sorted(PARENTS.glob("*/*")):
            self._client.upload_file(str(file), BUCKET, f"parents/{file.parent.name}/{file.name}")
        alone = self.trial()
        ended = cluster.command("run", alone.job, "--in-process", "--json").ended()
        assert ended.facts["units_merged"] == UNITS
        self.expected = self.objects(f"{alone.prefix}points/")

    def trial(self) -> Trial:
        """A run that has not begun."""
        self._trials += 1
        name = f"trial{self._trials}"
        job = self.cluster.folder / f"{name}.yaml"
        workers = "cpus: 1, memory: 2GB"
        job.write_text(JOB.format(parents=f"s3://{BUCKET}/parents", workers=workers, output=f"s3://{BUCKET}/{name}"))
        return Trial(self, name, job, random.Random(self.random.random()))

    def check(self, trial: Trial, ended: Ended) -> None:
        """Raises `Wrong` if anything is lost, doubled or other than it should be."""
        facts = json.loads(ended.out)
        if facts["units_found"] + facts["units_merged"] != UNITS or len(trial.receipts()) != UNITS:
            raise Wrong(f"{len(trial.receipts())} receipts of {UNITS} units; {facts}")
        found = self.objects(f"{trial.prefix}points/")
        if found.keys() != self.expected.keys():
            raise Wrong(f"objects lost or doubled: {sorted(found.keys() ^ self.expected.keys())}")
        if different := [key for key in found if found[key] != self.expected[key]]:
            raise Wrong(f"other bytes than of an undisturbed run: {different}")

    def keys(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix, by the rest of its key."""
        return {
            key.removeprefix(prefix): self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            for key in self.keys(prefix)
        }
