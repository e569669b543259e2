"""An evaluation worker, on the tiny parents: what it answers for a point that was never written."""

from __future__ import annotations

import inspect
import io
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from jobs.engine import ENGINE_OPTIONS
from jobs.errors import BadInput
from jobs.evaluation_tasks import BlockScores, EvaluationTask, ScoreRow
from jobs.job import load_job
from orchestrator.cluster.in_process import InProcessPool
from orchestrator.evaluating.subjects import Questions, questions
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.watching import Watcher
from workers.benchmarks.items import read_items
from workers.benchmarks.perplexity import read_windows
from workers.benchmarks.sets import stored
from workers.engines.engine import Prompt
from workers.engines.openai_engine import OpenAIEngine
from workers.engines.tokenizer import load_tokenizer
from workers.engines.transformers_engine import Limits, TransformersEngine
from workers.evaluating.scores import LATER, read_block, read_scores, write_scores
from workers.evaluating.worker import Evaluator
from workers.merging.resident import ResidentParents
from workers.storage import open_store

PARENTS = Path(__file__).parents[3] / "jobs" / "examples" / "parents"
VLLM = Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"
EVALUATE = {"ruler": {"tasks": ["niah_single_1"], "lengths": [320, 512], "items": 6, "questions": 2}}
LINEAR = "{merge_method: linear, dtype: bfloat16, models: [%s]}"


def linear(**weights: str) -> str:
    models = ", ".join(f"{{model: {name}, parameters: {{weight: {weight}}}}}" for name, weight in weights.items())
    return LINEAR % models


def make(folder: Path, *, parents: Path = PARENTS, evaluate: Any = EVALUATE, **more: Any) -> Plan:
    """A plan of points between `long` and `fmt`."""
    job = {
        "name": "tiny",
        "parents": {name: str(parents / name) for name in ("long", "fmt")},
        "recipe": linear(long='"${w}"', fmt='"${1 - w}"'),
        "grid": {"w": [0.6, 0.3]},
        "point": "w{w}",
        "evaluate": evaluate,
        "output": str(folder / "runs"),
        **more,
    }
    text = "".join(f"{key}: {value if key == 'recipe' else json.dumps(value)}\n" for key, value in job.items())
    return make_plan(load_job(text, "job.yaml"))


def tasks(plan: Plan, asked: Questions, point: str) -> list[EvaluationTask]:
    """Each set as one block for a point."""
    subject = asked.points[point]
    store = open_store(plan.run_url)
    sets = [(stored(planned, store), planned.count) for planned in subject.sets.values()]
    return [
        EvaluationTask(
            subject.model,
            point,
            subject.planned.digest,
            subject.planned.settings,
            items,
            0,
            count,
            0,
            f"scores/{point}/{items.task}-{items.length}.parquet",
        )
        for items, count in sets
    ]


def answered(plan: Plan, *points: str) -> list[ScoreRow]:
    """The rows of these points, one after the other on one worker."""
    asked = questions(plan)
    evaluator = Evaluator(asked.models)
    try:
        return [row for point in points for task in tasks(plan, asked, point) for row in evaluator.evaluate(task).rows]
    finally:
        evaluator.close()


def of(rows: Sequence[ScoreRow], point: str) -> list[ScoreRow]:
    return [row for row in rows if row.point == point]


def test_an_unwritten_point_answers_token_for_token_what_the_written_one_does(tmp_path: Path) -> None:
    plan = make(tmp_path)
    rows = answered(plan, "w0.6", "w0.3")
    written = drive(plan, InProcessPool(), Watcher(visible=False))
    for point in ("w0.6", "w0.3"):
        engine = TransformersEngine.from_folder(tmp_path / "runs/tiny/points" / point, device="cpu")
        for length in (320, 512):
            mine = [row for row in of(rows, point) if row.length == length]
            sets = [task.items for task in tasks(plan, questions(plan), point) if task.items.length == length]
            [(_, _, key)] = sets[0].parts
            items = read_items(bytes(open_store(plan.run_url).read(key)))
            prompts = [Prompt(item.prefix, item.prompt + item.answer_prefix, item.max_new_tokens) for item in items]
            answers = engine.generate(prompts)
            assert [row.answer for row in mine] == [answer.text for answer in answers]
            assert [row.tokens for row in mine] == [answer.tokens_in + answer.tokens_out for answer in answers]
        engine.close()
        assert {row.weights for row in of(rows, point)} == {written.points[point].weights}
        assert {row.recipe for row in of(rows, point)} == {written.points[point].digest}
    assert [row.answer for row in of(rows, "w0.6")] != [row.answer for row in of(rows, "w0.3")]


