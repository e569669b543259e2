"""Every night: the newest parents by the same recipe, judged against the blessed merge, which moves if nothing is lost.

Two baselines, because one is not enough. The candidate must pass against `blessed`, the last merge that passed, and
with a wider margin against the anchor, the baseline that the job names: else many nights that each lose less than the
margin would walk away from where they began. Both have to pass, so each has all of the job's alpha for a wrong pass
(intersection-union). One fail is enough, so each has half of it for a wrong fail.

Every night has items of its own. On the same items every night, luck with them would be blessed, and stay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from jobs.errors import BadInput, CorruptData, ObjectMissing, writing
from jobs.evaluation_tasks import ScoreRow
from jobs.job import BLESSED, GateSpec, Job, with_guards_baseline
from jobs.manifest import Manifest
from jobs.merge_tasks import digest
from jobs.sealing import sealed
from orchestrator.cluster.pool import Pool
from orchestrator.evaluating.confirming import first_fresh, gate
from orchestrator.evaluating.pairing import question, samples
from orchestrator.evaluating.results import ranked_rows
from orchestrator.evaluating.session import OpenEvaluators, Session
from orchestrator.evaluating.subjects import Questions, Subject, questions
from orchestrator.judging.estimates import Estimate, macro_score
from orchestrator.judging.gate import Outcome, joint_outcome
from orchestrator.judging.samples import cell_of
from orchestrator.merging.driver import drive
from orchestrator.nightly.book import Blessed, Book, Night, Revision, Score, Scores, new_nonce
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.records.lease import Lease
from orchestrator.report.live import written_page
from orchestrator.watching import Watcher
from workers.checkpoints.opening import Checkpoint, open_checkpoint
from workers.digests import algorithm_of, contradict, short
from workers.storage import open_store
from workers.storage.records import read_record

ANCHOR_MARGIN = 2.0
"""How many times the margin the candidate may lose against the anchor, once a merge is blessed."""
WIDEST = 99.0

Ending = Literal["recorded", "finished", "unchanged"]


@dataclass(frozen=True, slots=True)
class Tonight:
    """How a call ended: with a night `recorded`; with an earlier one `finished`, that died before its end; `unchanged`.

    `night` is the record that counts, the last one where nothing changed.
    """

    ending: Ending
    night: Night
    blessed: Blessed | None


@dataclass(frozen=True, slots=True)
class Nightly:
    """A nightly job and where its work is done. `conclude` is called with every night that ends, and all nights."""

    job: Job
    folder: Path
    open_evaluators: OpenEvaluators
    pool: Callable[[], Pool]
    watcher: Watcher
    conclude: Callable[[Book, Night, Sequence[Night]], None]

    def run(self) -> Tonight:
        """Judges the newest parents' merge, unless nothing has changed; one call at a time, else `RunBusy`."""
        began = time.monotonic()
        _check(self.job)
        plan = make_plan(self.job, relative_to=self.folder)
        questions(plan, self.folder)
        book = Book(open_store(plan.run_url))
        with Lease(book.store, "lease.json") as lease:
            history = book.nights()
            last = history[-1] if history else None
            same = last is not None and last.fingerprint == _fingerprint(plan)
            if last is not None and not book.concluded(last):
                if book.overtaken(last):
                    same = False
                else:
                    self._end(book, history)
                    if same:
                        return Tonight("finished", last, book.blessed())
            blessed = book.blessed()
            if last is not None and same and not _moved_since(last, blessed):
                return Tonight("unchanged", last, blessed)
            night = self._judged(plan, history, blessed, began)
            with writing():  # the evaluation has written its scores
                lease.check()
                book.check_unmoved(blessed)
                book.record(night)
                self._end(book, [*history, night])
            return Tonight("recorded", night, book.blessed())

    def _end(self, book: Book, history: Sequence[Night]) -> None:
        """The steps after a night's record: moves the pointer if the night passed, and reports.

        `RunBusy` if another writer has moved the pointer since the night was judged; the next call judges again.
        """
        night = history[-1]
        if book.unfinished(night):
            book.bless(night)
        if book.overtaken(night):
            raise book.moved()
        self.conclude(book, night, history)
        book.note_concluded(night)

    def _judged(self, plan: Plan, history: Sequence[Night], blessed: Blessed | None, began: float) -> Night:
        """Tonight's record, with the point written if it passed; nothing is recorded yet."""
        number = 1 + (history[-1].number if history else 0)
        tonight = _plan_of_night(plan, f"{number:04d}-{_fingerprint(plan)[:8]}", blessed)
        asked = questions(tonight, self.folder, _seed(tonight.job))
        with Session.of(tonight, asked, self.open_evaluators, self.watcher) as session:
            evaluated = session.run()
            found = _judge(session, asked, self.job, evaluated.standing[0].point, blessed)
        with writing():  # the evaluation has written its scores
            for who, verdict in found.verdicts.items():
                name = "verdict" if verdict is next(iter(found.verdicts.values())) else who
                open_store(tonight.run_url).write(f"gate/{name}.json", sealed(verdict, lines=True))
            written = self._write(tonight, [entry.point for entry in evaluated.candidates], found)
        written_page(tonight.run_url)
        passed = found.outcome == "pass"
        epoch = 1 + max(0 if blessed is None else blessed.epoch, *(night.epoch or 0 for night in history), 0)
        return Night(
            number=number,
            night=tonight.job.name,
            fingerprint=_fingerprint(plan),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - began, 1),
            items=found.items,
            outcome=found.outcome,
            candidate=found.candidate,
            weights=found.weights,
            point=f"{tonight.run_url}/points/{found.candidate}" if found.candidate in written else None,
            parents=_revisions(plan.parents),
            changed=_changed(plan, history),
            scores=found.scores,
            verdicts=found.verdicts,
            alpha=found.alpha,
            judged_against=None if blessed is None else blessed.nonce,
            epoch=epoch if passed else None,
            nonce=new_nonce(),
            benchmark_weights={} if self.job.evaluate is None else dict(sorted(self.job.evaluate.weights.items())),
        )

    def _write(self, tonight: Plan, standing: Sequence[str], found: _Found) -> frozenset[str]:
        """Writes the kept points, and the candidate if it passed; returns the names of the written points."""
        keep = self.job.keep
        names: set[str] = {found.candidate} if found.outcome == "pass" else set()
        if keep.kind == "all" and "keep" in self.job.places:
            names |= {planned.name for planned in tonight.points}
        if keep.kind == "best":
            names |= set(standing[: keep.count])
        if not names:
            return frozenset()
        kept = tonight.keeping(names)
        kept.check_room()
        result = drive(kept, self.pool(), self.watcher)
        if found.candidate in result.overflowed:
            result.check_finite()
        points = result.points
        written = points.get(found.candidate)
        if written is not None and contradict(written.weights, found.weights):
            raise CorruptData(
                f"{tonight.run_url}/points/{found.candidate}: written with other weights than were scored"
                f" ({short(written.weights)}, not {short(found.weights)}); nothing is blessed,"
                " run `mergeyard verify` on it"
            )
        return frozenset(points)


