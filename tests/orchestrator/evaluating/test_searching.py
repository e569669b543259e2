"""A search as a job: what it asks, in which batches, and that no interruption and no order of answers changes them."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BadInput, CorruptData, FailedMidway, NothingKept
from jobs.evaluation_tasks import BlockScores, EvaluationTask, ModelSpec, ScoreRow
from jobs.job import GateSpec, Keep, load_job
from jobs.sealing import sealed, unsealed
from orchestrator.cluster.scripted import ScriptedEvaluators
from orchestrator.commands.workplace import check_kept
from orchestrator.evaluating.batches import asked_points, refusals
from orchestrator.evaluating.forecast import evaluation_facts
from orchestrator.evaluating.outcome import recorded_code
from orchestrator.evaluating.results import EvaluationResult, read_results
from orchestrator.evaluating.session import Session
from orchestrator.evaluating.subjects import Questions, questions
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.watching import Watcher
from tests.orchestrator.conftest import Ended
from tests.orchestrator.scripts import scripted
from tests.orchestrator.tiny_jobs import RULER, SOUP, job_text
from workers.benchmarks.items import Item
from workers.methods import METHODS
from workers.storage import open_store

SEARCH = {
    "over": {"w": {"from": 0, "to": 1, "step": 0.01}},
    "budget": {"points": 12},
    "batch": 4,
    "start": [{"w": 0}, {"w": 0.5}, {"w": 1}],
}
GIVEN: dict[str, Any] = {
    "grid": None, "point": None, "keep": None, "search": SEARCH, "evaluate": {"ruler": {**RULER, "items": 20}}
}  # fmt: skip


class Pulled(Exception):
    """The plug was pulled."""


def hill(task: EvaluationTask, item: Item) -> float:
    """The share of right answers is 0.9 at w = 0.3 and falls to both sides; every item has its own difficulty."""
    name = task.point.removeprefix("w=")
    weight = {"long": 1.0, "fmt": 0.0}[name] if name in ("long", "fmt") else float(name)
    return float(random.Random(item.index).random() < 0.9 - 1.2 * abs(weight - 0.3))


class Several(ScriptedEvaluators):
    """Several workers whose answers come in a random order; raises `Pulled` after so many moments."""

    def __init__(self, models: Mapping[str, ModelSpec], workers: int, seed: int, moments: int, log: list[str]) -> None:
        super().__init__(models, hill)
        self._free, self._busy = set(range(workers)), dict[int, EvaluationTask]()
        self._random, self._moments, self._log = random.Random(seed), moments, log

    def idle(self) -> Collection[int]:
        return sorted(self._free)

    def submit(self, worker: int, task: EvaluationTask) -> None:
        self._moment()
        self._free.remove(worker)
        self._busy[worker] = task

    def next_done(self) -> tuple[EvaluationTask, BlockScores]:
        worker = self._random.choice(sorted(self._busy))
        self._moment()
        super().submit(worker, self._busy.pop(worker))
        self._free.add(worker)
        task, scores = super().next_done()
        self._log.append(task.key)
        return task, scores

    def _moment(self) -> None:
        self._moments -= 1
        if not self._moments:
            raise Pulled


def planned(folder: Path, **keys: Any) -> tuple[Plan, Questions]:
    plan = make_plan(load_job(job_text(folder, **(GIVEN | keys)), "job.yaml"))
    return plan, questions(plan)


def searched(
    plan: Plan, asked: Questions, *, workers: int = 1, seed: int = 0, moments: int = 0, log: list[str] | None = None
) -> EvaluationResult:
    def opened(models: Mapping[str, ModelSpec]) -> Several:
        return Several(models, workers, seed, moments, [] if log is None else log)

    with Session.of(plan, asked, opened, Watcher(visible=False)) as session:
        return session.run()


def batches(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "runs/tiny/search").iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluationResult, list[str]]:
    """A search that nothing disturbed, with one worker, and the blocks that it asked."""
    folder, log = tmp_path_factory.mktemp("whole"), list[str]()
    return folder, searched(*planned(folder), log=log), log


def test_batches_say_what_is_asked_and_why(whole: tuple[Path, EvaluationResult, list[str]]) -> None:
    folder, _, log = whole
    first, *others = [json.loads(data) for data in batches(folder).values()]
    assert [entry["name"] for entry in first["proposals"][:3]] == ["w=0", "w=0.5", "w=1"]
    assert [entry["bindings"] for entry in first["proposals"][:3]] == [{"w": "0"}, {"w": "0.5"}, {"w": "1"}]
    assert all(entry["reason"] for batch in (first, *others) for entry in batch["proposals"])
    assert not others[-1]["proposals"] and not others[-1]["promotions"], "the last batch is the end"
    names = [entry["name"] for batch in (first, *others) for entry in batch["proposals"]]
    assert len({*names}) == len(names) == 12
    assert len({*log}) == len(log), "no question twice"


def test_parents_answer_with_the_first_batch(whole: tuple[Path, EvaluationResult, list[str]]) -> None:
    folders = [key.split("/")[1] for key in whole[2]]
    proposed = {entry["name"] for entry in json.loads(batches(whole[0])["000001.json"])["proposals"]}
    first_of_next = next(number for number, folder in enumerate(folders) if folder in proposed)
    assert {"parent-long", "parent-fmt"} <= {*folders[:first_of_next]}


def test_a_point_that_is_a_parent_is_asked_as_this_parent(whole: tuple[Path, EvaluationResult, list[str]]) -> None:
    folders = {key.split("/")[1] for key in whole[2]}
    assert not {"w=0", "w=1"} & folders
    result = whole[1]
    assert result.parents == {"long": "w=1", "fmt": "w=0"} and result.baselines == ()
    assert {"w=0", "w=1"} <= {row.point for row in result.rows if row.kind == "point"}


def test_the_best_is_near_the_top_of_the_hill(whole: tuple[Path, EvaluationResult, list[str]]) -> None:
    best = whole[1].standing[0].point
    assert abs(float(best.removeprefix("w=")) - 0.3) <= 0.15


@pytest.mark.parametrize("seed", [1, 2])
def test_eight_workers_write_the_same_batches(
    tmp_path: Path, whole: tuple[Path, EvaluationResult, list[str]], seed: int
) -> None:
    log: list[str] = []
    result = searched(*planned(tmp_path), workers=8, seed=seed, log=log)
    assert batches(tmp_path) == batches(whole[0])
    assert Counter(log) == Counter(whole[2])
    assert result.standing == whole[1].standing
    assert result.search == whole[1].search is not None


def test_killed_at_random_moments_it_writes_the_same_batches_and_asks_no_question_twice(
    tmp_path: Path, whole: tuple[Path, EvaluationResult, list[str]]
) -> None:
    """Fifteen moments, in rounds until the search ends: a killed driver leaves only files behind."""
    moments, kills, round_number = random.Random(7), 0, 0
    while kills < 15:
        folder, log = tmp_path / str(round_number), list[str]()
        plan, asked = planned(folder)
        while True:
            try:
                searched(
                    plan, asked, workers=moments.choice((1, 8)), seed=kills, moments=moments.randint(1, 12), log=log
                )
                break
            except Pulled:
                kills += 1
        assert batches(folder) == batches(whole[0])
        assert Counter(log) == Counter(whole[2]), "every answer was given once"
        round_number += 1


class Timed(ScriptedEvaluators):
    """Several workers on a clock of their own: a block takes as long as its tokens say, half or half again."""

    def __init__(self, models: Mapping[str, ModelSpec], workers: int) -> None:
        super().__init__(models, hill)
        self._free, self._ends = set(range(workers)), dict[int, tuple[float, EvaluationTask]]()
        self._workers, self._now, self._work, self._idle_from = workers, 0.0, 0.0, 0.0
        self.busy: list[tuple[float, float]] = []
        """At each answer: the time, and the share of the workers' time so far that was work."""

    def idle(self) -> Collection[int]:
        return sorted(self._free)

    def submit(self, worker: int, task: EvaluationTask) -> None:
        seconds = task.tokens * random.Random(task.key).uniform(0.5, 1.5)
        self._free.remove(worker)
        self._work += seconds
        self._ends[worker] = (self._now + seconds, task)

    def next_done(self) -> tuple[EvaluationTask, BlockScores]:
        worker = min(self._ends, key=lambda each: self._ends[each][0])
        self._now, task = self._ends.pop(worker)
        self._free.add(worker)
        unfinished = sum(end - self._now for end, _ in self._ends.values())
        self.busy.append((self._now, (self._work - unfinished) / (self._workers * self._now)))
        super().submit(worker, task)
        return super().next_done()


