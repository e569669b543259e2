"""Sets of items for a job, built once and stored under a digest of all their inputs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from jobs.errors import BadInput, CorruptData, ObjectExists
from jobs.evaluation_tasks import ItemSet
from workers.benchmarks.planned import PlannedSet, located
from workers.storage import Store
from workers.storage.records import read_sealed

LM_EVAL_TOKENS = 1 << 20
"""The assumed cost of a whole task of lm-evaluation-harness, so that it starts early."""

PART_NAME = re.compile(r"(?P<first>\d{6,})-(?P<last>\d{6,})\.(json|parquet)")
READS_AT_ONCE = 8
PART_ITEMS = 64
PART_TOKENS = 1 << 24
"""A set is built and written in parts of so many items and, for the builder's memory, of so many tokens at most."""


def check_sets(sets: Iterable[PlannedSet]) -> None:
    """Refuses, with file and line, sets that could not be built: a minute later, or once everything is merged.

    Tried are the least length of each task, and the least from 4,096 on, where `cwe` has a longer list.
    """
    of_task: dict[tuple[str, str], list[PlannedSet]] = {}
    for planned in sorted(sets, key=lambda planned: planned.length):
        of_task.setdefault((planned.benchmark, planned.task), []).append(planned)
    for first, *others in of_task.values():
        longer = [planned for planned in others if first.length < 4096 <= planned.length]
        for planned in [first, *longer[:1]]:
            with located(planned.place):
                planned.check()


Part = tuple[int, int, str]
"""A file of a set: first item, one after the last, key."""


def stored(planned: PlannedSet, store: Store, count: int | None = None, trusted: Collection[Part] = ()) -> ItemSet:
    """The set in the store, with `count` items or, without it, as many as are planned.

    Builds the missing items, and those in damaged files; `trusted` files were written or read by the caller.
    `BadInput` if an earlier version made other items for this run.
    """
    wanted = range(planned.made if count is None or not planned.grows else count)
    found = _parts(planned, store)
    if not found and any(_parts(replace(planned, digest=earlier), store) for earlier in planned.superseded):
        raise BadInput(
            f"{planned.place}: this run asked {planned.task} at {planned.length} tokens in the words of an earlier"
            " mergeyard; finish it with that version, or give the job another `name:`"
        )
    parts = _whole(found, store, trusted)
    for missing in [part for gap in _missing(wanted, parts) for part in _cut(planned, gap)]:
        key = planned.key(missing.start, missing.stop)
        with located(planned.place):
            data = planned.build(missing)
        with suppress(ObjectExists):  # another driver built the same bytes
            store.write(key, data, mode="create")
        parts.append((missing.start, missing.stop, key))
    return ItemSet(
        benchmark=planned.benchmark,
        task=planned.task,
        length=planned.length,
        share=planned.share,
        digest=planned.digest,
        parts=tuple(sorted(parts)),
        tokens=planned.tokens or LM_EVAL_TOKENS,
        generation=planned.generation,
    )


def _whole(parts: Sequence[Part], store: Store, trusted: Collection[Part]) -> list[Part]:
    """Those of the files that are not damaged; the others are removed."""

    def is_whole(part: Part) -> bool:
        if part in trusted:
            return True
        try:
            read_sealed(store, part[2])
            return True
        except CorruptData:
            store.delete(part[2])
            return False

    with ThreadPoolExecutor(READS_AT_ONCE, "items") as pool:
        return [part for part, whole in zip(parts, pool.map(is_whole, parts), strict=True) if whole]


def _parts(planned: PlannedSet, store: Store) -> list[Part]:
    """The set's files in the store: first item, one after the last, key."""
    names = ((PART_NAME.fullmatch(info.key.rpartition("/")[2]), info.key) for info in store.list(planned.folder))
    # a folder that people look into gets files of other kinds
    return [(int(name["first"]), int(name["last"]), key) for name, key in names if name is not None]


def _cut(planned: PlannedSet, gap: range) -> list[range]:
    """The gap in parts that are built at once, of whole haystacks; a set that does not grow is one part."""
    if not planned.grows:
        return [gap]
    most = min(PART_ITEMS, PART_TOKENS // planned.length)
    step = max(1, most // planned.share) * planned.share
    return [gap[at : at + step] for at in range(0, len(gap), step)]


def _missing(wanted: range, parts: Sequence[Part]) -> list[range]:
    """The stretches of `wanted` that no part has."""
    gaps: list[range] = []
    at = wanted.start
    for first, last, _ in sorted(parts):
        if first > at:
            gaps.append(range(at, min(first, wanted.stop)))
        at = max(at, last)
        if at >= wanted.stop:
            return gaps
    return [*gaps, range(at, wanted.stop)]
