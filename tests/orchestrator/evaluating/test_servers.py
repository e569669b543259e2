"""Points and parents that are each asked at a server of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.model_server import serving
from workers.engines.engine import Answer, Prompt
from workers.evaluating.scores import read_scores

Mergeyard = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("real_model")  # the servers of this file answer, and no function in their place


def reads(shorter_than: int) -> Callable[[list[Prompt]], list[Answer]]:
    """A model that finds the needle in texts of fewer characters."""

    def generate(prompts: list[Prompt]) -> list[Answer]:
        values = [value_in(prompt.whole) for prompt in prompts]
        return [
            Answer(f" {value}." if len(prompt.whole) < shorter_than else " none", 0, 6, 0.0, True)
            for value, prompt in zip(values, prompts, strict=True)
        ]

    return generate


def value_in(text: str) -> str:
    found = re.search(r"numbers? for [^\n]+? is: (\d+)", text)
    assert found is not None
    return found[1]


def thinks(prompts: list[Prompt]) -> list[Answer]:
    """A model that names the value in its thought, and does not end the thought if the value is even."""
    values = [value_in(prompt.whole) for prompt in prompts]
    return [
        Answer(
            f"<think>Is it {value}, or 7?</think> {value}." if int(value) % 2 else f"<think>{value}", 0, 9, 0.0, True
        )
        for value in values
    ]


@pytest.fixture
def served() -> Iterator[Callable[[int], Any]]:
    """served(characters): a server of a model that reads texts below this length."""
    with ExitStack() as stack:
        yield lambda characters: stack.enter_context(
            serving(SimpleNamespace(max_length=4096, generate=reads(characters)))
        )


def url_of(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


LENGTHS = {"ruler": {"tasks": ["niah_single_1"], "lengths": [256, 512], "items": 40}}


def test_a_gate_judges_a_point_and_a_parent_at_their_own_servers(
    mergeyard: Mergeyard, job_file: Callable[..., Path], served: Callable[[int], Any]
) -> None:
    point, baseline = served(10_000), served(1_200)
    engine: dict[str, Any] = {"name": "openai", "url": url_of(point)}
    engine["servers"] = {"fmt": {"url": url_of(baseline), "model": "our/fmt"}}
    job = job_file(engine=engine, grid={"w": [0.2]}, evaluate=LENGTHS, gate={"baseline": "fmt"})
    ended = mergeyard("gate", job, "--in-process", "--json")
    assert ended.code == 0, ended.err  # the gate passes
    report = job.parent / "runs" / "tiny" / "report" / "results.parquet"
    rows = read_scores(report.read_bytes(), "results")
    of_point = [row for row in rows if row.kind == "point"]
    of_parent = [row for row in rows if row.kind == "parent"]
    assert {row.point for row in of_parent} == {"fmt"}, "long has no server"
    assert {row.weights for row in of_parent} == {f"{url_of(baseline)}#our/fmt"}
    assert {row.score for row in of_point} == {1.0}
    assert {(row.length, row.score) for row in of_parent} == {(256, 1.0), (512, 0.0)}
    assert {body["model"] for body, _ in baseline.asked} == {"our/fmt"}
    assert {body["model"] for body, _ in point.asked} == {of_point[0].point}


def test_several_points_have_a_server_each_or_a_name_each_at_one(
    mergeyard: Mergeyard, job_file: Callable[..., Path], served: Callable[[int], Any]
) -> None:
    router = served(1_200)
    points = ("tiny_w0.2", "tiny_w0.4")
    engine = {"name": "openai", "url": url_of(router), "servers": {name: {} for name in points}}
    keys: dict[str, Any] = {"grid": {"w": [0.2, 0.4]}, "point": "tiny_w{w}", "evaluate": LENGTHS}
    ended = mergeyard("evaluate", job_file(engine=engine, **keys), "--in-process", "--json")
    assert ended.code == 0, ended.err
    assert {line["name"]: line["score"] for line in ended.facts["leaderboard"]} == dict.fromkeys(points, 50.0)
    assert {body["model"] for body, _ in router.asked} == {*points}
    del engine["servers"]["tiny_w0.4"]  # the engine's own server has it then
    assert mergeyard("plan", job_file(engine=engine, **keys)).code == 0
    ended = mergeyard("plan", job_file(engine=engine, **keys | {"grid": {"w": [0.2, 0.4, 0.6]}}))
    assert ended.code == 2 and "serves one model, the job has 2 points; name the others in `servers:`" in ended.err


def test_a_point_without_a_server_is_named(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    engine = {"name": "openai", "servers": {"fmt": {"url": "http://127.0.0.1:1/v1"}}}
    ended = mergeyard("plan", job_file(engine=engine, grid={"w": [0.2]}))
    assert ended.code == 2 and "there is no server of w0.2; give its server as `url:`" in ended.err
    assert mergeyard("plan", job_file(engine={**engine, "url": "http://127.0.0.1:2/v1"}, grid={"w": [0.2]})).code == 0


def test_a_value_in_a_thought_is_no_answer_of_a_chat(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    with serving(SimpleNamespace(max_length=4096, generate=thinks)) as server:
        engine = {"name": "openai", "url": url_of(server), "options": {"api": "chat"}}
        ruler = {**LENGTHS["ruler"], "lengths": [256], "chat": True, "thinking": {"budget": 64}}
        job = job_file(engine=engine, grid={"w": [0.2]}, evaluate={"ruler": ruler})
        ended = mergeyard("evaluate", job, "--in-process", "--json")
    assert ended.code == 0, ended.err
    rows = read_scores((job.parent / "runs" / "tiny" / "report" / "results.parquet").read_bytes(), "results")
    assert {(row.status, row.score, row.answer == "") for row in rows} == {
        ("answered", 1.0, False),
        ("unended", 0.0, True),
    }
    assert all(value in row.thought for row in rows for value in re.findall(r"\d{4,}", row.answer))
    assert all(0 < row.tokens_thought <= 64 for row in rows if row.status == "answered")
    assert {tuple(one["role"] for one in body["messages"]) for body, _ in server.asked} == {("user",)}
    assert {body["max_tokens"] for body, _ in server.asked} == {64 + 128}, "RULER's 128 tokens, and the thought's"