def test_workers_are_busy_while_the_search_asks_new_points(tmp_path: Path) -> None:
    """Block times differ by half to both sides. The end, where the last points are told apart, is not counted."""
    search = {**SEARCH, "budget": {"points": 48}, "batch": 8, "by": "sobol"}
    ruler = {**RULER, "items": 20, "lengths": [256, 320, 384]}
    plan, asked = planned(tmp_path, search=search, evaluate={"ruler": ruler})
    opened: list[Timed] = []

    def open_timed(models: Mapping[str, ModelSpec]) -> Timed:
        opened.append(Timed(models, workers=8))
        return opened[0]

    shares: list[float] = []
    told = Watcher(visible=False)
    tell = told.tell
    with pytest.MonkeyPatch.context() as patch, Session.of(plan, asked, open_timed, told) as session:

        def heard(text: str) -> None:
            if re.match(r"batch \d+: [1-9]", text) and opened and opened[0].busy:
                shares.append(opened[0].busy[-1][1])
            tell(text)

        patch.setattr(told, "tell", heard)
        session.run()
    assert shares[-1] >= 0.95, shares


def test_points_that_leave_are_departures_as_those_of_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five items of one cell show nothing surely: the rungs begin at ten."""
    monkeypatch.setattr("orchestrator.evaluating.batches.RUNGS", (10, 20))

    def cliff(task: EvaluationTask, item: Item) -> float:
        name = task.point.removeprefix("w=")
        return float(name not in ("fmt", "0", "0.1") and random.Random(f"{name} {item.index}").random() < 0.95)

    search = {"over": {"w": [0, 0.1, 0.4, 0.5, 0.6, 1]}, "budget": {"points": 6}, "batch": 3}
    plan, asked = planned(tmp_path, search=search, evaluate={"ruler": {**RULER, "lengths": [256], "items": 40}})
    with Session.of(plan, asked, partial(ScriptedEvaluators, answer=cliff), Watcher(visible=False)) as session:
        session.run()
    result = read_results(plan.run_url)
    left = {each.point: each.rung for each in result.departures}
    assert {*left} == {"w=0", "w=0.1"}
    assert left == {each.point: each.departed_at_rung for each in result.standing if each.departed_at_rung is not None}
    assert all(each.gap > each.bound and each.items == (10, 20, 40)[each.rung] for each in result.departures)
    assert all(re.search(r"points behind w=.* standard errors of", each.reason) for each in result.departures)


def test_a_search_that_ended_asks_nothing_again(whole: tuple[Path, EvaluationResult, list[str]]) -> None:
    log: list[str] = []
    again = searched(*planned(whole[0]), log=log)
    assert log == [] and again.standing == whole[1].standing


def test_another_search_in_the_same_run_is_refused(whole: tuple[Path, EvaluationResult, list[str]]) -> None:
    plan, asked = planned(whole[0], search={**SEARCH, "batch": 5})
    with pytest.raises(BadInput, match="belongs to another job, with another search, recipe or evaluation; give"):
        searched(plan, asked)


def test_a_gate_judges_a_named_point_without_searching_further(
    whole: tuple[Path, EvaluationResult, list[str]], tmp_path: Path, mergeyard: Callable[..., Ended]
) -> None:
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs/tiny/search" / max(batches(tmp_path))).unlink()  # as if it were stopped
    before = batches(tmp_path)
    job = tmp_path / "job.yaml"
    job.write_text(job_text(tmp_path, **GIVEN, gate={"baseline": "long"}))
    with scripted(hill):
        ended = mergeyard("gate", job, "--in-process", "--point", "w=0.5", "--json")
        assert ended.code == 0, ended.err
        assert (ended.facts["new"], ended.facts["fresh"]) == ("w=0.5", True)
        refused = mergeyard("gate", job, "--in-process", "--point", "w=0.51")
    assert refused.code == 2
    assert refused.err == (
        f'mergeyard: {tmp_path}/runs/tiny: the search has not asked "w=0.51", but "w=0.5"; to ask it, put it under'
        " `start:` of a job of another name\n"
    )
    assert batches(tmp_path) == before


def test_a_gate_refuses_a_named_point_before_the_search(tmp_path: Path, mergeyard: Callable[..., Ended]) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(job_text(tmp_path, **GIVEN, gate={"baseline": "long"}))
    with scripted(hill):
        refused = mergeyard("gate", job, "--in-process", "--point", "w=0.5")
    assert (refused.code, refused.err) == (
        2,
        f"mergeyard: {tmp_path}/runs/tiny: the search has asked no point yet; run the job, then name one, or name a"
        " parent\n",
    )
    assert not (tmp_path / "runs").exists()


def test_a_race_beside_a_search_is_named(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path, evaluate={**GIVEN["evaluate"], "race": {"keep": 2}})
    assert any(re.search(r":\d+: race has no effect in a search, whose points race", line) for line in plan.remarks)


def test_a_budget_of_tokens_is_kept(tmp_path: Path) -> None:
    plan, asked = planned(tmp_path, search={**SEARCH, "budget": {"tokens": 40_000}})
    result = searched(plan, asked)
    assert sum(row.tokens for row in result.rows) <= 40_000
    assert len(result.standing) >= 4


def test_a_greedy_soup_asks_its_models_once_where_they_are_parents(tmp_path: Path) -> None:
    """Of 20 items, `long` alone answers 15, `fmt` 10 and the soup 19: tokens for three models are enough."""
    right = {"long": 15, "fmt": 10, "soup=long": 15, "soup=fmt": 10, "soup=long+fmt": 19}
    recipe = {**SOUP, "models": [{"model": "${soup}", "parameters": {"weight": 1}}]}
    tokens = 3 * 20 * 256
    search = {"over": {"soup": {"subset": ["long", "fmt"]}}, "by": "greedy", "budget": {"tokens": tokens}}
    plan, asked = planned(tmp_path, recipe=recipe, search=search)
    forecast = evaluation_facts(*planned(tmp_path, recipe=recipe, search={**search, "budget": {"points": 3}}))["search"]
    assert (forecast["tokens"], forecast["tokens_of_first_batch"]) == (tokens, 2 * 10 * 256)

    def answer(task: EvaluationTask, item: Item) -> float:
        return float(item.index < right[task.point])

    log: list[str] = []
    with Session.of(plan, asked, partial(ScriptedEvaluators, answer=answer), Watcher(visible=False)) as session:
        result = session.run()
    assert result.search is not None
    assert [(each.model, each.stays) for each in result.search.ingredients] == [("long", True), ("fmt", True)]
    assert result.standing[0].point == "soup=long+fmt" and result.parents == {"long": "soup=long", "fmt": "soup=fmt"}
    assert sum(row.tokens for row in result.rows) <= tokens
    assert searched(plan, asked, log=log).standing == result.standing and not log


def weighted(first: str, second: str) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": of}} for name, of in (("long", first), ("fmt", second))]
    return {"merge_method": "linear", "dtype": "bfloat16", "models": models}


def test_points_that_cannot_be_merged_are_not_asked(tmp_path: Path) -> None:
    """The weights of a = b = 0 sum to zero, and this point is an end of the space."""
    axis = {"from": 0, "to": 1, "step": 0.5}
    search = {"over": {"a": axis, "b": axis}, "budget": {"points": 12}}
    plan, asked = planned(tmp_path, recipe=weighted("${a}", "${b}"), search=search)
    assert "a=1_b=1" in evaluation_facts(plan, asked)["search"]["first_batch"]
    with Session.of(plan, asked, partial(ScriptedEvaluators, answer=flat), Watcher(visible=False)) as session:
        session.run()
    written = [json.loads(data)["proposals"] for data in batches(tmp_path).values()]
    names = [entry["name"] for proposals in written for entry in proposals]
    assert len(names) == 8 and "a=0_b=0" not in names


@pytest.mark.parametrize(
    ("recipe", "more"),
    [(weighted("${a}", "${-a}"), {}), (weighted("${a}", "${a}"), {"start": [{"a": 0}]})],
    ids=["all", "start"],
)
def test_where_all_points_or_one_of_start_cannot_be_merged_the_reason_is_given(
    recipe: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    over = {"a": {"from": 0, "to": 1, "step": 0.5}}
    keys = {"recipe": recipe, "search": {"over": over, "budget": {"points": 3}, **more}}
    with pytest.raises(BadInput, match="the weights sum to zero and normalize divides by the sum"):
        evaluation_facts(*planned(tmp_path, **keys))
    with (
        pytest.raises(BadInput, match="sum to zero.*`start:` asks this point, a=0" if more else "sum to zero"),
        Session.of(*planned(tmp_path, **keys), Flat, Watcher(visible=False)),
    ):
        pass
    assert not (tmp_path / "runs").exists()


def test_the_middle_of_a_space_need_not_be_a_merge(tmp_path: Path) -> None:
    """The weights of a = b = 0 sum to zero."""
    axis = {"from": -1, "to": 1, "step": 0.5}
    search = {"over": {"a": axis, "b": axis}, "budget": {"points": 4}}
    found = evaluation_facts(*planned(tmp_path, recipe=weighted("${a}", "${b}"), search=search))["search"]
    assert found["first_batch"][:2] == ["a=-1_b=-1", "a=1_b=1"]
    refused = found["refused"]
    assert (refused["points"], refused["of"], refused["point"]) == (5, 25, "a=-1_b=1"), "those with a = −b"
    assert "the weights sum to zero" in refused["why"]


@pytest.mark.parametrize("by", ["random", "gp"])
def test_points_keep_their_names_when_a_search_goes_on(by: str, tmp_path: Path) -> None:
    """Several points are p4 by `point:`; the first that is asked has the name, whatever else was looked at."""
    axis = {"from": 1, "to": 3, "step": 1}
    search = {"over": {"a": axis, "b": axis}, "budget": {"points": 8}, "batch": 1, "by": by}
    keys: dict[str, Any] = {"recipe": weighted("${a}", "${b}"), "search": search, "point": "p{a+b}"}
    asked: list[tuple[str, ...]] = []
    for _ in range(2):
        log: list[str] = []
        plan, questions_ = planned(tmp_path, **keys)
        evaluation_facts(plan, questions_)  # as `run` says them first
        with Session.of(plan, questions_, partial(Flat, log=log), Watcher(visible=False)) as session:
            asked.append(tuple(sorted(entry.point for entry in session.run().standing)))
        assert bool(log) == (len(asked) == 1), "a finished search asks nothing"
    assert asked[0] == asked[1] and len({*asked[0]}) > 4
    filed = {
        entry["name"]: entry["choice"] for data in batches(tmp_path).values() for entry in json.loads(data)["proposals"]
    }
    with Session.of(*planned(tmp_path, **keys), Flat, Watcher(visible=False)) as session:
        session.recall()
        bound = {name: point.planned.point.bindings for name, point in session.asked.points.items()}
    assert {name: [int(values[axis]) - 1 for axis in "ab"] for name, values in bound.items()} == {
        name: choice for name, choice in filed.items() if name in bound
    }


def test_a_name_in_a_batch_file_holds_though_another_would_be_free(tmp_path: Path) -> None:
    """Older versions gave names also to points that they did not ask."""
    axis = {"from": 1, "to": 3, "step": 1}
    search = {"over": {"a": axis, "b": axis}, "budget": {"points": 4}, "batch": 2, "by": "sobol"}
    keys: dict[str, Any] = {"recipe": weighted("${a}", "${b}"), "search": search, "point": "p{a*b}"}
    with pytest.raises(Pulled), Session.of(*planned(tmp_path, **keys), Broken, Watcher(visible=False)) as session:
        session.run()
    path = tmp_path / "runs/tiny/search/000000.json"
    content = unsealed(path.read_bytes())
    other = next(entry for entry in content["proposals"] if entry["choice"] != [1, 1])  # whose name is planned
    other["name"] = "point-0123456789abcdef"
    path.write_bytes(sealed(content, lines=True))
    (tmp_path / "runs/tiny/search/000001.json").unlink(missing_ok=True)  # made from the first
    plan, asked = planned(tmp_path, **keys)
    evaluation_facts(plan, asked)
    with Session.of(plan, asked, Flat, Watcher(visible=False)) as session:
        assert "point-0123456789abcdef" in {entry.point for entry in session.run().standing}


def test_an_axis_of_a_merge_that_feeds_another_is_searched(tmp_path: Path) -> None:
    half = {"name": "half", **weighted("${a}", 0.5)}
    last = weighted(0.5, "${b}")
    last["models"][0]["model"] = "half"
    over = {"a": [0.2, 0.4, 0.6], "b": {"from": 0.1, "to": 0.9, "step": 0.1}}
    plan, asked = planned(tmp_path, recipe=[half, last], search={"over": over, "budget": {"points": 6}, "batch": 3})
    assert len(plan.points) == 3, "a kind for each value of `a`"
    assert evaluation_facts(plan, asked)["search"]["size"] == 27
    with Session.of(plan, asked, Flat, Watcher(visible=False)) as session:
        assert len(session.run().standing) == 6


AXIS = {"from": 0, "to": 1, "step": 0.5}
LEAST = {"from": 0.1, "to": 2, "step": 0.1}


@pytest.mark.parametrize(
    ("first", "last", "over", "kinds"),
    [
        (("${a}", 0.5), ("${b}", "${c}"), {"simplex": {"axes": ["a", "b", "c"], "step": 0.25}}, 14),
        (("${a}", "${b}"), (0.5, 0.5), {"a": AXIS, "b": AXIS}, 8),
        ((0.5, 0.5), ("${a}", "${b}"), {"a": LEAST, "b": LEAST}, 1),
        ((0.5, 0.5), ("${a}", "${b}"), {"a": AXIS, "b": AXIS}, 1),
    ],
    ids=["a simplex of both", "one that sums to zero", "many of a result", "a result that sums to zero"],
)
@pytest.mark.parametrize("name", [{}, {"name": "final"}], ids=["", "named"])
def test_merges_that_feed_others_make_kinds_of_points(
    first: tuple[Any, Any], last: tuple[Any, Any], over: dict[str, Any], kinds: int, name: Any, tmp_path: Path
) -> None:
    result = {**name, **weighted(*last)}
    result["models"][0]["model"] = "half"
    search = {"over": over, "budget": {"points": 6}, "batch": 3}
    plan, asked = planned(tmp_path, recipe=[{"name": "half", **weighted(*first)}, result], search=search)
    assert len(plan.points) == kinds
    evaluation_facts(plan, asked)
    with Session.of(plan, asked, Flat, Watcher(visible=False)) as session:
        session.run()
    assert len({*asked_points(open_store(str(tmp_path / "runs/tiny")))}) == 6


def test_a_subset_of_weights_is_searched_beside_merges_that_feed_others(tmp_path: Path) -> None:
    result = weighted("${soup.long}", "${soup.fmt}")
    result["models"][0]["model"] = "half"
    search = {"over": {"soup": {"subset": ["long", "fmt"]}}, "budget": {"points": 3}, "batch": 3}
    plan, asked = planned(tmp_path, recipe=[{"name": "half", **weighted(0.5, 0.5)}, result], search=search)
    with Session.of(plan, asked, Flat, Watcher(visible=False)) as session:
        session.run()
    assert {*asked_points(open_store(str(tmp_path / "runs/tiny")))} == {"soup=long", "soup=fmt", "soup=long+fmt"}


@pytest.mark.parametrize(("feeding", "stays"), [("arcee_fusion", False), ("linear", True)])
def test_a_search_is_another_where_the_bits_of_a_method_have_changed(
    feeding: str, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [{"model": "fmt"}] if feeding == "arcee_fusion" else [{"model": name} for name in ("long", "fmt")]
    half: dict[str, Any] = {"name": "half", "merge_method": feeding, "dtype": "bfloat16", "models": models}
    half |= {"base_model": "long"} if feeding == "arcee_fusion" else {"parameters": {"weight": 1}}
    result = weighted("${w}", 0.5)
    result["models"][0]["model"] = "half"
    search = {"over": {"w": [0.2, 0.4]}, "budget": {"points": 2}}
    digests: list[str] = []
    for revision in (0, 1):
        changed = {**METHODS, "arcee_fusion": replace(METHODS["arcee_fusion"], revision=revision)}
        monkeypatch.setattr("orchestrator.planning.plan.METHODS", changed)
        digests.append(planned(tmp_path, recipe=[half, result], search=search)[0].digest)
    assert (digests[0] == digests[1]) == stays


def test_a_kind_without_a_planned_point_is_not_asked(tmp_path: Path) -> None:
    """With a = 1 only the density at b = 0.1 is none above 1, which neither the middle nor the ends have."""
    density = {"density": "${1 + a*(b - 0.1)*(b - 0.1)}", "weight": 1}
    models = [{"model": "half", "parameters": density}]
    result = {"merge_method": "ties", "dtype": "bfloat16", "base_model": "fmt", "models": models}
    over = {"a": [0, 1], "b": {"from": 0, "to": 1, "step": 0.001}}
    recipe = [{"name": "half", **weighted("${a + 1}", 0.5)}, result]
    plan, asked = planned(tmp_path, recipe=recipe, search={"over": over, "budget": {"points": 4}, "batch": 2})
    assert [planned.point.bindings["a"] for planned in plan.points] == [0]
    refusal = refusals(plan)
    assert not refusal((0, 100)) and "a=1_b=0.1 is of a kind of which no point could be merged" in refusal((1, 100))
    with Session.of(plan, asked, Flat, Watcher(visible=False)) as session:
        session.run()
    assert {name[:4] for name in asked_points(open_store(str(tmp_path / "runs/tiny")))} == {"a=0_"}


class Flat(ScriptedEvaluators):
    """Answers `flat`, and logs the blocks."""

    def __init__(self, models: Mapping[str, ModelSpec], log: list[str] | None = None) -> None:
        super().__init__(models, flat)
        self._log = [] if log is None else log

    def submit(self, worker: int, task: EvaluationTask) -> None:
        self._log.append(task.key)
        super().submit(worker, task)


def test_a_batch_that_an_older_version_could_not_merge_is_named(tmp_path: Path) -> None:
    """Such a version wrote the batch, and failed. The search goes on when its file is removed."""
    axis = {"from": 0, "to": 1, "step": 0.5}
    search = {"over": {"a": axis, "b": axis}, "budget": {"points": 4}, "by": "sobol"}
    plan, asked = planned(tmp_path, recipe=weighted("${a}", "${b}"), search=search)
    with pytest.raises(Pulled), Session.of(plan, asked, Broken, Watcher(visible=False)) as session:
        session.run()
    path = tmp_path / "runs/tiny/search/000000.json"
    content = unsealed(path.read_bytes())
    content["proposals"][0] |= {"choice": [0, 0], "name": "a=0_b=0"}
    path.write_bytes(sealed(content, lines=True))
    again = planned(tmp_path, recipe=weighted("${a}", "${b}"), search=search)
    with (
        pytest.raises(
            FailedMidway, match=r"sum to zero.*000000\.json asks this point: remove this file, and run again"
        ),
        Session.of(*again, Flat, Watcher(visible=False)) as session,
    ):
        session.run()
    path.unlink()
    again = planned(tmp_path, recipe=weighted("${a}", "${b}"), search=search)
    with Session.of(*again, Flat, Watcher(visible=False)) as session:
        assert session.run().standing


class Broken(ScriptedEvaluators):
    """Pulls the plug at the first question."""

    def __init__(self, models: Mapping[str, ModelSpec]) -> None:
        super().__init__(models, flat)

    def submit(self, worker: int, task: EvaluationTask) -> None:
        raise Pulled


def test_words_make_points_of_other_layouts(tmp_path: Path) -> None:
    recipe = {
        "merge_method": "${method}",
        "base_model": "fmt",
        "dtype": "bfloat16",
        "models": [{"model": "long", "parameters": {"weight": "${w}"}}, {"model": "fmt"}],
    }
    over = {"w": [0.25, 0.5, 0.75], "method": ["task_arithmetic", "ties"]}
    plan, asked = planned(tmp_path, recipe=recipe, search={"over": over, "budget": {"points": 6}})
    assert len(plan.points) == 2
    with Session.of(plan, asked, partial(ScriptedEvaluators, answer=flat), Watcher(visible=False)) as session:
        names = {entry.point for entry in session.run().standing}
    assert names == {f"w={w}_method={method}" for w in over["w"] for method in over["method"]}


def flat(task: EvaluationTask, item: Item) -> float:
    return float(item.index % 2)


def test_a_batch_file_of_another_space_is_refused(tmp_path: Path) -> None:
    """As a file that a person has changed."""
    plan, asked = planned(tmp_path)
    with pytest.raises(Pulled):
        searched(plan, asked, moments=3)
    path = tmp_path / "runs/tiny/search/000000.json"
    content = unsealed(path.read_bytes())
    content["proposals"][0]["choice"] = [999]
    path.write_bytes(sealed(content, lines=True))
    with pytest.raises(CorruptData, match=r"000000\.json: \[999\] is not a point of this search; remove the run"):
        searched(plan, asked)


def test_a_damaged_batch_file_is_refused_by_name(tmp_path: Path) -> None:
    plan, asked = planned(tmp_path)
    with pytest.raises(Pulled):
        searched(plan, asked, moments=3)
    path = tmp_path / "runs/tiny/search/000001.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(CorruptData, match=r"000001\.json: .*remove it; it is proposed again from the scores"):
        searched(plan, asked)
    path.unlink()
    searched(plan, asked)
    assert path.read_bytes() == whole, "the remedy works"


def test_a_budget_below_the_first_batch_is_refused(tmp_path: Path) -> None:
    """One point and two parents answer five items; an item has 256 tokens."""
    plan, asked = planned(tmp_path, search={**SEARCH, "budget": {"tokens": 1}})
    with pytest.raises(BadInput, match=r"give `tokens: (\d+)` or more") as refused:
        searched(plan, asked)
    assert not (tmp_path / "runs").exists()
    least = int(re.findall(r"\d+", str(refused.value))[-1])
    assert least == 3 * 5 * 256
    plan, asked = planned(tmp_path / "again", search={**SEARCH, "budget": {"tokens": least}})
    assert len(searched(plan, asked).standing) == 1, "the remedy works"


def test_a_constraint_and_several_figures_are_searched_to_the_end(tmp_path: Path) -> None:
    """Point w answers as `hill` says, and `fmt`, which is w = 0, may not be undercut: 1 is far below it."""
    search = {**SEARCH, "at_least": {"ruler": {"of": "fmt", "margin": 1}}}
    lines: list[str] = []
    for name, maximize in (("one", "score"), ("several", ["ruler@256", "-output_tokens"])):
        plan, asked = planned(tmp_path / name, search={**search, "maximize": maximize})
        with Session.of(plan, asked, partial(ScriptedEvaluators, answer=hill), Watcher(visible=False)) as session:
            result, best = session.run(), session.best
        assert result.finished and len(result.standing) == 12
        assert abs(float(best[0].removeprefix("w=")) - 0.3) <= 0.15
        assert [entry.point for entry in result.standing].index("w=1") >= 6, "it breaks the constraint"
        documents = [json.loads(data) for data in batches(tmp_path / name).values()]
        lines += [entry["reason"] for document in documents for entry in document["proposals"]]
        assert searched(plan, asked, log=(again := list[str]())).standing == result.standing
        assert again == []
    foreseen = [line for line in lines if "foreseen" in line]
    assert len(foreseen) >= 2 and all("keeps the constraints with probability" in line for line in foreseen)
    assert any("exceed" in line and "ruler@256 foreseen" in line for line in foreseen)


def test_that_no_point_keeps_a_constraint_is_said(tmp_path: Path) -> None:
    over = {"w": {"from": 0.7, "to": 1, "step": 0.01}}  # `fmt` is w = 0, far above all of these
    search = {**SEARCH, "over": over, "start": [{"w": 1}], "at_least": {"ruler": {"of": "fmt", "margin": 1}}}
    plan, asked = planned(tmp_path, search=search)
    remark = "no point is likely to keep `at_least:`; w=0.7"
    found = searched(plan, asked, log=[])
    assert found.unkept and any(each.startswith(remark) for each in found.remarks)
    check_kept(replace(plan.job, keep=Keep(kind="none")), found)
    assert not found.candidates and recorded_code(plan.job, tmp_path) == 1, "the run has ended, and keeps nothing"
    for asks in ({"keep": Keep(kind="best", count=1)}, {"gate": GateSpec(baseline="fmt")}):
        with pytest.raises(NothingKept, match="none is written or judged: allow a larger `margin:`") as refused:
            check_kept(replace(plan.job, **{"keep": Keep(kind="none"), **asks}), found)
        assert ("gate --point" in str(refused.value)) == ("gate" in asks), "without a gate no point can be judged"


def test_a_search_keeps_no_second_point_that_breaks_a_constraint(tmp_path: Path) -> None:
    """`long`, which is w = 1, is far below `fmt`; of three points that `keep:` wants, those near it are left out."""

    def step(task: EvaluationTask, item: Item) -> float:
        name = task.point.removeprefix("w=")
        weight = {"long": 1.0, "fmt": 0.0}[name] if name in ("long", "fmt") else float(name)
        return float(random.Random(item.index).random() < (0.9 if weight < 0.3 else 0.2))

    search = {"over": {"w": [0, 0.5, 0.75, 1]}, "budget": {"points": 4}, "batch": 4}
    search |= {"at_least": {"ruler": {"of": "fmt", "margin": 1}}}
    plan, asked = planned(tmp_path, search=search, keep={"best": 3})
    with Session.of(plan, asked, partial(ScriptedEvaluators, answer=step), Watcher(visible=False)) as session:
        result, best = session.run(), session.best
    assert len(result.standing) == 4 and not result.unkept
    assert best == [entry.point for entry in result.candidates] == ["w=0"]
    assert {*read_results(plan.run_url).infeasible} == {*result.infeasible} == {"w=0.5", "w=0.75", "w=1"}


class Slow(ScriptedEvaluators):
    """Each item takes a minute."""

    def _row(self, task: EvaluationTask, item: Item) -> ScoreRow:
        return replace(super()._row(task, item), seconds=60.0)


def test_the_hours_of_the_budget_end_the_search_for_good(tmp_path: Path) -> None:
    """A point and the parents' first items take five minutes each: the first three batches take an hour and more."""
    plan, asked = planned(tmp_path, search={**SEARCH, "budget": {"hours": 1}, "by": "sobol"})
    with Session.of(plan, asked, partial(Slow, answer=hill), Watcher(visible=False)) as session:
        session.run()
    found = batches(tmp_path)
    assert 3 <= sum(bool(json.loads(data)["proposals"]) for data in found.values()) <= 4
    log: list[str] = []
    searched(plan, asked, log=log)
    assert log == [] and batches(tmp_path) == found


