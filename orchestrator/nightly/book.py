"""The records of a nightly job under its prefix: one per night, and the pointer to the blessed point.

    history/000001.json   the result of a night; written once
    blessed.json          the blessed point; moved by compare-and-swap, its epoch only rises
    blessings/000004.json a former pointer that a person had moved, by its epoch
    concluded/000001      the night has been told of

The record comes first, the pointer after it, then the webhook and the page; the next call does the missing steps. A
record that passed while the pointer is still the one it was judged against is a night that died between the two: the
next one moves the pointer for it, before anything else. If another writer has moved the pointer since, that night
counts for nothing, and the next call judges again.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from jobs.errors import CorruptData, ObjectChanged, ObjectExists, ObjectMissing, RunBusy
from jobs.merge_tasks import FORMAT
from jobs.sealing import sealed, unsealed
from orchestrator.judging.gate import Outcome
from orchestrator.words import benchmark_words
from workers.storage import Store
from workers.storage.records import read_record

POINTER = "blessed.json"
HISTORY = "history/"
BLESSINGS = "blessings/"
CONCLUDED = "concluded/"
READS_AT_ONCE = 32
REMEDY = "remove it, then bless a night with `--bless NIGHT`, or begin anew from the gate's baseline"
LOST_NIGHT = "restore it, or remove it to do without this night"


@dataclass(frozen=True, slots=True)
class Blessed:
    """The blessed point: its URL, the digest of its weights and the night that made it.

    `epoch` only rises. `nonce` differs in every version; it is that of the night's record, if the night moved the
    pointer. If a person moved it to an earlier night, `by` and `at` say who and when (UTC).
    """

    point: str
    weights: str
    night: str
    epoch: int
    nonce: str
    by: str = ""
    at: str = ""

    @property
    def words(self) -> str:
        """The point, and who moved the pointer to it, for people."""
        return f"{self.point} (night {self.night}, by {self.by} at {self.at})" if self.by else self.point

    @classmethod
    def from_json(cls, data: bytes) -> Blessed:
        """Reads the pointer; `CorruptData` for anything else. Older versions wrote no digest."""
        document = unsealed(data, REMEDY, older=True)
        try:
            if any(isinstance(entry, str) is (name == "epoch") for name, entry in document.items()):
                raise TypeError("epoch is a number, all else is text")
            return cls(**document)
        except TypeError as error:
            raise CorruptData(f"not a pointer to a blessed point ({error}); {REMEDY}") from None


@dataclass(frozen=True, slots=True)
class Score:
    """A model's score in points from 0 to 100, and its 95 % interval; None where one haystack shows no spread."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Revision:
    """A parent as a night found it: its URL (with the commit, on a hub) and a digest of its files' versions."""

    url: str
    files: str


Scores = Mapping[str, Mapping[str, Score]]
"""By model (candidate, blessed, anchor), then by part: overall, or a length in tokens."""


