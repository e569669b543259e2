"""The results of an evaluation, and its two files under `report/` in a run: results.parquet, evaluation.json.

Both are renewed while an evaluation goes on, so that whoever looks sees the newest; `finished` says whether it ended.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.errors import BadInput, CorruptData, ObjectMissing
from jobs.evaluate import RaceSpec
from jobs.evaluation_tasks import ScoreRow
from jobs.merge_tasks import FORMAT
from jobs.sealing import sealed
from orchestrator.evaluating.subjects import RacePlan
from orchestrator.judging.guards import Comparison, Guarded, broken
from orchestrator.judging.race import LEAST_HAYSTACKS, Departure, Standing
from orchestrator.judging.sampled import by_item
from orchestrator.judging.significance import FlipRate
from orchestrator.records.documents import read_document, text_of
from orchestrator.searching.findings import Findings
from workers.benchmarks.harness.adapter import OVER_LONG
from workers.benchmarks.registry import BENCHMARKS
from workers.evaluating.scores import read_scores, write_scores
from workers.storage import Store, open_store
from workers.storage.records import read_sealed

RESULTS = "report/results.parquet"
EVALUATION = "report/evaluation.json"
VERDICT = "gate/verdict.json"
AGAIN = "`mergeyard evaluate` makes it again from the scores"


@dataclass(frozen=True)
class EvaluationResult:
    """All scores of a run, and the result of the race; `standing` is best first, baselines apart.

    `rows` has one row for each item, `samples` one for each answer where items are answered several times.
    `ranked` names the benchmarks that points are ranked by; `race` is None where every point answers everything.
    Models go by the labels of `Subject`. `baselines` are the parents that are not the same merge as a point; `parents`
    gives the label of every parent, a point's where it is the same merge; `same` names the points that are the same
    merge as another point. `seed` is that of the items. While not `finished`, `standing` is how it stands now.
    `remarks` are those of the workers, one line each. Once it is finished, `guards` are the findings of the guards, and
    `search` those of a search. `infeasible` are the points of a search that likely break its constraints.
    """

    rows: list[ScoreRow]
    ranked: tuple[str, ...]
    standing: tuple[Standing, ...]
    departures: tuple[Departure, ...]
    baselines: tuple[str, ...]
    parents: Mapping[str, str]
    same: Mapping[str, str]
    noise: FlipRate | None
    cost_share: float
    race: RacePlan | None
    seed: int
    finished: bool
    remarks: tuple[str, ...] = ()
    samples: Sequence[ScoreRow] = ()
    guards: Sequence[Guarded] = ()
    infeasible: tuple[str, ...] = ()
    search: Findings | None = None

    @property
    def broken(self) -> frozenset[str]:
        """The points that surely lost a guard."""
        return broken(self.guards)

    @property
    def unkept(self) -> bool:
        """Whether every point of a search likely breaks its constraints."""
        return bool(self.infeasible) and {entry.point for entry in self.standing} <= {*self.infeasible}

    @property
    def candidates(self) -> tuple[Standing, ...]:
        """The points that may be kept, best first: none that surely lost a guard, or likely breaks a constraint."""
        out = {*self.broken, *self.infeasible}
        return tuple(entry for entry in self.standing if entry.point not in out)

    @property
    def answers(self) -> Sequence[ScoreRow]:
        """The rows of all answers; `rows` has one for each item."""
        return self.samples or self.rows

    @property
    def scored_points(self) -> dict[str, str]:
        """The label of every point that has scores, by its name."""
        scored = [entry.point for entry in (*self.standing, *self.departures)]
        return {name: name for name in scored} | {twin: point for twin, point in self.same.items() if point in scored}

    @property
    def parent_labels(self) -> tuple[str, ...]:
        """The label of every parent, each once."""
        return tuple(dict.fromkeys(self.parents.values()))

    def parent_name(self, label: str) -> str:
        """A parent's own name, and its label where that is a point's; the label itself if it is not a parent's."""
        own = next((name for name, known in self.parents.items() if known == label), label)
        return own if own == label or label in self.baselines else f"{own} ({label})"

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each benchmark of the score."""
        known = {row.benchmark: row.weight for row in self.rows}
        return {name: known.get(name, 1.0) for name in self.ranked}

    def ranked_rows(self) -> list[ScoreRow]:
        """The rows that the ranking counts."""
        return ranked_rows(self.common_rows(), self.ranked)

    def common_rows(self) -> list[ScoreRow]:
        """The rows but for the fresh items of a race, which its winners alone answered."""
        return self._common(self.rows)

    def common_answers(self) -> list[ScoreRow]:
        """The same of all answers."""
        return self._common(self.answers)

    def _common(self, rows: Sequence[ScoreRow]) -> list[ScoreRow]:
        race = self.race
        if race is None:
            return [*rows]
        return [row for row in rows if row.benchmark != race.benchmark or row.item < race.items]

    @property
    def rule(self) -> str:
        """The rule by which points leave the race, in words; empty without a race."""
        if self.race is None:
            return ""
        spec = self.race.spec
        rival = "the leader" if spec.keep == 1 else f"each of the {spec.keep} best"
        sure = "3 standard errors" if spec.alpha is None else f"the bound for alpha {spec.alpha:g}"
        shorter = "; a point with fewer tokens of output than one of these stays" if spec.output_tokens else ""
        return (
            f"a point leaves when its paired gap to {rival} on the same items exceeds {sure}, as a Student quantile of"
            " the haystacks so far, and is more than rare total losses explain; nobody leaves before"
            f" {LEAST_HAYSTACKS} haystacks a task{shorter}"
        )

    def race_document(self) -> dict[str, Any]:
        """The audit trail: who left when and why, who stayed, and how sure the noise lets one be."""
        race = self.race
        return {
            "race": None if race is None else {**asdict(race.spec), "items": race.items, "rule": self.rule},
            "departures": [asdict(departure) for departure in self.departures],
            "standing": [asdict(standing) for standing in self.standing],
            "noise": None if self.noise is None else asdict(self.noise),
            "cost_share": self.cost_share,
        }

    def document(self) -> dict[str, Any]:
        """Everything but the rows: evaluation.json."""
        return {
            "format": FORMAT,
            "finished": self.finished,
            "seed": self.seed,
            "ranked": list(self.ranked),
            "baselines": list(self.baselines),
            "parents": dict(self.parents),
            "same": dict(self.same),
            "remarks": list(self.remarks),
            **({"guards": [asdict(guarded) for guarded in self.guards]} if self.guards else {}),
            **({"infeasible": list(self.infeasible)} if self.infeasible else {}),
            **({"search": self.search.document()} if self.search is not None else {}),
            **self.race_document(),
            "race": None if self.race is None else asdict(self.race),
        }


def ranked_rows(rows: Iterable[ScoreRow], benchmarks: Sequence[str]) -> list[ScoreRow]:
    """The rows of these benchmarks, without those that only count unasked items."""
    return [row for row in rows if row.benchmark in benchmarks and not row.task.endswith(f":{OVER_LONG}")]


def write_results(store: Store, result: EvaluationResult) -> None:
    """Renews both files; a reader between the two sees rows that are newer than the rest."""
    store.write(RESULTS, write_scores(result.answers))
    store.write(EVALUATION, sealed(result.document(), lines=True))


def read_results(run_url: str, points: Collection[str] | None = None) -> EvaluationResult:
    """The results of a run so far, with the rows of all points or of some; `BadInput` without an evaluation."""
    store = open_store(run_url)
    try:
        result = read_document(store, EVALUATION, _result, AGAIN)
        rows: list[ScoreRow] = []
        if points is None or points:
            rows = read_scores(read_sealed(store, RESULTS, AGAIN), f"{run_url}/{RESULTS}", points)
    except ObjectMissing:
        raise BadInput(f"{run_url}: no scores there; `mergeyard evaluate` makes them") from None
    if unknown := {row.benchmark for row in rows} - BENCHMARKS.keys():
        names = ", ".join(sorted(unknown))
        raise BadInput(f"{run_url}: this mergeyard has no benchmark {names}; take the version that wrote the run")
    if points is None and not rows:
        raise BadInput(f"{run_url}: no scores there yet; `mergeyard evaluate` makes them")
    parents = {*result.baselines}  # which rows of older versions do not say
    rows = [replace(row, kind="parent") if row.point in parents and row.kind == "point" else row for row in rows]
    return replace(result, rows=by_item(rows), samples=rows if any(row.sample for row in rows) else ())


def read_verdict(store: Store) -> dict[str, Any] | None:
    """The gate's verdict in a run; None if there is none."""
    try:
        return read_document(store, VERDICT, _verdict, "`mergeyard gate` makes it again from the scores, or remove it")
    except ObjectMissing:
        return None