class Refusing(ScriptedEvaluators):
    """A server that refuses all questions to w = 0.5, which then writes no token; all others write one word."""

    def __init__(self, models: Mapping[str, ModelSpec]) -> None:
        super().__init__(models, lambda task, item: 1.0)

    def _row(self, task: EvaluationTask, item: Item) -> ScoreRow:
        refused: dict[str, Any] = {"status": "failed", "score": 0.0}
        return replace(super()._row(task, item), **(refused if task.point.endswith("0.5") else {"tokens_out": 1}))


def test_a_point_that_the_server_refuses_is_not_the_one_that_writes_least(tmp_path: Path) -> None:
    search = {**SEARCH, "budget": {"points": 4}, "maximize": "-output_tokens"}
    plan, asked = planned(tmp_path, search=search, evaluate={"ruler": {**RULER, "items": 10}})
    with Session.of(plan, asked, Refusing, Watcher(visible=False)) as session:
        *others, last = session.run().standing
    assert (last.point, last.score) == ("w=0.5", next(iter(asked.sets.values())).new_tokens)
    assert {entry.score for entry in others} == {1.0}


def test_a_point_that_the_server_refuses_leaves_a_race_for_fewer_tokens(tmp_path: Path) -> None:
    race = {"ruler": {**RULER, "items": 30}, "race": {"output_tokens": True}}
    plan = make_plan(load_job(job_text(tmp_path, grid={"w": [0.25, 0.5, 1]}, keep=None, evaluate=race), "job.yaml"))
    with Session.of(plan, questions(plan), Refusing, Watcher(visible=False)) as session:
        assert [departure.point for departure in session.run().departures] == ["w0.5"]