def _check(job: Job) -> None:
    """Refuses a job that is not one for every night."""
    if job.gate is None:
        raise BadInput(f"{job.source}: a nightly job needs a gate to pass; add `gate: {{baseline: …}}`")
    if job.search is not None:
        raise BadInput(
            f"{job.search.place}: a night merges points that are known beforehand; run the search, and give its best"
            " point under `grid: {points: […]}`"
        )
    if job.engine.name == "openai":
        raise BadInput(
            f"{job.engine.place}: the server at {job.engine.url} serves one model, a night compares several;"
            " take transformers or vllm"
        )
    if BLESSED in job.parents:
        raise BadInput(
            f"{job.place_of(f'parents.{BLESSED}')}: {BLESSED} is the reserved name of the last merge that passed;"
            " give this parent another name"
        )
    if job.gate.baseline == BLESSED:
        raise BadInput(
            f"{job.gate.place}: every night calls the last merge that passed {BLESSED}; give the baseline another name"
        )


def bless(job: Job, name: str, by: str) -> tuple[Book, Blessed]:
    """Moves the pointer to the point of an earlier night, by its name or number, for the person `by`.

    `BadInput` if no such night is recorded, if it did not pass, or if its point is gone; `RunBusy` during a night.
    """
    book = Book(open_store(f"{open_store(job.output).url}/{job.name}"))
    nights = book.nights()
    night = next((night for night in nights if name in (night.night, str(night.number))), None)
    passed = [other.night for other in nights if other.outcome == "pass" and other.point and other is not night]
    remedy = f"bless a night that passed: {', '.join(passed)}" if passed else "no other night has passed"
    if night is None:
        raise BadInput(f"{book.store.url}: there is no night {name}; {remedy}")
    if night.outcome != "pass" or night.point is None:
        raise BadInput(f"{book.store.url}: night {night.night} ended: {night.outcome}; {remedy}")
    try:
        _open_point(night.point, night.weights)
    except BadInput as error:
        raise BadInput(f"{book.store.url}: night {night.night}: {error}; {remedy}") from None
    with Lease(book.store, "lease.json"):
        return book, book.bless_again(night, by)


