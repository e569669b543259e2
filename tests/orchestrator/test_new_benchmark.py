"""A benchmark that only this file knows goes through every command: plan, evaluate, gate, report, compare, submit.

`recall` hides one number before or after two sentences and asks for it; its keys are the lines of a file of the user's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluate import SPECS
from jobs.job import load_job
from orchestrator.cluster.shipment import shipment
from orchestrator.evaluating.results import read_results
from orchestrator.evaluating.subjects import questions
from orchestrator.planning.plan import make_plan
from tests.orchestrator.conftest import Ended
from tests.orchestrator.tiny_jobs import PARENTS, SCALED, job_text
from workers.benchmarks.answering import Block, ItemScore, answer_items
from workers.benchmarks.items import Asked, Item, items_digest, read_answers, write_items
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.registry import BENCHMARKS, Benchmark
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.engine import Engine

pytestmark = pytest.mark.usefixtures("real_model")

KEYS = "dizzy-teriyaki\namber-copper\nquiet-harbor\nplain-coffee\n"
NOISE = "The grass is green. The sky is blue."


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallSpec:
    """`items` questions at each length, about the keys in the file `keys`."""

    lengths: tuple[int, ...]
    keys: str
    items: int = 10
    place: str = field(default="", compare=False)


def plan_recall(spec: RecallSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    keys = reader.prose(spec.keys, spec.place).split()

    def planned(length: int) -> PlannedSet:
        asked = Asked("recall", "recall", length, seed, max_new_tokens=12)
        return PlannedSet(
            benchmark="recall",
            task="recall",
            length=length,
            count=spec.items,
            made=max(spec.items, least),
            digest=items_digest({"keys": keys}, tokenizer=tokenizer.digest, length=length, seed=seed),
            build=lambda wanted: write_items(recall_item(asked, keys[i % len(keys)], tokenizer, i) for i in wanted),
            place=spec.place,
            grows=True,
        )

    return [planned(length) for length in spec.lengths]


def recall_item(asked: Asked, key: str, tokenizer: Tokenizer, index: int) -> Item:
    number = str(random.Random(f"{asked.seed} {index}").randrange(10**6, 10**7))
    lines = [f"One of the special magic numbers for {key} is: {number}.", NOISE]
    text = "\n".join(
        [
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you"
            " about the number afterwards.",
            *(lines if index % 2 == 0 else reversed(lines)),
            f"What is the special magic number for {key} mentioned in the provided text? The special magic number for"
            f" {key} mentioned in the provided text is",
        ]
    )
    return asked.item(index, text, "", answers=(number,), tokens=tokenizer.count(text), depths=(float(index % 2),))


def answer_recall(engine: Engine, block: Block) -> Iterator[ItemScore]:
    return (replace(score, answer=f"said{score.answer}") for score in answer_items(engine, block))


RECALL = Benchmark[RecallSpec](
    title="recall",
    plan=plan_recall,
    answer=answer_recall,
    files=lambda spec: (spec.keys,),
    rank=0,
    retrieval=True,
    raced=lambda spec: (spec.items, 1),
    depths=lambda _: 2,
    expected=read_answers,
)


@pytest.fixture
def recall(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark in the two dictionaries, for one test."""
    monkeypatch.setitem(SPECS, "recall", RecallSpec)
    monkeypatch.setitem(BENCHMARKS, "recall", RECALL)


@pytest.fixture
def job_file(tmp_path: Path) -> Callable[..., Path]:
    """job_file(**keys of the job): a job of `long` turned down to four weights; at two of them it answers at random."""

    def write(**keys: Any) -> Path:
        job = {
            "parents": {"long": str(PARENTS / "long")},
            "recipe": SCALED,
            "grid": {"w": [0.99, 0.98, 0.1, 0.02]},
            "evaluate": {"recall": {"lengths": [128, 256], "items": 30, "keys": "keys.txt"}, "race": {"keep": 1}},
            **keys,
        }
        (tmp_path / "keys.txt").write_text(KEYS)
        (tmp_path / "job.yaml").write_text(job_text(tmp_path, **job))
        return tmp_path / "job.yaml"

    return write


Mergeyard = Callable[..., Ended]