def test_the_weights_of_a_point_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(tmp_path)
    asked = questions(plan)
    hashed: list[bool] = []
    merged = ResidentParents.merged

    def counted(self: ResidentParents, settings: Any, digests: dict[str, str] | None = None, *rest: Any) -> Any:
        hashed.append(digests is not None)
        return merged(self, settings, digests, *rest)

    monkeypatch.setattr(ResidentParents, "merged", counted)
    first, second = tasks(plan, asked, "w0.6")
    [other, *_] = tasks(plan, asked, "w0.3")
    evaluator = Evaluator(asked.models)
    rows = [row for task in (first, other, second) for row in evaluator.evaluate(task).rows]
    evaluator.close()
    assert hashed == [True, True, False]
    assert len({row.weights for row in of(rows, "w0.6")}) == 1 and len({row.weights for row in rows}) == 2


def test_a_point_whose_weights_overflow_has_a_remark_beside_its_scores(tmp_path: Path) -> None:
    parents = tmp_path / "parents"
    shutil.copytree(PARENTS, parents)
    for who in ("long", "fmt"):
        path = parents / who / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"][0] = 1e5  # the largest number of float16 is 65504
        save_file(tensors, path, {"format": "pt"})
    recipe = linear(long='"${w}"', fmt='"${1 - w}"').replace("bfloat16", "float16")
    sets = {"ruler": {"tasks": ["niah_single_1"], "lengths": [320], "items": 1}}
    plan = make(tmp_path, parents=parents, recipe=recipe, grid={"w": [0.5, 0.1]}, evaluate=sets)
    asked = questions(plan)
    evaluator = Evaluator(asked.models)
    (task,), (other,) = (tasks(plan, asked, point) for point in ("w0.5", "w0.1"))
    for again, block in (("", task), ("", other), ("again", task)):
        told = evaluator.evaluate(replace(block, key=f"{block.key}{again}")).remarks
        assert told == (f"NaN or infinity in the weights of {block.point}, in no parent",)
    evaluator.close()


def test_an_answer_ends_where_the_written_point_says_that_it_does(tmp_path: Path) -> None:
    parents = tmp_path / "parents"
    shutil.copytree(PARENTS, parents)
    digit = load_tokenizer(parents / "long")("8")["input_ids"]  # no answer may have it: every number is cut before it
    for name in ("long", "fmt"):
        (parents / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, *digit]}))
    plan = make(tmp_path, parents=parents)
    rows = [row for row in answered(plan, "w0.6") if row.length == 320]
    drive(plan, InProcessPool(), Watcher(visible=False))
    engine = TransformersEngine.from_folder(tmp_path / "runs/tiny/points/w0.6", device="cpu")
    [items] = [task.items for task in tasks(plan, questions(plan), "w0.6") if task.items.length == 320]
    asked = read_items(bytes(open_store(plan.run_url).read(items.parts[0][2])))
    prompts = [Prompt(item.prefix, item.prompt + item.answer_prefix, item.max_new_tokens) for item in asked]
    written = engine.generate(prompts)
    assert [(row.answer, row.tokens) for row in rows] == [(a.text, a.tokens_in + a.tokens_out) for a in written]
    assert not any("8" in row.answer for row in rows)
    engine._end_tokens -= {*digit}
    assert any("8" in answer.text for answer in engine.generate(prompts)), "but for the file there would be some"


def test_a_row_says_where_the_needle_lay_and_what_was_asked(tmp_path: Path) -> None:
    rows = answered(make(tmp_path), "w0.6")
    assert [(row.benchmark, row.task, row.length, row.item) for row in rows] == [
        ("ruler", "niah_single_1", length, item) for length in (320, 512) for item in range(6)
    ]
    assert all(0 <= row.depth <= 1 and row.seconds > 0 and row.finite and row.score in (0, 1) for row in rows)
    assert len({row.haystack for row in rows}) == 3, "two questions a haystack, the same ones at both lengths"
    assert [row.pair for row in rows[:6]] == [row.pair for row in rows[6:]]


