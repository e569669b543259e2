"""The points of a run, and the removal of those that lost.

A point's manifest goes first, so that no half-removed point looks whole, and its receipts last: a prune that
was interrupted finds the rest. `mergeyard run` merges a removed point again, to the same bytes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jobs.errors import AccessDenied, BadInput, ObjectMissing, writing
from jobs.sealing import sealed
from orchestrator.evaluating.results import VERDICT, read_results
from orchestrator.judging.race import left_by_name
from orchestrator.records.documents import read_document, text_of
from orchestrator.records.lease import Lease
from orchestrator.records.ledger import READS_AT_ONCE
from orchestrator.records.places import Places
from orchestrator.words import size
from workers.storage import Store, open_store
from workers.storage.records import read_receipt, read_record

BLESSED = "blessed.json"
FOLDERS = ("items", "scores", "receipts", "report", "gate")
PLACES = Places()


@dataclass(frozen=True, slots=True)
class Holding:
    """A point of a run: its bytes, its score from 0 to 100, its rank, and the reason why it stays or goes."""

    point: str
    bytes: int
    score: float | None
    place: int | None
    kept: bool
    why: str


@dataclass(frozen=True, slots=True)
class Holdings:
    """Everything under a run's prefix. `beside` has the bytes outside points, by folder; best points come first."""

    run: str
    points: tuple[Holding, ...]
    beside: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Of everything."""
        return sum(point.bytes for point in self.points) + sum(self.beside.values())

    @property
    def lost(self) -> tuple[Holding, ...]:
        """The points that would be removed."""
        return tuple(point for point in self.points if not point.kept)

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "run": self.run,
            "points": [asdict(point) for point in self.points],
            "beside": dict(self.beside),
            "bytes": self.bytes,
            "bytes_to_remove": sum(point.bytes for point in self.lost),
        }


def holdings(run: str, keep: int) -> Holdings:
    """The contents of a run's prefix, and the points that are not among the `keep` best. Changes nothing.

    Without scores every point stays. `ObjectMissing` where there is no run.
    """
    if keep < 1:
        raise BadInput(f"--keep {keep}: at least 1, the best point")
    store = open_store(run)
    planned = _planned(store)
    taken, beside = _taken((info.key, info.size) for info in store.list())
    owners = {name: same_as or name for name, same_as in planned.points.items()}
    needed = _needed(store, planned)
    needed |= {owners[name]: why for name, why in needed.items() if name in owners}  # whose files the point's are
    standings = _Standings.of(run, keep)
    points: list[Holding] = []
    for name in planned.points.keys() | taken.keys():
        scored = name if name in standings.places else owners.get(name, name)
        kept, why = standings.judge(scored, keep) if name not in needed else (True, needed[name])
        score, place = standings.scores.get(scored), standings.places.get(scored)
        points.append(Holding(name, taken[name], score, place, kept, why))
    points.sort(key=lambda point: (point.place is None, point.place, point.point))
    return Holdings(store.url, tuple(points), dict(sorted(beside.items())))


@dataclass(frozen=True, slots=True)
class _Standings:
    """Scores from 0 to 100 and ranks from 1, by point; empty without scores."""

    scores: Mapping[str, float]
    places: Mapping[str, int]
    finished: bool
    left_by_name: frozenset[str] = frozenset()

    @classmethod
    def of(cls, run: str, keep: int) -> _Standings:
        try:
            result = read_results(run)
        except BadInput:
            return cls({}, {}, finished=False)
        return cls(
            {standing.point: 100 * standing.score for standing in result.standing},
            {standing.point: place for place, standing in enumerate(result.standing, 1)},
            result.finished,
            frozenset(left_by_name(result.standing, keep)),
        )

    def judge(self, point: str, keep: int) -> tuple[bool, str]:
        """Whether a point stays by its score, and why."""
        if not self.finished:
            return True, "its evaluation is not finished" if self.places else "no scores yet"
        if point not in self.places:
            return True, "not scored"
        if self.places[point] <= keep:
            return True, f"among the best {keep}" if keep > 1 else "the best"
        by_name = ", by its name alone" if point in self.left_by_name else ""
        return False, f"not among the best {keep}{by_name}"


def _taken(listed: Iterable[tuple[str, int]]) -> tuple[Counter[str], Counter[str]]:
    """Bytes by point, and bytes outside points by folder."""
    points, beside = Counter[str](), Counter[str]()
    for key, count in listed:
        folder, _, rest = key.partition("/")
        if folder == "points" and "/" in rest:
            points[rest.split("/")[0]] += count
        else:
            beside[folder if folder in FOLDERS else "other"] += count
    return points, beside


@dataclass(frozen=True, slots=True)
class _Planned:
    """Of plan.json: the points, each with the one it repeats or None, and the parents' URLs by name."""

    points: Mapping[str, str | None]
    parents: Mapping[str, str]


def _planned(store: Store) -> _Planned:
    try:
        plan = read_record(store, PLACES.record("plan.json"))
    except ObjectMissing:
        raise ObjectMissing(f"{store.url}: no run there; see `mergeyard status`") from None
    return _Planned(
        {entry["name"]: entry["same_as"] for entry in plan["points"]},
        {name: parent["url"] for name, parent in plan["parents"].items()},
    )