@pytest.mark.usefixtures("recall")
@pytest.mark.usefixtures("figures")
def test_a_new_benchmark_goes_through_every_command(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    job = job_file(gate={"baseline": "long", "margin": 40})
    ended = mergeyard("plan", job, "--json")
    assert ended.code == 0, ended.err
    facts = ended.facts["evaluation"]
    assert (facts["items_a_point"], facts["tokens_a_point"]) == (60, 30 * 128 + 30 * 256)
    assert set(facts["sees"]["lengths"]) == {"128", "256"} and facts["gate"]["items_at_first"] == 60

    ended = mergeyard("evaluate", job, "--in-process", "--json")
    run = tmp_path / "runs" / "tiny"
    result = read_results(str(run))
    assert result.ranked == ("recall",) and all(row.answer.startswith("said ") for row in result.rows)
    assert {departure.point for departure in result.departures} == {"w0.1", "w0.02"}
    assert result.noise is not None and result.noise.items == 50, "25 of each length"

    ended = mergeyard("gate", job, "--in-process", "--json")
    assert (ended.code, ended.facts["outcome"]) == (0, "pass"), ended.err
    assert ended.facts["fresh"] and ended.facts["looks"][0]["items"] == 60

    ended = mergeyard("report", run)
    assert ended.code == 0 and "longest length at which recall is ≥ 85.6" in " ".join(ended.out.split())
    page = (run / "report" / "index.html").read_text()
    assert "Needles by depth and length" in page and "recall at 128" in page
    lines = {line["name"]: line for line in mergeyard("report", run, "--json").facts["leaderboard"]}
    for name in ("w0.99", "w0.1"):
        scores = [row.score for row in result.common_rows() if row.point == name and row.length == 256]
        assert lines[name]["by_length"]["256"] == pytest.approx(100 * sum(scores) / len(scores), abs=0.01)
    assert lines["w0.1"]["note"] == "left at 10 items" and lines["long"]["effective_length"] is not None

    ended = mergeyard("compare", f"{run}/w0.1", f"{run}/w0.99", "--json")
    assert ended.code == 0, ended.err
    assert ended.facts["overall"]["items"] == 20 and ended.facts["overall"]["low"] > 0
    for flip in ended.facts["flips"]:
        [expected] = flip["expected"]
        assert (flip["benchmark"], flip["score_a"]) == ("recall", 0) and expected in flip["answer_b"]


@pytest.mark.usefixtures("recall")
def test_its_file_is_sent_to_a_cluster(job_file: Callable[..., Path], tmp_path: Path) -> None:
    text = job_file(parents={"long": "s3://models/long"}, output="s3://bucket/runs").read_text()
    job = load_job(text, "job.yaml")
    sent = shipment(job, tmp_path, "http://ray.example:8265")
    assert sent.files.keys() == {"job.yaml", "keys.txt"} and sent.files["keys.txt"] == KEYS.encode()
    assert load_job(sent.files["job.yaml"].decode(), "job.yaml") == job


@pytest.mark.usefixtures("recall")
def test_it_ranks_beside_those_of_its_rank_and_before_the_others(job_file: Callable[..., Path], tmp_path: Path) -> None:
    asked = {
        "recall": {"lengths": [128], "keys": "keys.txt"},
        "perplexity": {"lengths": [256], "blocks": 2},
        "needle": {"lengths": [320], "depths": 2, "items": 1},
    }
    plan = make_plan(load_job(job_file(evaluate=asked).read_text(), "job.yaml"))
    found = questions(plan, tmp_path)
    assert found.ranked == ("needle", "recall")
    counts = Counter(planned.benchmark for planned in found.points["w0.98"].sets.values())
    assert counts == {"recall": 1, "perplexity": 1, "needle": 1}


def test_it_changes_no_digest_of_a_job_that_does_not_ask_it(
    job_file: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    text = job_file(evaluate={"needle": {"lengths": [320]}}).read_text()
    before = load_job(text, "job.yaml").digest()
    request.getfixturevalue("recall")
    assert load_job(text, "job.yaml").digest() == before
    assert load_job(text.replace("needle", "ruler"), "job.yaml").digest() != before
