"""Merges and evaluates a grid on 1, 2 and 4 nodes whose links are the bottleneck, and says how the throughput grows.

    python -m tests.benchmarks.nodes [--nodes 1,2,4] [--megabits 24] [--points 4,12]

Each node is a Ray of one CPU in a network namespace, its link to the S3 server (SeaweedFS) limited to so many megabits
a second, each way. What moved is read off the interfaces of the nodes: headers of packets and repeated requests count.

Of a merge, `steady` is the rate of writing from when every node writes until the first has written its last; `whole`
is all that was written from the first byte on, with the start of the workers and the last shards at the end.

Of an evaluation that writes no point, all that the network has to carry is the parents, to each node once. `steady` is
the rate of reading from when every node reads them until the first has them; `whole` is from the first byte until all
have them. How fast items are answered is not shown: the nodes here share the processors of one computer, so that four
answer no faster than two, whatever the network does.

Exit code 1 if a steady rate is below 0.9 times that of the fewest nodes times how many more there are, or if more
points make a node read more of a parent, by a twentieth. Needs root on Linux.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.make_checkpoints import Size
from tests.chaos.cluster import BUCKET, Cluster
from tests.chaos.faulty_cluster import upload_synthetic
from tests.chaos.network import Network, why_not

SIZE = Size(layers=15, hidden=256, intermediate=1024, heads=4, kv_heads=1, vocabulary=2048, tied=True)
SHARD = "2MB"  # a layer: sixteen shards, and so sixteen tasks for any number of nodes
SHARDS = 16
SAMPLE_SECONDS = 0.2
STARTED_BYTES = 300_000
LINEAR = 0.9
MORE_READ = 1.05

JOB = """\
name: grid
parents: {{cos: s3://{bucket}/cos, fmt: s3://{bucket}/fmt}}
recipe:
  merge_method: linear
  models:
    - {{model: cos, parameters: {{weight: "${{w}}"}}}}
    - {{model: fmt, parameters: {{weight: "${{1 - w}}"}}}}
  dtype: bfloat16
grid: {{w: {{from: 0.1, to: 0.9, num: {points}}}}}
point: "w{{w}}"
workers: {{cpus: 1, memory: 2GB}}
shard_size: {shard}
output: s3://{bucket}/{name}
"""
EVALUATE = """\
evaluate: {{ruler: {{tasks: [niah_single_1], lengths: [256], items: 4}}}}
keep: none
"""


@dataclass(frozen=True)
class Sample:
    """When, and how much every node had received and sent by then."""

    second: float
    received: tuple[int, ...]
    sent: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """One run: MB a second while all nodes were at it, and from the first byte to the last; MB that moved in all.

    `steady` is not a number where a node came too late to have a part in it.
    """

    work: str
    nodes: int
    points: int
    steady: float
    whole: float
    read: float
    written: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="1,2,4")
    parser.add_argument("--megabits", type=float, default=24)
    parser.add_argument("--points", default="4,12", help="numbers of points; all but the last on the most nodes alone")
    options = parser.parse_args()
    if reason := why_not():
        print(f"nodes: {reason}", file=sys.stderr)
        return 1
    counts = sorted(int(count) for count in options.nodes.split(","))
    *others, points = [int(number) for number in options.points.split(",")]
    names = [f"node{number}" for number in range(1, counts[-1] + 1)]
    runs = [*((count, points) for count in counts), *((counts[-1], number) for number in others)]
    with Network(["head", "store", *names]) as network:
        cluster = Cluster(network, 0, direct=True)
        parent_bytes = upload_synthetic(cluster, SIZE, {"cos": "cos", "fmt": "fmt"})
        cluster.start()
        print(f"two parents of {parent_bytes / 1e6:.1f} MB; {options.megabits:g} Mbit/s a node, each way\n")
        print("| | nodes | points | written, MB | read, MB | steady, MB/s | × | whole, MB/s | × |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        measured: list[Measured] = []
        for count, number in runs:
            _grow(cluster, names[:count], options.megabits)
            for run in (_merge(cluster, number), _evaluate(cluster, number, 2 * parent_bytes)):
                measured.append(run)
                _tell(run, next(other for other in measured if other.work == run.work))
    wrong = [reason for run in measured for reason in _what_is_wrong(run, points, measured)]
    for reason in wrong:
        print(reason, file=sys.stderr)
    return 1 if wrong else 0


def _tell(run: Measured, first: Measured) -> None:
    """Prints a line of the table."""
    steady, whole = run.steady / first.steady, run.whole / first.whole
    print(
        f"| {run.work} | {run.nodes} | {run.points} | {run.written:.0f} | {run.read:.1f} |"
        f" {run.steady:.2f} | {steady:.2f} | {run.whole:.2f} | {whole:.2f} |",
        flush=True,
    )


def _what_is_wrong(run: Measured, points: int, measured: list[Measured]) -> Iterator[str]:
    """Where the rate does not grow with the nodes, or what is read grows with the points."""
    alike = [other for other in measured if other.work == run.work]
    linear = alike[0].steady * run.nodes / alike[0].nodes
    if run.points == points and not run.steady >= LINEAR * linear:
        yield f"nodes: {run.work} on {run.nodes} nodes at {run.steady:.2f} MB/s, not {linear:.2f}"
    fewest = min(other.read for other in alike if other.nodes == run.nodes)
    if run.read > MORE_READ * fewest:
        yield f"nodes: {run.work} on {run.nodes} nodes, {run.points} points: {run.read:.1f} MB read, not {fewest:.1f}"


def _grow(cluster: Cluster, names: list[str], megabits: float) -> None:
    """Adds the nodes that are not there yet."""
    for name in names:
        if name not in cluster.nodes:
            cluster.begin(name)
            cluster.wait_for(name)
            cluster.network.limit(name, megabits)
            cluster.nodes.append(name)


def _merge(cluster: Cluster, points: int) -> Measured:
    """A grid merged and written."""
    samples, facts = _watch(cluster, "merged", JOB, points)
    assert facts["units_merged"] == SHARDS * points, facts
    sent = [sample.sent for sample in samples]
    begun = [[now - start > STARTED_BYTES for now, start in zip(row, sent[0], strict=True)] for row in sent]
    ended = [[end - now < STARTED_BYTES for now, end in zip(row, sent[-1], strict=True)] for row in sent]
    return _measured("merged", points, samples, sent, begun, ended)


def _evaluate(cluster: Cluster, points: int, needed: int) -> Measured:
    """A grid evaluated and not written, of which every node needs so many bytes of parents."""
    samples, facts = _watch(cluster, "evaluated", JOB + EVALUATE, points)
    assert len(facts["leaderboard"]) >= points, facts
    received = [sample.received for sample in samples]
    begun = [[now - start > STARTED_BYTES for now, start in zip(row, received[0], strict=True)] for row in received]
    ended = [[now - start > needed for now, start in zip(row, received[0], strict=True)] for row in received]
    return _measured("evaluated", points, samples, received, begun, ended)


def _measured(
    work: str,
    points: int,
    samples: list[Sample],
    moved: list[tuple[int, ...]],
    begun: list[list[bool]],
    ended: list[list[bool]],
) -> Measured:
    """The rates at which this moved, by which nodes had begun and which had ended at each sample."""

    def rate(first: int, last: int) -> float:
        if first >= last:
            return math.nan
        return (sum(moved[last]) - sum(moved[first])) / (samples[last].second - samples[first].second) / 1e6

    def at(nodes: list[list[bool]], how_many: Callable[[Iterable[bool]], bool]) -> int:
        return next((number for number, row in enumerate(nodes) if how_many(row)), len(nodes) - 1)

    return Measured(
        work,
        len(moved[0]),
        points,
        steady=rate(at(begun, all), at(ended, any)),
        whole=rate(at(begun, any), at(ended, all)),
        read=(sum(samples[-1].received) - sum(samples[0].received)) / 1e6,
        written=(sum(samples[-1].sent) - sum(samples[0].sent)) / 1e6,
    )


def _watch(cluster: Cluster, work: str, text: str, points: int) -> tuple[list[Sample], dict[str, Any]]:
    """Runs the job; what had moved, every fifth of a second, and what the run said."""
    name = f"{work}-{len(cluster.nodes)}-{points}"
    job = Path(cluster.folder, f"{name}.yaml")
    job.write_text(text.format(bucket=BUCKET, points=points, shard=SHARD, name=name))
    command = cluster.run(job)
    samples = [_sample(cluster)]
    while command.process.poll() is None:
        time.sleep(SAMPLE_SECONDS)
        samples.append(_sample(cluster))
    return samples, command.ended().facts


def _sample(cluster: Cluster) -> Sample:
    moved = [cluster.network.moved(node) for node in cluster.nodes]
    return Sample(time.monotonic(), tuple(received for received, _ in moved), tuple(sent for _, sent in moved))


if __name__ == "__main__":
    raise SystemExit(main())