def _moved_since(last: Night, blessed: Blessed | None) -> bool:
    """Whether the last night has to be judged again, because its reference is another one now.

    The pointer was removed since, to begin anew; or the night did not pass, and a person moved the pointer since. If
    the night passed and a person moved the pointer back, that decision stands.
    """
    if blessed is None:
        return last.epoch is not None or last.judged_against is not None
    return last.epoch is None and blessed.nonce != last.judged_against


def _fingerprint(plan: Plan) -> str:
    """Changes when a night would find anything new: another job, other merges, another anchor."""
    merged = {name for planned in plan.merges for name in planned.layout.parents}
    alone = {name: _revision(checkpoint).files for name, checkpoint in plan.parents.items() if name not in merged}
    return digest([plan.job.digest(), plan.digest, alone])


def _revision(checkpoint: Checkpoint) -> Revision:
    places = (checkpoint.parent, *checkpoint.others.values())
    files = sorted([file.key, file.size, file.etag] for place in places for file in place.files)
    return Revision(checkpoint.reference, digest(files)[:12])


def _revisions(parents: Mapping[str, Checkpoint]) -> dict[str, Revision]:
    return {name: _revision(checkpoint) for name, checkpoint in parents.items()}


def _changed(plan: Plan, history: Sequence[Night]) -> tuple[str, ...]:
    """The parents that changed since the night before; all of them on the first night."""
    before = history[-1].parents if history else {}
    return tuple(name for name, revision in _revisions(plan.parents).items() if before.get(name) != revision)


def _plan_of_night(plan: Plan, name: str, blessed: Blessed | None) -> Plan:
    """The same merges of the very versions that were pinned, as a run of its own; the blessed point is a parent."""
    assert plan.job.gate is not None
    parents = {**plan.parents} if blessed is None else {**plan.parents, BLESSED: _open_blessed(plan, blessed)}
    baseline = plan.job.gate.baseline if blessed is None else BLESSED
    output = f"{plan.run_url}/nights"
    job = replace(plan.job, name=name, output=output, gate=replace(plan.job.gate, baseline=baseline))
    guards = None if job.evaluate is None else job.evaluate.guards
    if guards is not None and guards.baseline is None:
        job = with_guards_baseline(job, plan.job.gate.baseline)  # against `blessed`, each night could lose a little
    tonight = replace(plan, job=job, run_url=f"{output}/{name}", parents=parents)
    return replace(tonight, job=tonight.pinned)


def _seed(tonight: Job) -> int:
    """The seed of a night's items: another one every night, the same where an interrupted night goes on."""
    return int(digest([tonight.seed, tonight.name])[:15], 16)


def _open_blessed(plan: Plan, blessed: Blessed) -> Checkpoint:
    """The blessed point, if it is there and has the weights that were blessed."""
    try:
        return _open_point(blessed.point, blessed.weights)
    except BadInput as error:
        raise BadInput(
            f"{plan.run_url}/blessed.json: {error}; put it back, bless another night with `--bless NIGHT`, or remove"
            " blessed.json to begin anew from the gate's baseline"
        ) from error


def _open_point(url: str, weights: str) -> Checkpoint:
    """A point of an earlier night; `BadInput` if it is gone, damaged or another one."""
    try:
        manifest = read_record(open_store(url), "manifest.json", Manifest.from_json)
        checkpoint = open_checkpoint(url, BLESSED)
    except (ObjectMissing, BadInput, CorruptData) as error:
        raise BadInput(f"its point {url} cannot be read ({error})") from error
    if contradict(manifest.weights, weights):
        raise BadInput(f"its point {url} has other weights than that night")
    return checkpoint


@dataclass(frozen=True, slots=True)
class _Found:
    """The result of a night's session about its candidate."""

    candidate: str
    weights: str
    outcome: Outcome
    verdicts: Mapping[str, Mapping[str, Any]]
    alpha: float
    scores: Scores
    items: int