@dataclass(frozen=True, slots=True)
class Night:
    """The result of one night.

    `verdicts` holds the gate's documents, by who the candidate was compared with: blessed, unless that is the same
    model, and anchor. `alpha` is the level of a wrong pass. `point` is the candidate's URL, None if it was not written;
    `epoch` the one that the pointer moves to, None unless it passed. `judged_against` is the nonce of the pointer then,
    None while nothing was blessed. `changed` are the parents that are new since the night before. `seconds` counts the
    call that finished the night; `items` are answers, of all models together. `benchmark_weights` are the job's
    `evaluate.weights` that night: scores of nights with other weights are other scores.
    """

    number: int
    night: str
    fingerprint: str
    finished: str
    seconds: float
    items: int
    outcome: Outcome
    candidate: str
    weights: str
    point: str | None
    parents: Mapping[str, Revision]
    changed: tuple[str, ...]
    scores: Scores
    verdicts: Mapping[str, Mapping[str, Any]]
    alpha: float
    judged_against: str | None
    epoch: int | None
    nonce: str
    benchmark_weights: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def weighed(self) -> str:
        """The weights of benchmarks that are not 1, in words."""
        return benchmark_words(self.benchmark_weights)

    def to_json(self) -> bytes:
        """The record's file."""
        document = {"format": FORMAT, **asdict(self)}
        if not self.benchmark_weights:  # an older version reads the record of a job without weights
            del document["benchmark_weights"]
        return sealed(document, lines=True)

    @classmethod
    def from_json(cls, data: bytes) -> Night:
        """Reads the text of `to_json`; `CorruptData` for anything else. Older versions wrote no digest."""
        document = unsealed(data, LOST_NIGHT, older=True)
        try:
            if document.pop("format", None) != FORMAT:
                raise CorruptData("written by another version of mergeyard; use that one, or another name")
            document["parents"] = {name: Revision(**entry) for name, entry in document["parents"].items()}
            document["changed"] = tuple(document["changed"])
            document["scores"] = {
                who: {what: Score(**score) for what, score in scores.items()}
                for who, scores in document["scores"].items()
            }
            return cls(**document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptData(f"damaged, not the record of a night ({error}); {LOST_NIGHT}") from None


def reweighed(before: Night, night: Night) -> bool:
    """Whether the scores of two nights weigh benchmarks otherwise."""
    return dict(before.benchmark_weights) != dict(night.benchmark_weights)


def new_nonce() -> str:
    """A nonce for a record, and for the pointer that it may become."""
    return secrets.token_hex(16)


class Book:
    """The records and the pointer of one nightly job."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def nights(self) -> list[Night]:
        """Every recorded night, oldest first."""
        keys = sorted(info.key for info in self.store.list(HISTORY) if info.key.endswith(".json"))
        with ThreadPoolExecutor(READS_AT_ONCE, "nights") as pool:
            return list(pool.map(self._night, keys))

    def _night(self, key: str) -> Night:
        return read_record(self.store, key, Night.from_json)

    def blessed(self) -> Blessed | None:
        """The pointer now; None while nothing is blessed."""
        found = self._pointer()
        return None if found is None else found[0]

    def record(self, night: Night) -> None:
        """Writes a night's record; `RunBusy` where another driver was faster."""
        key = f"{HISTORY}{night.number:06d}.json"
        try:
            self.store.write(key, night.to_json(), mode="create")
        except ObjectExists:
            raise RunBusy(f"{self.store.url}/{key}: another driver has recorded this night; run again") from None

    def concluded(self, night: Night) -> bool:
        """Whether all that follows a night's record was done: the pointer, the webhook, the page."""
        try:
            self.store.locate(f"{CONCLUDED}{night.number:06d}")
        except ObjectMissing:
            return False
        return True

    def note_concluded(self, night: Night) -> None:
        """All that follows a night's record is done."""
        self.store.write(f"{CONCLUDED}{night.number:06d}", b"")

    def unfinished(self, night: Night) -> bool:
        """Whether the night passed and the pointer is still the one it was judged against."""
        return night.epoch is not None and _nonce(self.blessed()) == night.judged_against

    def overtaken(self, night: Night) -> bool:
        """Whether the night passed, and the pointer is neither its reference nor its result."""
        return night.epoch is not None and _nonce(self.blessed()) not in (night.judged_against, night.nonce)

    def bless(self, night: Night) -> None:
        """Moves the pointer to the night's point; `RunBusy` if the pointer is no longer the night's reference."""
        assert night.point is not None and night.epoch is not None, "only what passed is blessed"
        found = self._pointer()
        if found is not None and found[0].nonce == night.nonce:
            return
        if _nonce(None if found is None else found[0]) != night.judged_against:
            raise self.moved()
        self._move(found, Blessed(night.point, night.weights, night.night, night.epoch, night.nonce))

    def bless_again(self, night: Night, by: str) -> Blessed:
        """Moves the pointer to the point of an earlier night, for the person `by`; `RunBusy` if it moved meanwhile.

        Returns the pointer, which is unchanged if it names this point already.
        """
        assert night.point is not None, "only what was written is blessed"
        found = self._pointer()
        if found is not None and (found[0].point, found[0].weights) == (night.point, night.weights):
            return found[0]
        epochs = [recorded.epoch or 0 for recorded in self.nights()]
        epoch = 1 + max(epochs if found is None else [*epochs, found[0].epoch])
        at = datetime.now(UTC).isoformat(timespec="seconds")
        blessed = Blessed(night.point, night.weights, night.night, epoch, new_nonce(), by, at)
        self._move(found, blessed)
        return blessed

    def _move(self, found: tuple[Blessed, str] | None, blessed: Blessed) -> None:
        """Replaces the pointer that was found; one that a person had moved is kept first."""
        body = sealed(asdict(blessed), lines=True)
        try:
            if found is None:
                self.store.write(POINTER, body, mode="create")
                return
            former, etag = found
            if former.by:
                self.store.write(f"{BLESSINGS}{former.epoch:06d}.json", sealed(asdict(former), lines=True))
            self.store.swap(POINTER, body, etag=etag)
        except (ObjectExists, ObjectChanged):
            raise self.moved() from None

    def check_unmoved(self, blessed: Blessed | None) -> None:
        """`RunBusy` where the pointer is no longer this."""
        if self.blessed() != blessed:
            raise self.moved()

    def moved(self) -> RunBusy:
        """The error if the pointer is no longer the night's reference."""
        return RunBusy(
            f"{self.store.url}/{POINTER}: moved by another writer during the night, so nothing is blessed;"
            " run again to compare with the merge that is blessed now"
        )

    def _pointer(self) -> tuple[Blessed, str] | None:
        """The pointer and its version; it may be moved while one looks."""
        try:
            while True:
                info = self.store.locate(POINTER)
                with suppress(ObjectChanged):
                    return read_record(self.store, POINTER, Blessed.from_json, etag=info.etag), info.etag
        except ObjectMissing:
            return None


def _nonce(blessed: Blessed | None) -> str | None:
    return None if blessed is None else blessed.nonce
