"""Models that a run has scored, by the names that users give: RUN/POINT, RUN/PARENT, RUN, or a checkpoint's URL.

RUN/points/NAME and RUN/parents/NAME say which of the two is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.errors import BadInput, ObjectMissing
from jobs.evaluation_tasks import Kind, ScoreRow
from jobs.job import load_job
from jobs.manifest import Manifest
from jobs.yaml_nodes import quoted, suggestion
from orchestrator.evaluating.results import EVALUATION, EvaluationResult, read_results
from orchestrator.judging.significance import FlipRate
from workers.benchmarks.registry import BENCHMARKS
from workers.storage import Store, open_store
from workers.storage.records import read_record, read_sealed


@dataclass(frozen=True)
class ScoredModel:
    """A model's answers in a run, under the name that they have there; the rest is as in `EvaluationResult`."""

    name: str
    run: str
    rows: Sequence[ScoreRow]
    ranked: tuple[str, ...]
    noise: FlipRate | None
    seed: int

    @property
    def weights(self) -> str:
        """The weights that answered."""
        return self.rows[0].weights

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        noise = None if self.noise is None else asdict(self.noise)
        return {"name": self.name, "run": self.run, "weights": self.weights, "noise": noise}


WHAT_IS_ASKED = ("tasks", "lengths", "items", "blocks", "limit", "place")

FOLDERS: Mapping[str, Kind] = {"points": "point", "parents": "parent"}

RunOf = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class _Named:
    run: str
    name: str


def find_models(words: Sequence[str], run_of: RunOf) -> list[ScoredModel]:
    """The models that the words name. A checkpoint is looked for in the runs that the other words name.

    `run_of` gives the URL of the run that a word names. `BadInput` for what is no model, or has no scores, or twice the
    same.
    """
    named = [_in_a_run(word, run_of) for word in words]
    runs = list(dict.fromkeys(entry.run for entry in named if entry is not None))
    found = [entry or _checkpoint(word, runs) for word, entry in zip(words, named, strict=True)]
    if len(set(found)) < len(found):
        raise BadInput(f"{words[0]} and {words[1]} are the same model, {found[0].name}; name two")
    return [_scored(entry) for entry in found]


def _in_a_run(word: str, run_of: RunOf) -> _Named | None:
    """RUN/NAME or RUN/FOLDER/NAME, where such a run has scores, or RUN for its best; `BadInput` where it has none."""
    if word.startswith("hf://"):
        return None
    folder, _, name = word.rstrip("/").rpartition("/")
    above, _, last = folder.rpartition("/")
    places: list[tuple[str, Kind | None]] = [(above, FOLDERS[last])] if last in FOLDERS else []
    for place, kind in (*places, (folder, None)):  # a run may be called `points` itself
        if place and not place.endswith((":", ":/")) and _has_scores(run := run_of(place)):
            return _Named(run, _label(name, read_results(run, points=()), run, kind))
    return _Named(run, _best(run)) if _has_scores(run := run_of(word)) else None


def _has_scores(run: str) -> bool:
    """Whether a run with scores lies there; `BadInput` for a run without."""
    if _lies(run, EVALUATION):
        return True
    if _lies(run, "plan.json"):
        raise BadInput(f"{run}: no scores there; `mergeyard evaluate` makes them")
    return False


def _best(run: str) -> str:
    standing = read_results(run, points=()).standing
    if not standing:
        raise BadInput(f"{run}: no point has scores yet; run `mergeyard evaluate` on")
    return standing[0].point


def _lies(run: str, key: str) -> bool:
    try:
        open_store(run).locate(key)
    except ObjectMissing:
        return False
    return True


def _label(name: str, result: EvaluationResult, run: str, kind: Kind | None = None) -> str:
    """The label of a point or a parent, points first; only of `kind` if it is given."""
    points, parents = result.scored_points, result.parents
    known = {"point": points, "parent": parents, None: {**parents, **points}}[kind]
    if name not in known:
        sought = kind or "point or parent"
        raise BadInput(f"{run}: no {sought} {quoted(name)} was scored{suggestion(name, [*known])}")
    return known[name]


def _checkpoint(word: str, runs: Sequence[str]) -> _Named:
    """A parent of one of the runs by its URL, or a copy of one of their points by its manifest."""
    if not runs:
        raise BadInput(
            f"{word}: no point or parent of a run with scores; name one as RUN/POINT, such as runs/demo/NAME"
        )
    url = open_store(word).url
    digest = None if word.startswith("hf://") else _merge_digest(url)
    for run in runs:
        store = open_store(run)
        plan = read_record(store, "plan.json")
        result = read_results(run, points=())
        for name, parent in plan["parents"].items():
            if parent["url"] == url or ("@" not in url and parent["url"].split("@")[0] == url):
                return _Named(run, _label(name, result, run, "parent"))
        if digest is not None:
            points = {point["digest"]: point["name"] for point in plan["points"]} or _written(store)
            if digest in points:
                return _Named(run, _label(points[digest], result, run, "point"))
    raise BadInput(f"{word}: {' and '.join(runs)} scored no such point or checkpoint; `mergeyard evaluate` scores any")


def _written(store: Store) -> dict[str, str]:
    """The digest and the name of each point that was written; the plan of a search lists none."""
    keys = [info.key for info in store.list("points/") if info.key.endswith("/manifest.json")]
    return {found.digest: found.point for found in (read_record(store, key, Manifest.from_json) for key in keys)}


def _merge_digest(url: str) -> str | None:
    try:
        return read_record(open_store(url), "manifest.json", Manifest.from_json).digest
    except ObjectMissing:
        return None


def _scored(named: _Named) -> ScoredModel:
    result = read_results(named.run, points=(named.name,))
    if not result.rows:
        raise BadInput(f"{named.run}: {named.name} has no scores yet; run `mergeyard evaluate` on")
    return ScoredModel(named.name, named.run, result.rows, result.ranked, result.noise, result.seed)


def right_answers(run: str, digest: str, benchmark: str) -> dict[int, tuple[str, ...]]:
    """The expected answers of a set's items, by number, as far as the run still has them."""
    store, expected = open_store(run), BENCHMARKS[benchmark].expected
    found: dict[int, tuple[str, ...]] = {}
    if expected is None:
        return found
    for info in store.list(f"items/{digest}/"):
        if info.key.endswith(".parquet"):
            found |= expected(read_sealed(store, info.key))
    return found


def benchmark_settings(run: str, benchmark: str) -> dict[str, Any]:
    """The run's settings of a benchmark, without its tasks, lengths and numbers of items."""
    text = read_sealed(open_store(run), "job.yaml").decode("utf-8")
    evaluation = load_job(text, f"{run}/job.yaml").evaluate
    spec: Any = None if evaluation is None else evaluation.benchmarks.get(benchmark)
    return {} if spec is None else {key: value for key, value in asdict(spec).items() if key not in WHAT_IS_ASKED}