def _judge(session: Session, asked: Questions, job: Job, candidate: str, blessed: Blessed | None) -> _Found:
    """The candidate against the blessed merge, if that is another model, and against the anchor."""
    assert job.gate is not None
    weights = _weights(session.rows(), candidate)
    baselines = {"anchor": job.gate.baseline}
    if blessed is not None and blessed.weights != weights:
        baselines = {BLESSED: BLESSED, **baselines}
    specs = gates_of(job.gate, baselines, first=blessed is None)
    verdicts = {
        who: gate(session, asked, spec, candidate, chosen=len(asked.points) > 1, verdicts=len(specs))
        for who, spec in specs.items()
    }
    everyone = {
        "candidate": asked.points[candidate],
        **{who: asked.subject(name, "parent") for who, name in baselines.items()},
    }
    return _Found(
        candidate=candidate,
        weights=weights,
        outcome=joint_outcome(gated.verdict.outcome for gated in verdicts.values()),
        verdicts={who: gated.document() for who, gated in verdicts.items()},
        alpha=job.gate.alpha,
        scores=_scores(
            ranked_rows(session.rows(), asked.ranked),
            everyone,
            fresh=any(gated.fresh for gated in verdicts.values()),
        ),
        items=len(session.rows()),
    )


def gates_of(gate: GateSpec, baselines: Mapping[str, str], *, first: bool) -> dict[str, GateSpec]:
    """The gate against each baseline: after the `first` night, that of the anchor is wider."""
    specs = {who: replace(gate, baseline=name) for who, name in baselines.items()}
    if not first:
        specs["anchor"] = _widened(specs["anchor"])
    if BLESSED in specs:
        specs[BLESSED] = _without_savings(specs[BLESSED])
    return specs


def _widened(spec: GateSpec) -> GateSpec:
    """The gate with the anchor's margins."""

    def wider(margin: float) -> float:
        return max(margin, min(ANCHOR_MARGIN * margin, WIDEST))

    length_margin = None if spec.length_margin is None else wider(spec.length_margin)
    tokens = spec.output_tokens
    if tokens is not None and tokens.at_most > 1:
        tokens = replace(tokens, at_most=1 + ANCHOR_MARGIN * (tokens.at_most - 1))
    return replace(spec, margin=wider(spec.margin), length_margin=length_margin, output_tokens=tokens)


def _without_savings(spec: GateSpec) -> GateSpec:
    """The gate against the blessed merge: a night need not write fewer tokens again, as it must than the anchor."""
    tokens = spec.output_tokens
    return replace(spec, output_tokens=None) if tokens is not None and tokens.at_most <= 1 else spec


def _weights(rows: Sequence[ScoreRow], point: str) -> str:
    """The digest of the weights that answered; `CorruptData` where they were not always the same."""
    found = {row.weights for row in rows if row.point == point}
    if not found or any(contradict(one, other) for one in found for other in found):
        raise CorruptData(f"the answers of {point} come from {len(found)} different weights; remove its run's scores/")
    return min(found, key=algorithm_of)  # an older version scored some: this one's digest


def _scores(rows: Sequence[ScoreRow], subjects: Mapping[str, Subject], *, fresh: bool) -> Scores:
    """Scores on the items that all of these answered; where the candidate was chosen by some, on the others."""
    chosen_by = {cell: first_fresh(planned) if fresh else 0 for cell, planned in subjects["candidate"].sets.items()}
    answered = {
        who: {
            question(row): row
            for row in rows
            if row.point == subject.label and (row.length == 0 or row.item >= chosen_by.get(cell_of(row), 0))
        }
        for who, subject in subjects.items()
    }
    common = set.intersection(*(set(found) for found in answered.values()))
    return {who: _by_length([found[place] for place in sorted(common)]) for who, found in answered.items()}


def _by_length(rows: Sequence[ScoreRow]) -> dict[str, Score]:
    lengths = sorted({row.length for row in rows if row.length})
    parts = {str(length): [row for row in rows if row.length == length] for length in lengths}
    return {what: _score(macro_score(samples(part))) for what, part in {"overall": rows, **parts}.items() if part}


def _score(estimate: Estimate) -> Score:
    mean = round(100 * estimate.mean, 3)
    if not math.isfinite(estimate.low):
        return Score(mean, None, None)
    return Score(mean, round(max(0.0, 100 * estimate.low), 3), round(min(100.0, 100 * estimate.high), 3))