def test_a_point_that_was_another_before_answers_as_if_it_were_the_first(tmp_path: Path) -> None:
    alone = answered(make(tmp_path / "alone"), "w0.3")
    after = of(answered(make(tmp_path / "after"), "w0.6", "w0.3"), "w0.3")
    timeless = [replace(row, seconds=0.0) for row in after]
    assert timeless == [replace(row, seconds=0.0) for row in alone]


def test_a_block_with_a_file_of_scores_is_not_asked_again(tmp_path: Path) -> None:
    parents = tmp_path / "parents"
    shutil.copytree(PARENTS, parents)
    plan = make(tmp_path, parents=parents)
    asked = questions(plan)
    [task, *_] = tasks(plan, asked, "w0.6")
    first = Evaluator(asked.models).evaluate(task)
    for path in parents.rglob("*.safetensors"):
        path.unlink()
    assert Evaluator(asked.models).evaluate(task) == first


def test_the_first_scores_of_a_block_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(tmp_path)
    asked = questions(plan)
    [task, *_] = tasks(plan, asked, "w0.6")
    rows = Evaluator(asked.models).evaluate(task).rows
    faster = [replace(row, seconds=0.001) for row in rows]
    store = open_store(plan.run_url)
    store.delete(task.key)
    evaluator = Evaluator(asked.models)

    def somebody_else_was_first(rows: Sequence[ScoreRow], remarks: Sequence[str]) -> bytes:
        store.write(task.key, write_scores(faster, ["a remark of theirs"]))
        return write_scores(rows, remarks)

    monkeypatch.setattr("workers.evaluating.worker.write_scores", somebody_else_was_first)
    assert evaluator.evaluate(task) == BlockScores(faster, ("a remark of theirs",))
    assert read_scores(bytes(store.read(task.key)), task.key) == faster


def test_remarks_stay_with_their_scores_and_a_file_without_any_is_the_one_of_earlier_versions() -> None:
    example: dict[str, Any] = {"str": "a", "int": 1, "float": 0.5, "bool": True, "Kind": "parent", "Status": "cut"}
    rows = [ScoreRow(**{field.name: example[str(field.type)] for field in fields(ScoreRow)})]
    with_remarks = write_scores(rows, ["em runs to 100", "… is left out"])
    assert read_block(with_remarks, "x") == BlockScores(rows, ("em runs to 100", "… is left out"))
    assert read_scores(with_remarks, "x") == rows
    without = write_scores(rows)
    assert read_block(without, "x") == BlockScores(rows)
    assert set(parquet.read_schema(io.BytesIO(with_remarks)).metadata) == {b"mergeyard.remarks"}
    assert not parquet.read_schema(io.BytesIO(without)).metadata


def test_a_file_of_an_older_version_lacks_later_columns() -> None:
    example: dict[str, Any] = {"str": "a", "int": 1, "float": 0.5, "bool": True, "Kind": "parent", "Status": "cut"}
    row = ScoreRow(**{field.name: example[str(field.type)] for field in fields(ScoreRow)})
    older = io.BytesIO()
    parquet.write_table(parquet.read_table(io.BytesIO(write_scores([row]))).drop([*LATER]), older)
    defaults: dict[str, Any] = {field.name: field.default for field in fields(ScoreRow) if field.name in LATER}
    assert read_scores(older.getvalue(), "x") == [replace(row, **defaults)]