def _verdict(document: dict[str, Any]) -> dict[str, Any]:
    """The verdict, if it has every field in the expected form."""
    lines, looks = document["lines"], document["looks"]
    for part, names in ((document, ("outcome", "new", "old")), *((line, ("outcome", "reason")) for line in lines)):
        for name in names:
            text_of(part, name)
    for part in (lines[0], *lines, *looks):
        format(part["difference"], "+.1f")
    for look in looks:
        format(look["items"], "d")
        text_of(look, "outcome")
    for score in (scores := document.get("scores", {})).values():
        format(score["score"], ".1f")
        format(score["half"] or 0.0, ".1f")
    return {"fresh": False, "items_needed": None, **document, "scores": scores}


def _result(document: Mapping[str, Any]) -> EvaluationResult:
    """All but the rows."""
    if document.get("format") != FORMAT:
        raise CorruptData("written by another version of mergeyard; evaluate again")
    race, noise = document["race"], document["noise"]
    parents, same = document["parents"], document["same"]
    if isinstance(parents, list):
        parents, same = _older_names(document)
    return EvaluationResult(
        rows=[],
        ranked=tuple(document["ranked"]),
        standing=tuple(Standing(**entry) for entry in document["standing"]),
        departures=tuple(Departure(**entry) for entry in document["departures"]),
        baselines=tuple(document["baselines"]),
        parents=dict(parents),
        same=dict(same),
        noise=None if noise is None else FlipRate(**noise),
        cost_share=document["cost_share"],
        race=None if race is None else _race(race),
        seed=document["seed"],
        finished=document["finished"],
        remarks=tuple(document.get("remarks", ())),  # a run of an earlier version has none
        guards=tuple(map(_guarded, document.get("guards", ()))),
        infeasible=tuple(document.get("infeasible", ())),
        search=Findings.read(document["search"]) if document.get("search") else None,
    )


def _older_names(document: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """`parents` and `same` of older versions, which call the parent NAME `parent-NAME`, in `same` if it is a point."""
    scored = {name: name for name in document["baselines"]}
    repeated = {name: point for name, point in document["same"].items() if name.startswith("parent-")}
    parents = {name.removeprefix("parent-"): label for name, label in (scored | repeated).items()}
    return parents, {name: point for name, point in document["same"].items() if name not in repeated}


def _guarded(document: Mapping[str, Any]) -> Guarded:
    guarded = Guarded(**document)
    against: Any = guarded.against
    return guarded if against is None else replace(guarded, against=Comparison(**against))


def _race(document: Mapping[str, Any]) -> RacePlan:
    return RacePlan(
        spec=RaceSpec(**document["spec"]),
        benchmark=document["benchmark"],
        items=document["items"],
        fresh=document["fresh"],
        share=document["share"],
    )
