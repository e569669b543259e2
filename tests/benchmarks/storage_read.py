"""How fast the stores read, each beside what it is made of, in one run on one machine.

    python -m tests.benchmarks.storage_read [--mebibytes 512] [--rounds 5]

S3: `read_into` and `read` of a SeaweedFS object against plain obstore `get_range` calls with the same ranges and the
same number at once (promise: at least 80 %); `read` makes its own memory, so it is set beside ranges that are joined.
Local: `read_into` against `readinto` of an unbuffered file. The middle of the rounds is reported; the contenders take
turns, so that load from elsewhere meets them alike.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
from obstore.store import S3Store
from typing_extensions import Buffer

from tests.seaweedfs import SeaweedFS
from workers.storage import Store, open_store
from workers.storage.ranges import RANGE_BYTES, RANGES_AT_ONCE

MIB = 1 << 20


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--mebibytes", type=int, default=512)
    arguments.add_argument("--rounds", type=int, default=5)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare_s3(Path(folder), chosen.mebibytes * MIB, chosen.rounds)
        compare_local(Path(folder), chosen.mebibytes * MIB, chosen.rounds)


def compare_s3(folder: Path, size: int, rounds: int) -> None:
    server = SeaweedFS(folder / "seaweedfs")
    server.start()
    try:
        server.client().create_bucket(Bucket="bench")
        os.environ.update(
            AWS_ENDPOINT_URL=server.endpoint,
            AWS_ACCESS_KEY_ID=server.access_key,
            AWS_SECRET_ACCESS_KEY=server.secret_key,
            AWS_DEFAULT_REGION="us-east-1",
        )
        store = open_store("s3://bench")
        etag = fill(store, size)
        raw = S3Store(
            "bench",
            endpoint=server.endpoint,
            access_key_id=server.access_key,
            secret_access_key=server.secret_key,
            region="us-east-1",
            client_options={"allow_http": True},
        )
        buffer = memoryview(bytearray(size))
        pool = ThreadPoolExecutor(RANGES_AT_ONCE)

        def raw_range(start: int) -> Buffer:
            return obstore.get_range(raw, "parent", start=start, end=min(start + RANGE_BYTES, size))

        def raw_length(start: int) -> int:
            return len(memoryview(raw_range(start)))

        starts = range(0, size, RANGE_BYTES)
        report(
            "S3, memory reused",
            size,
            rounds,
            {
                "raw get_range, dropped": lambda: list(pool.map(raw_length, starts)),
                "read_into": lambda: store.read_into("parent", buffer, etag=etag),
            },
        )
        report(
            "S3, fresh memory",
            size,
            rounds,
            {
                "raw get_range, joined": lambda: b"".join(pool.map(raw_range, starts)),
                "read": lambda: store.read("parent", length=size, etag=etag),
            },
        )
    finally:
        server.kill()


def compare_local(folder: Path, size: int, rounds: int) -> None:
    store = open_store(folder / "local")
    etag = fill(store, size)
    buffer = memoryview(bytearray(size))

    def plain() -> None:
        with (folder / "local" / "parent").open("rb", buffering=0) as file:
            assert file.readinto(buffer) == size

    report(
        "local",
        size,
        rounds,
        {"plain readinto": plain, "read_into": lambda: store.read_into("parent", buffer, etag=etag)},
    )


def fill(store: Store, size: int) -> str:
    """Write the object; its ETag."""
    block = random.Random(1).randbytes(8 * MIB)
    with store.upload("parent") as upload:
        for start in range(0, size, len(block)):
            upload.write(block[: size - start])
        return upload.commit().etag


def report(place: str, size: int, rounds: int, contenders: dict[str, Callable[[], object]]) -> None:
    """Print GB/s of each contender and its share of the first one's."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: size / statistics.median(times) / 1e9 for name, times in seconds.items()}
    first = next(iter(rates.values()))
    for name, rate in rates.items():
        print(f"{place:18} {name:24} {rate:6.2f} GB/s  {100 * rate / first:4.0f} %")


if __name__ == "__main__":
    main()
