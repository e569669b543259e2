"""The files of scores in a run, and the requests that they answer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from jobs.errors import CorruptData
from jobs.evaluation_tasks import BlockScores, ScoreRow
from orchestrator.evaluating.subjects import Subject
from orchestrator.judging.samples import Cell
from workers.benchmarks.planned import PlannedSet
from workers.evaluating.scores import read_block
from workers.storage import Store
from workers.storage.records import read_sealed

BLOCK_KEY = re.compile(r"(?P<prefix>.+)-(?P<first>\d{6,})-(?P<last>\d{6,})\.parquet")

READS_AT_ONCE = 32


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Items of one cell that a subject is to answer; `repeat` > 0 asks again."""

    subject: Subject
    cell: Cell
    items: range
    repeat: int = 0


class Blocks:
    """The files of scores: which items each has, and the rows that were wanted in this session.

    A file is `PREFIX-FIRST-LAST.parquet`; all files of one prefix were answered under the same conditions.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._blocks: dict[str, BlockScores] = {}
        self._files: dict[str, dict[str, range]] = defaultdict(dict)
        self._wanted: dict[tuple[str, str, str, int, str, int, int], ScoreRow] = {}
        for info in store.list("scores/"):
            self._note(info.key)

    def _note(self, key: str) -> None:
        if (name := BLOCK_KEY.fullmatch(key)) is not None:  # a folder that people look into gets files of other kinds
            self._files[name["prefix"]][key] = range(int(name["first"]), int(name["last"]))

    def add(self, key: str, scores: BlockScores, request: Request) -> list[ScoreRow]:
        """The rows of a block that was answered now, all of it wanted, under the name of who was asked."""
        self._note(key)
        self._blocks[key] = scores
        return self._kept(scores.rows, request)

    def remarks(self) -> list[str]:
        """The remarks in all files that were read or added, each once, in the order of the files' names."""
        return list(dict.fromkeys(remark for key in sorted(self._blocks) for remark in self._blocks[key].remarks))

    def recall(self, wanted: Iterable[tuple[str, range]]) -> list[str]:
        """Reads the files that have any of these items; a resumed run may have a hundred thousand.

        Returns the keys of damaged files, which count as missing.
        """
        found = {key for prefix, items in wanted for key in self._overlapping(prefix, items)}
        keys = sorted(found - self._blocks.keys())
        with ThreadPoolExecutor(READS_AT_ONCE, "scores") as pool:
            read = dict(zip(keys, pool.map(self._read, keys), strict=True))
        self._blocks |= {key: block for key, block in read.items() if block is not None}
        damaged = {key for key, block in read.items() if block is None}
        for files in self._files.values():
            for key in files.keys() & damaged:
                del files[key]
        return sorted(damaged)

    def _read(self, key: str) -> BlockScores | None:
        """The scores in a file; None if it is damaged."""
        try:
            return read_block(read_sealed(self._store, key), key)
        except CorruptData:
            return None

    def _overlapping(self, prefix: str, items: range) -> list[str]:
        files = self._files.get(prefix, {})
        return sorted(key for key, has in files.items() if has.start < items.stop and items.start < has.stop)

    def within(self, prefix: str, request: Request) -> Iterator[list[ScoreRow]]:
        """The recalled rows that were requested, a list a file; a whole task (length 0) counts its items by itself."""
        for key in self._overlapping(prefix, request.items):
            rows = [row for row in self._blocks[key].rows if row.item in request.items or row.length == 0]
            yield self._kept(rows, request)

    def _kept(self, rows: Iterable[ScoreRow], request: Request) -> list[ScoreRow]:
        """The rows under the name of who was asked: older files call a parent `parent-NAME`, as a point may be.

        They have the weight that the job gives the benchmark now.
        """
        kind, label, weight = request.subject.kind, request.subject.label, request.cell.weight
        found = [
            row
            if (row.kind, row.point, row.weight) == (kind, label, weight)
            else replace(row, kind=kind, point=label, weight=weight)
            for row in rows
        ]
        for row in found:
            if row.repeat == 0:
                place = (row.point, row.benchmark, row.task, row.length, row.items, row.item, row.sample)
                self._wanted[place] = row
        return found

    def gaps(self, prefix: str, items: range) -> Iterator[range]:
        """The stretches of these items that no file has."""
        at = items.start
        for has in sorted((self._files[prefix][key] for key in self._overlapping(prefix, items)), key=_start):
            if has.start > at:
                yield range(at, has.start)
            at = max(at, has.stop)
        if at < items.stop:
            yield range(at, items.stop)

    def rows(self) -> list[ScoreRow]:
        """All that were wanted, each once."""
        return [self._wanted[place] for place in sorted(self._wanted)]


def _start(items: range) -> int:
    return items.start


def first_items(planned: PlannedSet, least: int) -> range:
    """The first items of a set, whole haystacks."""
    return range(min(-(-least // planned.share) * planned.share, planned.count))