@pytest.mark.parametrize(
    ("keys", "end", "score", "status", "thought", "answer"),
    [
        ({}, ": ", 1.0, "answered", r"\{?\"?value\"", r"\d{7}[}.]"),
        ({"chat": True}, ": ", 1.0, "answered", r"\{\"value\"", r"\d{7}[}.]"),
        ({}, "}", 0.0, "empty", r"\{?\"?value\": \d{7}", ""),
        ({}, "</think>", 0.0, "unended", r"\{?\"?value\": \d{7}\}", ""),
        ({"thinking": {"budget": 2}}, ": ", 0.0, "unended", r"\{?\"?val.*", ""),
    ],
    ids=["plain", "chat", "the value in a thought", "no end", "budget"],
)
def test_only_the_text_after_a_thought_scores(
    tmp_path: Path, keys: dict[str, Any], end: str, score: float, status: str, thought: str, answer: str
) -> None:
    """`fmt` answers `{"value": 1234567}`: the text before `end` is taken for its thought."""
    thinking = {"end": end, "budget": 16} | keys.get("thinking", {})
    needle = {"lengths": [320], "depths": 2, "items": 1, "haystack": "noise", **keys, "thinking": thinking}
    rows = answered(make(tmp_path, evaluate={"needle": needle}, grid={"w": [0.0]}), "w0")
    for row in rows:
        assert (row.score, row.status) == (score, status)
        assert re.fullmatch(thought, row.thought) and re.fullmatch(answer, row.answer.strip())
        assert 0 < row.tokens_thought <= min(thinking["budget"], row.tokens_out)


def test_samples_of_an_item_are_rows_of_its_block(tmp_path: Path) -> None:
    needle = {"lengths": [320], "depths": 2, "items": 1, "haystack": "noise", "temperature": 2, "samples": 3}
    plan = make(tmp_path, evaluate={"needle": needle}, grid={"w": [0.0]})
    rows = answered(plan, "w0")
    assert [(row.item, row.sample) for row in rows] == [(item, sample) for item in (0, 1) for sample in (0, 1, 2)]
    assert len({row.answer for row in rows}) > 2, "at this temperature no two are alike"
    again = answered(make(tmp_path / "again", evaluate={"needle": needle}, grid={"w": [0.0]}), "w0")
    assert [row.answer for row in again] == [row.answer for row in rows]


def test_a_parent_that_holds_a_nan_scores_nothing_and_says_so(tmp_path: Path) -> None:
    parents = tmp_path / "parents"
    shutil.copytree(PARENTS, parents)
    tensors = load_file(parents / "fmt" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(tensors, parents / "fmt" / "model.safetensors", metadata={"format": "pt"})
    evaluate = {**EVALUATE, "perplexity": {"lengths": [256], "blocks": 2}}
    rows = answered(make(tmp_path, parents=parents, evaluate=evaluate), "w0.6")
    assert {row.benchmark for row in rows} == {"ruler", "perplexity"}
    assert {(row.finite, row.score) for row in rows} == {(False, 0.0)}


def test_perplexity_is_the_geometric_mean_of_likelihoods_at_each_position(tmp_path: Path) -> None:
    plan = make(tmp_path, evaluate={"perplexity": {"lengths": [256, 512], "blocks": 2}})
    rows = [row for row in answered(plan, "w0.6") if row.length == 512]
    drive(plan, InProcessPool(), Watcher(visible=False))
    engine = TransformersEngine.from_folder(tmp_path / "runs/tiny/points/w0.6", device="cpu")
    sets = [task.items for task in tasks(plan, questions(plan), "w0.6") if task.items.length == 512]
    [(_, _, key)] = sets[0].parts
    windows = read_windows(bytes(open_store(plan.run_url).read(key)))
    expected: list[tuple[str, int, int, float]] = []
    for window in windows:
        ids = torch.tensor(window.tokens.tolist())[None]
        with torch.inference_mode():
            logits = engine.model(input_ids=ids).logits[0, :-1].float()
        likelihoods = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].double()
        for block, part in enumerate((likelihoods[:255], likelihoods[255:])):
            mean = math.exp(float(part.mean()))
            expected.append((f"position_block_{block}", window.index, len(part), mean))
    assert [(row.task, row.item, row.tokens) for row in rows] == [entry[:3] for entry in expected]
    assert [row.score for row in rows] == pytest.approx([entry[3] for entry in expected], rel=0.02)