def _needed(store: Store, planned: _Planned) -> dict[str, str]:
    """Points that stay whatever they scored, and why."""
    needed: dict[str, str] = {}
    for name, url in planned.parents.items():
        if point := _point_of(store, url):
            needed[point] = f"it is the parent {name}"
    if passed := _text(store, VERDICT, lambda verdict: text_of(verdict, "new") if verdict["outcome"] == "pass" else ""):
        needed[passed] = "the gate passed it"
    for place in dict.fromkeys((*_folders_above(store.url), *_folders_above(_real(store.url)))):
        if point := _point_of(store, _blessed(place)):
            needed[point] = f"blessed by {place}/{BLESSED}"
    return needed


def _point_of(store: Store, url: str) -> str | None:
    """The name of the point of this run that a URL names, by whatever path."""
    if not url:
        return None
    remote = "://" in url and not url.startswith("file://")  # opening it would ask for its credentials
    points, place = f"{store.url}/points", url if remote else open_store(url).url
    for inside, name in ((points, place), (_real(points), _real(place))):
        if name.startswith(f"{inside}/"):
            return name.removeprefix(f"{inside}/").split("/")[0]
    return None


def _real(url: str) -> str:
    """A folder without symbolic links on its way; other places as they are."""
    return url if "://" in url else os.path.realpath(url)


def _blessed(place: str) -> str:
    """The URL of the point that a folder's pointer names; empty where there is none."""
    try:
        point = _text(open_store(place), BLESSED, lambda pointer: text_of(pointer, "point"))
    except AccessDenied:
        raise AccessDenied(
            f"{place}/{BLESSED}: may not be read, and might name a point of this run; use credentials that may read it"
        ) from None
    if point and "://" not in point and not Path(point).expanduser().is_absolute():
        raise BadInput(f"{place}/{BLESSED}: its point {point} is a relative path; write the whole path")
    return point


def _text(store: Store, key: str, parse: Callable[[dict[str, Any]], str]) -> str:
    """From a small JSON file; empty where there is none. `CorruptData` if unreadable: it might protect a point."""
    try:
        return read_document(store, key, parse, "mend or remove it")
    except ObjectMissing:
        return ""


def _folders_above(url: str) -> list[str]:
    """The run's own folder and those above it, as far as the bucket or the root."""
    scheme, mark, path = url.rpartition("://")
    parts = path.rstrip("/").split("/")
    return [f"{scheme}{mark}{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1) if any(parts[:count])]


def prune(run: str, keep: int) -> tuple[Holdings, int]:
    """Removes the points that lost and leftovers of uploads; returns the holdings and the number of leftovers.

    Alone with the run: `RunBusy` while a driver holds its lease. `BadInput` where there are no scores to judge by.
    """
    store = open_store(run)
    _planned(store)
    with Lease(store, PLACES.record("lease.json")) as lease:
        held = holdings(run, keep)
        if not any(point.place for point in held.points):
            raise BadInput(f"{run}: no scores there to judge by; `mergeyard evaluate` makes them")
        receipts = _receipts(store, {point.point for point in held.lost})
        twins_first = sorted(held.lost, key=lambda point: point.bytes)
        with writing():
            swept = store.sweep()
            _note(store, [point.point for point in twins_first])
            for point in twins_first:
                lease.check()
                _remove(store, point.point, receipts.get(point.point, []))
        return held, swept


def _note(store: Store, points: Iterable[str]) -> None:
    """Writes the names of all points ever removed, before they are, so that `status` does not wait for them."""
    key = PLACES.record("pruned.json")
    try:
        earlier = read_record(store, key)["points"]
    except ObjectMissing:
        earlier = []
    store.write(key, sealed({"points": sorted({*earlier, *points})}, lines=True))


def _remove(store: Store, point: str, receipts: Iterable[str]) -> None:
    store.delete(PLACES.file(point, "manifest.json"))
    keys = [info.key for info in store.list(PLACES.file(point, ""))]
    with ThreadPoolExecutor(READS_AT_ONCE, "prune") as pool:
        list(pool.map(store.delete, keys))
        list(pool.map(store.delete, receipts))


def _receipts(store: Store, points: set[str]) -> dict[str, list[str]]:
    """Keys of the receipts of these points."""
    keys = [info.key for info in store.list(PLACES.record("receipts/"))] if points else []
    found: dict[str, list[str]] = {}
    with ThreadPoolExecutor(READS_AT_ONCE, "prune") as pool:
        receipts = pool.map(partial(read_receipt, store), keys)
        for key, receipt in zip(keys, receipts, strict=True):
            if receipt.point in points:
                found.setdefault(receipt.point, []).append(key)
    return found


def print_holdings(held: Holdings) -> None:
    """The table of a run's points."""
    lines = [("point", "size", "score", "place", "")]
    for point in held.points:
        if point.bytes or point.place:
            score = "" if point.score is None else f"{point.score:.1f}"
            fate = f"{'kept' if point.kept else 'goes'}: {point.why}"
            lines.append((point.point, size(point.bytes), score, str(point.place or ""), fate))
    lines += [(_title(folder), size(count), "", "", "kept") for folder, count in held.beside.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for name, *figures, fate in lines:
        cells = [f"{figure:>{width}}" for figure, width in zip(figures, widths[1:], strict=True)]
        print("  ".join([f"{name:<{widths[0]}}", *cells, fate]).rstrip())
    print(f"\n{held.run}: {size(held.bytes)}")


def _title(folder: str) -> str:
    return f"{folder}/" if folder in FOLDERS else "the rest"
