"""Merges a grid on 1, 2 and 4 nodes whose links are the bottleneck, and says how the throughput grows.

    python -m tests.benchmarks.nodes [--nodes 1,2,4] [--megabits 24] [--points 12]

Each node is a Ray of one CPU in a network namespace, its link to the S3 server (SeaweedFS) limited to so many megabits
a second, each way. What moved is read off the interfaces of the nodes: headers of packets and repeated requests count.
`while all work` is the rate from when every node writes until the first has written its last; `whole` is all that was
written from the first byte on, with the start of the workers and the last shards at the end. Needs root on Linux.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.make_checkpoints import Size, shapes, split, write_shard, write_small_files
from tests.chaos.cluster import BUCKET, Cluster
from tests.chaos.network import Network, why_not

SIZE = Size(layers=15, hidden=256, intermediate=1024, heads=4, kv_heads=1, vocabulary=2048, tied=True)
SHARD = "2MB"  # a layer: sixteen shards, and so sixteen tasks for any number of nodes
SAMPLE_SECONDS = 0.2
STARTED_BYTES = 300_000

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


@dataclass(frozen=True)
class Sample:
    """When, and how much every node had received and sent by then."""

    second: float
    received: tuple[int, ...]
    sent: tuple[int, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="1,2,4")
    parser.add_argument("--megabits", type=float, default=24)
    parser.add_argument("--points", default="12", help="numbers of points; all but the last on the most nodes alone")
    options = parser.parse_args()
    if reason := why_not():
        print(f"nodes: {reason}", file=sys.stderr)
        return 1
    counts = sorted(int(count) for count in options.nodes.split(","))
    *others, points = [int(number) for number in options.points.split(",")]
    names = [f"node{number}" for number in range(1, counts[-1] + 1)]
    with Network(["head", "store", *names]) as network:
        cluster = Cluster(network, 0, direct=True)
        parent_bytes = _upload_parents(cluster)
        cluster.start()
        print(f"two parents of {parent_bytes / 1e6:.1f} MB; {options.megabits:g} Mbit/s a node, each way\n")
        print("| nodes | points | written, MB | read, MB | while all work, MB/s | × | whole, MB/s | × |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        first: tuple[float, float] | None = None
        for count in counts:
            _grow(cluster, names[:count], options.megabits)
            for number in (*(others if count == counts[-1] else ()), points):
                samples = _measure(cluster, f"n{count}p{number}", number)
                together, whole = _rates(samples)
                first = first or (together, whole)
                read, written = (sum(end) - sum(begin) for begin, end in _ends(samples))
                print(
                    f"| {count} | {number} | {written / 1e6:.0f} | {read / 1e6:.1f} |"
                    f" {together / 1e6:.2f} | {together / first[0]:.2f} | {whole / 1e6:.2f} | {whole / first[1]:.2f} |",
                    flush=True,
                )
    return 0


def _upload_parents(cluster: Cluster) -> int:
    """Writes two synthetic checkpoints and puts them into the bucket; the bytes of one's weights."""
    folders = {who: cluster.folder / who for who in ("base", "cos", "fmt")}
    for folder in folders.values():
        folder.mkdir()
        write_small_files(folder, SIZE)
    [tensors] = split(list(shapes(SIZE)), 10**12)
    write_shard({who: folder / "model.safetensors" for who, folder in folders.items()}, tensors, 0.001)
    for who in ("cos", "fmt"):
        for path in folders[who].iterdir():
            cluster.server.client().upload_file(str(path), BUCKET, f"{who}/{path.name}")
    return (folders["cos"] / "model.safetensors").stat().st_size


def _grow(cluster: Cluster, names: list[str], megabits: float) -> None:
    """Adds the nodes that are not there yet."""
    for name in names:
        if name not in cluster.nodes:
            cluster.begin(name)
            cluster.wait_for(name)
            cluster.network.limit(name, megabits)
            cluster.nodes.append(name)


def _measure(cluster: Cluster, name: str, points: int) -> list[Sample]:
    """Runs the grid; what had moved, every fifth of a second."""
    job = Path(cluster.folder, f"{name}.yaml")
    job.write_text(JOB.format(bucket=BUCKET, points=points, shard=SHARD, name=name))
    command = cluster.run(job)
    samples = [_sample(cluster)]
    while command.process.poll() is None:
        time.sleep(SAMPLE_SECONDS)
        samples.append(_sample(cluster))
    facts = command.ended().facts
    assert facts["units_merged"] == 16 * points, facts
    return samples


def _sample(cluster: Cluster) -> Sample:
    moved = [cluster.network.moved(node) for node in cluster.nodes]
    return Sample(time.monotonic(), tuple(received for received, _ in moved), tuple(sent for _, sent in moved))


def _ends(samples: list[Sample]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """First and last of what was received, and of what was sent."""
    return (samples[0].received, samples[-1].received), (samples[0].sent, samples[-1].sent)


def _rates(samples: list[Sample]) -> tuple[float, float]:
    """Bytes sent a second while all nodes were at it, and from the first byte of a shard to the last."""
    before, after = samples[0].sent, samples[-1].sent
    begun = [now - start > STARTED_BYTES for sample in samples for now, start in zip(sample.sent, before, strict=True)]
    width = len(before)
    any_begun = next(i for i in range(len(samples)) if any(begun[i * width : (i + 1) * width]))
    all_begun = next(i for i in range(len(samples)) if all(begun[i * width : (i + 1) * width]))
    ended = [
        any(end - now < STARTED_BYTES for now, end in zip(sample.sent, after, strict=True)) for sample in samples
    ].index(True)
    all_ended = [
        all(end - now < STARTED_BYTES for now, end in zip(sample.sent, after, strict=True)) for sample in samples
    ].index(True)
    return _rate(samples[all_begun], samples[ended]), _rate(samples[any_begun], samples[all_ended])


def _rate(begin: Sample, end: Sample) -> float:
    return (sum(end.sent) - sum(begin.sent)) / (end.second - begin.second)


if __name__ == "__main__":
    raise SystemExit(main())