def test_one_worker_answers_for_models_of_different_layouts(tmp_path: Path) -> None:
    recipe = '{merge_method: passthrough, models: [{model: "${m}"}]}'
    plan = make(tmp_path, recipe=recipe, grid={"m": ["long", "fmt"]}, point="{m}")
    asked = questions(plan)
    assert len(asked.models) == 2
    rows = answered(plan, "long", "fmt")
    for parent in ("long", "fmt"):
        engine = TransformersEngine.from_folder(PARENTS / parent, device="cpu")
        items = read_items(bytes(open_store(plan.run_url).read(tasks(plan, asked, parent)[0].items.parts[0][2])))
        prompts = [Prompt(item.prefix, item.prompt + item.answer_prefix, item.max_new_tokens) for item in items]
        assert [row.answer for row in of(rows, parent)[:6]] == [answer.text for answer in engine.generate(prompts)]


@pytest.mark.heavy
@pytest.mark.skipif(not VLLM.exists(), reason="vLLM's environment .venv-vllm is not there; `make vllm` installs it")
def test_vllm_holds_points_that_were_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEYARD_VLLM_PYTHON", str(VLLM))
    options = {"cache_gib": 1, "enforce_eager": True}
    evaluate = {**EVALUATE, "perplexity": {"lengths": [256], "blocks": 2}}
    grid: dict[str, Any] = {"grid": {"w": [0.9, 0.8]}, "evaluate": evaluate}
    rows = answered(make(tmp_path / "vllm", engine={"name": "vllm", "options": options}, **grid), "w0.9", "w0.8")
    plain = answered(make(tmp_path / "transformers", **grid), "w0.9", "w0.8")
    assert [(row.task, row.item, row.weights) for row in rows] == [(row.task, row.item, row.weights) for row in plain]
    asked = [(row, other) for row, other in zip(rows, plain, strict=True) if row.benchmark == "ruler"]
    assert sum(row.answer == other.answer for row, other in asked) >= 22, "of 24; bf16 kernels may break a tie"
    read = [(row.score, other.score) for row, other in zip(rows, plain, strict=True) if row.benchmark == "perplexity"]
    assert [score for score, _ in read] == pytest.approx([score for _, score in read], rel=0.05)


def test_the_options_that_a_job_may_give_are_those_that_the_engines_take() -> None:
    asked = set(inspect.signature(OpenAIEngine).parameters) - {"url", "tokenizer", "asked_length"}
    assert set(ENGINE_OPTIONS["openai"]) == asked
    assert set(ENGINE_OPTIONS["transformers"]) == set(inspect.signature(Limits).parameters)


@pytest.mark.parametrize("engine", ["vllm", "openai"])
def test_perplexity_at_the_whole_context_is_refused_beforehand_where_an_engine_always_generates(
    tmp_path: Path, engine: str
) -> None:
    evaluate = {"perplexity": {"lengths": [256, 4096], "blocks": 1}}
    url = {"url": "http://127.0.0.1:9/v1"} if engine == "openai" else {}
    one: dict[str, Any] = {"grid": {"w": [0.6]}, "evaluate": evaluate}
    with pytest.raises(BadInput, match=rf"job.yaml:\d+: perplexity at 4096 .* engine {engine} no room .* ask at 4095"):
        questions(make(tmp_path, engine={"name": engine, **url}, **one))
    questions(make(tmp_path, **one))
    evaluate["perplexity"]["lengths"] = [4095]
    questions(make(tmp_path, engine={"name": engine, **url}, **one))


def test_a_tokenizer_brings_no_code_to_the_tasks_of_others(tmp_path: Path) -> None:
    parents = tmp_path / "parents"
    shutil.copytree(PARENTS, parents)
    for name in ("long", "fmt"):
        path = parents / name / "tokenizer_config.json"
        foreign = {"auto_map": {"AutoTokenizer": ["them/theirs--code.Theirs", None]}}
        path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
    plan = make(tmp_path, parents=parents)
    asked = questions(plan)
    evaluator = Evaluator(asked.models)
    evaluator.evaluate(tasks(plan, asked, "w0.6")[0])
    assert evaluator._resident is not None
    folder = evaluator._resident[1].tokenizer
    assert not any("auto_map" in path.read_text() for path in folder.iterdir())
    evaluator.close()
    assert not folder.exists()


def test_an_option_reaches_the_engine(tmp_path: Path) -> None:
    small = make(tmp_path / "small", engine={"name": "transformers", "options": {"batch": 1, "chunk": 64}})
    scores = [row.score for row in answered(small, "w0.6")]
    assert scores == [row.score for row in answered(make(tmp_path / "default"), "w0.6")]
