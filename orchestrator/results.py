"""What an evaluation found, and the two files it leaves under `report/` in a run: results.parquet, evaluation.json.

Both are renewed while an evaluation goes on, so that whoever looks sees the newest; `finished` says whether it ended.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.errors import BadInput, CorruptData, ObjectMissing
from jobs.evaluation import ScoreRow
from jobs.job import RaceSpec
from jobs.tasks import FORMAT
from orchestrator.questions import RacePlan
from orchestrator.racing import Departure, Standing
from orchestrator.statistics import FlipRate
from workers.benchmarks.lm_eval_adapter import OVER_LONG
from workers.scores import read_scores, write_scores
from workers.storage import Store, open_store

RESULTS = "report/results.parquet"
EVALUATION = "report/evaluation.json"


@dataclass(frozen=True)
class EvaluationResult:
    """All scores of a run, and what the race made of them; `standing` is best first, baselines apart.

    `ranked` names the benchmarks that points are ranked by; `race` is None where every point answers everything.
    `baselines` are the parents that are no points, `parents` the names that parents are scored under, and `same` names
    the points and parents that are the same merge as a point. `seed` is the job's. While not `finished`, `standing` is
    how it stands now.
    """

    rows: list[ScoreRow]
    ranked: tuple[str, ...]
    standing: tuple[Standing, ...]
    departures: tuple[Departure, ...]
    baselines: tuple[str, ...]
    parents: tuple[str, ...]
    same: Mapping[str, str]
    noise: FlipRate | None
    cost_share: float
    race: RacePlan | None
    seed: int
    finished: bool

    def ranked_rows(self) -> list[ScoreRow]:
        """The rows that the ranking counts."""
        return ranked_rows(self.rows, self.ranked)

    def race_document(self) -> dict[str, Any]:
        """The audit trail: who left when and why, who stayed, and how sure the noise lets one be."""
        return {
            "race": None if self.race is None else {**asdict(self.race.spec), "items": self.race.items},
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
            "parents": list(self.parents),
            "same": dict(self.same),
            **self.race_document(),
            "race": None if self.race is None else asdict(self.race),
        }


def ranked_rows(rows: Iterable[ScoreRow], benchmarks: Sequence[str]) -> list[ScoreRow]:
    """The rows of these benchmarks, but for what only counts unasked items."""
    return [row for row in rows if row.benchmark in benchmarks and not row.task.endswith(f":{OVER_LONG}")]


def write_results(store: Store, result: EvaluationResult) -> None:
    """Renews both files; a reader between the two sees rows that are newer than the rest."""
    store.write(RESULTS, write_scores(result.rows))
    store.write(EVALUATION, json.dumps(result.document(), indent=1).encode())


def read_results(run_url: str, points: Collection[str] | None = None) -> EvaluationResult:
    """What a run's evaluation found so far, with the rows of all points or of some; `BadInput` where there is none."""
    store = open_store(run_url)
    try:
        document = json.loads(bytes(store.read(EVALUATION)))
        rows = read_scores(bytes(store.read(RESULTS)), f"{run_url}/{RESULTS}", points)
    except ObjectMissing:
        raise BadInput(f"{run_url}: no scores there; `mergeyard evaluate` makes them") from None
    except ValueError as error:
        raise CorruptData(f"{run_url}/{EVALUATION}: not JSON ({error}); evaluate again") from None
    if document.get("format") != FORMAT:
        raise CorruptData(f"{run_url}/{EVALUATION}: written by another version of mergeyard; evaluate again")
    return _result(document, rows)


def _result(document: Mapping[str, Any], rows: list[ScoreRow]) -> EvaluationResult:
    race, noise = document["race"], document["noise"]
    return EvaluationResult(
        rows=rows,
        ranked=tuple(document["ranked"]),
        standing=tuple(Standing(**entry) for entry in document["standing"]),
        departures=tuple(Departure(**entry) for entry in document["departures"]),
        baselines=tuple(document["baselines"]),
        parents=tuple(document["parents"]),
        same=document["same"],
        noise=None if noise is None else FlipRate(**noise),
        cost_share=document["cost_share"],
        race=None if race is None else _race(race),
        seed=document["seed"],
        finished=document["finished"],
    )


def _race(document: Mapping[str, Any]) -> RacePlan:
    return RacePlan(
        spec=RaceSpec(**document["spec"]),
        benchmark=document["benchmark"],
        items=document["items"],
        fresh=document["fresh"],
        share=document["share"],
    )
