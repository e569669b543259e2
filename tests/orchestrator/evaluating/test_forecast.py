"""What an evaluation can show, against the figures of the literature and arithmetic."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.report.terminal.run import gate_forecast
from tests.orchestrator.conftest import Ended
from tests.orchestrator.scripts import scripted
from tests.orchestrator.tiny_jobs import PARENTS, SOUP, job_text
from workers.benchmarks.ruler.tasks import MAX_NEW_TOKENS

Mergeyard = Callable[..., Ended]
LENGTHS = [256, 512, 1024, 2048, 3000, 4000]


@pytest.fixture
def planned(mergeyard: Mergeyard, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """planned(evaluate=…, gate=…): what `mergeyard plan --json` says of the evaluation."""

    def plan(**keys: Any) -> dict[str, Any]:
        parents = {name: str(PARENTS / name) for name in ("long", "fmt")}
        (tmp_path / "job.yaml").write_text(
            job_text(tmp_path, **{"parents": parents, "recipe": SOUP, "grid": {"w": [0.3, 0.5, 0.7]}, **keys})
        )
        ended = mergeyard("plan", tmp_path / "job.yaml", "--json")
        assert ended.code == 0, ended.err
        return json.loads(ended.out)["evaluation"]

    return plan


def ruler(**keys: Any) -> dict[str, Any]:
    return {"ruler": {"tasks": ["niah_single_1"], "lengths": [512], **keys}}


@pytest.mark.parametrize(
    ("items", "lengths", "overall", "at_one"),
    # (z(1 − 0.05/6) + z(0.8)) · √(0.1 / items): at Holm's first step of three points
    [(500, [512], [4.63], [4.63]), (6500, LENGTHS, [0.52, 1.27], [1.27])],
)
def test_the_smallest_difference_at_ten_percent_discordance(
    planned: Callable[..., dict[str, Any]],
    items: int,
    lengths: list[int],
    overall: list[float],
    at_one: list[float],
) -> None:
    sees = planned(evaluate=ruler(items=items, lengths=lengths))["sees"]
    assert sees["overall"] == pytest.approx(overall, rel=0.03)
    assert sees["comparisons"] == 3 and not sees["measured"]
    assert all(found == pytest.approx(at_one, rel=0.03) for found in sees["lengths"].values())


def test_eight_questions_a_haystack_are_worth_fewer(planned: Callable[..., dict[str, Any]]) -> None:
    [alone] = planned(evaluate=ruler(items=4000))["sees"]["overall"]
    [shared] = planned(evaluate=ruler(items=4000, questions=8))["sees"]["overall"]
    assert shared / alone == pytest.approx((1 + 7 * 0.1) ** 0.5, rel=0.08)  # and 500 haystacks, not 4,000, show losses


def test_depths_share_no_haystack(planned: Callable[..., dict[str, Any]]) -> None:
    sees = planned(evaluate={"needle": {"lengths": [512], "depths": 5, "items": 100}})["sees"]
    assert sees["overall"] == pytest.approx([4.63], rel=0.03) and sees["correlation"] is None


def test_two_haystacks_show_nothing(planned: Callable[..., dict[str, Any]]) -> None:
    assert planned(evaluate=ruler(items=2))["sees"]["overall"] == [None]


def test_a_margin_of_one_point_needs_six_thousand_items(planned: Callable[..., dict[str, Any]]) -> None:
    gate = planned(evaluate=ruler(items=500), gate={"baseline": "fmt", "budget": 500})["gate"]
    # one look: (1.645 + 0.842)² · 0.1 / 0.01²
    assert gate["items_needed"] == pytest.approx([6183], rel=0.02)
    assert (gate["items_at_first"], gate["items_at_most"]) == (500, 500)


def test_a_gate_that_looks_again_needs_more_and_says_how_many_it_may_ask(
    planned: Callable[..., dict[str, Any]],
) -> None:
    gate = planned(evaluate=ruler(items=500), gate={"baseline": "fmt", "length_margin": 2})["gate"]
    assert gate["items_needed"][0] > 1.5 * 6183
    assert (gate["items_at_first"], gate["items_at_most"]) == (500, 2000)
    assert gate["items_needed_a_length"][0] < gate["items_needed"][0] / 3


def test_a_gate_that_follows_the_remedy_has_enough_items(planned: Callable[..., dict[str, Any]]) -> None:
    asked = ruler(items=100, lengths=[256, 512])
    remedy = planned(evaluate=asked, gate={"baseline": "fmt", "margin": 4})["gate"]["remedy"]
    assert remedy["sure"] and remedy["length_margin"] is None
    for way in ({"margin": 4, "budget": remedy["budget"]}, {"margin": remedy["margin"]}):
        assert planned(evaluate=asked, gate={"baseline": "fmt", **way})["gate"]["remedy"] is None
    less = {"baseline": "fmt", "margin": 0.9 * remedy["margin"]}
    assert not planned(evaluate=asked, gate=less)["gate"]["remedy"]["sure"], "enough if the lengths do not agree"


@pytest.mark.parametrize("margins", [{}, {"length_margin": 2.0}])
def test_a_gate_of_one_haystack_is_told_only_remedies_that_help(
    planned: Callable[..., dict[str, Any]], margins: dict[str, float]
) -> None:
    asked, gate = ruler(items=8, questions=8), {"baseline": "fmt", **margins}
    facts = planned(evaluate=asked, gate={**gate, "budget": 8})["gate"]
    assert facts["remedy"]["margin"] is None and facts["remedy"]["length_margin"] is None
    said = gate_forecast(facts)
    assert said.endswith(f", and the gate asks 8 at first, 8 at most; give gate.budget: {facts['remedy']['budget']}")
    followed = planned(evaluate=asked, gate={**gate, "budget": facts["remedy"]["budget"]})["gate"]
    assert followed["remedy"] is None, "also as the gate then looks again, which costs items"
    assert gate_forecast({**facts, "remedy": {**facts["remedy"], "budget": None}}).endswith("; ask more haystacks")


def test_a_gate_told_two_margins_needs_both(planned: Callable[..., dict[str, Any]]) -> None:
    asked, gate = ruler(items=60, lengths=[256, 512]), {"baseline": "fmt", "margin": 40, "length_margin": 2}
    facts = planned(evaluate=asked, gate=gate)["gate"]
    margins = {key: facts["remedy"][key] for key in ("margin", "length_margin")}
    assert margins["margin"] == 40 and 2 < margins["length_margin"] < 40
    assert gate_forecast(facts).endswith(f" or gate.margin: 40 and gate.length_margin: {margins['length_margin']:g}")
    assert planned(evaluate=asked, gate={**gate, **margins})["gate"]["remedy"] is None


def test_what_will_be_read_is_counted(planned: Callable[..., dict[str, Any]]) -> None:
    facts = planned(evaluate={**ruler(items=40, lengths=[256, 512]), "race": {"keep": 1}})
    assert (facts["points"], facts["baselines"]) == (3, 2)
    assert (facts["items_a_point"], facts["tokens_a_point"]) == (80, 40 * 768)
    assert (facts["items"], facts["tokens"]) == (5 * 80, 5 * 40 * 768)
    # 10 items of each of three points; the one that stays answers 30 more, and 20 fresh ones; both parents all
    assert facts["race"]["least_tokens"] == (3 * 10 + 30 + 20 + 2 * 40) * 768


def test_likelihoods_have_no_smallest_difference(planned: Callable[..., dict[str, Any]]) -> None:
    facts = planned(evaluate={"perplexity": {"lengths": [512], "blocks": 4}}, gate={"baseline": "fmt"})
    assert (facts["sees"], facts["gate"], facts["items_a_point"]) == (None, None, 4)


def test_thoughts_are_counted_beside_the_context(planned: Callable[..., dict[str, Any]]) -> None:
    without = planned(evaluate=ruler(items=10))
    thinks = planned(evaluate=ruler(items=10, thinking={"budget": 64}))
    assert without["thinking"] == [] and without["generated_a_point"] == 10 * 128
    thought = {"benchmark": "ruler", "end": "</think>", "budget": 64, "opened": False, "found": False}
    assert thinks["thinking"] == [thought]
    assert thinks["tokens_a_point"] == without["tokens_a_point"] + 10 * 64
    assert thinks["generated_a_point"] == 10 * (128 + 64)


def test_long_answers_on_a_gpu_are_better_asked_of_vllm(mergeyard: Mergeyard, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"parents": {name: str(PARENTS / name) for name in ("long", "fmt")}, "recipe": SOUP}
    said = "make decoding most of the work; `engine: vllm` decodes faster on a GPU"

    def told(*, thinking: Any = None, length: int = 512, **more: Any) -> bool:
        asked = ruler(items=10, lengths=[length], **({} if thinking is None else {"thinking": thinking}))
        (tmp_path / "job.yaml").write_text(
            job_text(tmp_path, **keys, grid={"w": [0.5]}, evaluate=asked, keep="all", **more)
        )
        ended = mergeyard("plan", tmp_path / "job.yaml")
        assert ended.code == 0, ended.err
        written = "CPUs merge written points as fast as a GPU: 1 CPU merges 2 GB/s of parents, storage reads 1 GB/s"
        assert (written in ended.out) == ("workers" in more)
        return said in ended.out

    gpus = {"workers": {"gpus": 1}}
    assert told(length=256, **gpus), "128 tokens of an answer are half of the length"
    assert told(thinking={"budget": 64}, **gpus)
    assert not told(**gpus) and not told(thinking={"budget": 64})
    assert not told(thinking={"budget": 64}, engine="vllm", **gpus)


def test_the_job_of_two_reasoners_is_planned_with_its_cost(mergeyard: Mergeyard, tmp_path: Path) -> None:
    text = (PARENTS.parent / "seed.yaml").read_text(encoding="utf-8")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]<think>\n"
    job = yaml.safe_load(text)
    for name in job["parents"]:
        folder = tmp_path / name
        shutil.copytree(PARENTS / "long", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 131072}))
        (folder / "chat_template.jinja").write_text(template)
        job["parents"][name] = str(folder)
    tasks = {task: new for task, new in MAX_NEW_TOKENS.items() if task not in ("qa_1", "qa_2", "cwe")}
    job["evaluate"]["ruler"]["tasks"] = [*tasks]  # cwe has words that the tiny tokenizer spells out
    job |= {"output": str(tmp_path / "runs"), "workers": {"cpus": 1}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    ended = mergeyard("plan", tmp_path / "job.yaml", "--json")
    assert ended.code == 0, ended.err
    facts = ended.facts["evaluation"]
    lengths = [4096, 8192, 16384, 32768, 65536, 126976]
    thoughts = 100 * 6 * sum(new + 4096 for new in tasks.values()) + 2 * 55 * (32 + 4096)
    assert facts["generated_a_point"] == thoughts
    assert facts["tokens_a_point"] == 100 * 11 * (sum(lengths) + 6 * 4096) + 55 * (4096 + 126976 + 2 * 4096)
    opened = {"end": "</think>", "budget": 4096, "opened": True, "found": False}
    assert facts["thinking"] == [{"benchmark": name, **opened} for name in ("ruler", "needle")] + [
        {"benchmark": "lm_eval", **opened, "found": True}
    ]
    assert facts["race"]["least_tokens"] < facts["tokens"]


def test_a_thought_beyond_the_context_is_refused(mergeyard: Mergeyard, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"parents": {name: str(PARENTS / name) for name in ("long", "fmt")}, "recipe": SOUP}
    keys |= {"grid": {"w": [0.5]}}

    def plan(length: int, budget: int = 96, *, off: bool = False) -> Ended:
        thinking = False if off else {"budget": budget}
        evaluate = {"ruler": {"tasks": ["niah_single_1"], "lengths": [length], "items": 2, "thinking": thinking}}
        (tmp_path / "job.yaml").write_text(job_text(tmp_path, **keys, evaluate=evaluate))
        return mergeyard("plan", tmp_path / "job.yaml")

    refused = plan(4096)
    assert (
        refused.code == 2 and "niah_single_1 at 4096 tokens and a thought of 96 are beyond the model's" in refused.err
    )
    [length] = re.findall(r"ask at (\d+) tokens", refused.err)
    told = plan(int(length))
    assert told.code == 0, told.err
    assert "ruler: a thought of at most 96 tokens before each answer, up to </think>" in told.out
    refused = plan(256, 10**6)
    assert "ask at" not in refused.err, "no length leaves room for the thought"
    [budget] = re.findall(r"take `thinking: {budget: (\d+)}`", refused.err)
    told = plan(256, int(budget))
    assert told.code == 0 and "no difference: the items are too few; ask more" in told.out
    assert refused.err.endswith(", or set `thinking: off`\n") and plan(256, off=True).code == 0


def test_a_thought_that_leaves_a_task_of_the_harness_no_prompt_is_refused(mergeyard: Mergeyard, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"parents": {name: str(PARENTS / name) for name in ("long", "fmt")}, "recipe": SOUP}
    (tmp_path / "mine.yaml").write_text("task: mine\n")

    def plan(thinking: bool | dict[str, int]) -> Ended:
        evaluate = {"lm_eval": {"tasks": ["mine.yaml"], "thinking": thinking}}
        (tmp_path / "job.yaml").write_text(job_text(tmp_path, **keys, grid={"w": [0.5]}, evaluate=evaluate))
        return mergeyard("plan", tmp_path / "job.yaml")

    refused = plan({"budget": 10**6})
    assert refused.code == 2 and "a thought of 1000000 tokens fills the model's" in refused.err
    [budget] = re.findall(r"take `thinking: {budget: (\d+)}` or less, or set `thinking: off`$", refused.err.strip())
    assert plan({"budget": int(budget)}).code == 0 and plan(False).code == 0


def test_the_plan_says_it_in_words(mergeyard: Mergeyard, tmp_path: Path) -> None:
    parents = {name: str(PARENTS / name) for name in ("long", "fmt")}
    gate = {"baseline": "fmt", "budget": 500}
    text = job_text(tmp_path, parents=parents, recipe=SOUP, grid={"w": [0.5]}, evaluate=ruler(items=500), gate=gate)
    (tmp_path / "job.yaml").write_text(text)
    out = mergeyard("plan", tmp_path / "job.yaml").out
    assert "1 point and 2 parents, 500 items and at most 256 k tokens each: 1,500 items, 768 k tokens" in out
    assert "a difference of 4 points from a parent, or 4 at 512 (8 times in 10, if 10% of their answers differ)" in out
    assert "at the margin of 1 an equal model cannot pass: it needs about 6," in out
    assert "and the gate asks 500 at first, 500 at most; give gate.budget: " in out and " or gate.margin: 3.6" in out


def test_questions_that_are_too_long_are_named_by_plan_and_evaluate(mergeyard: Mergeyard, tmp_path: Path) -> None:
    row = {"question": "?", "answer": "A", "difficulty": "easy"} | {f"choice_{letter}": letter for letter in "ABCD"}
    rows = [{**row, "context": "So it goes. " * long} for long in (10, 20, 900, 1000, 1100)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    asked = {"longbench_v2": {"lengths": [512], "data": str(tmp_path), "max_new_tokens": 8}}
    parents = {name: str(PARENTS / name) for name in ("long", "fmt")}
    (tmp_path / "job.yaml").write_text(
        job_text(tmp_path, parents=parents, recipe=SOUP, grid={"w": [0.5]}, evaluate=asked)
    )
    said = "3 questions of easy, as they are too long for the lengths"
    assert f"not asked     {said}" in mergeyard("plan", tmp_path / "job.yaml").out
    with scripted(lambda task, item: f"The correct answer is ({item.answers[0]})"):
        ended = mergeyard("evaluate", tmp_path / "job.yaml", "--in-process")
    assert ended.code == 0 and f"not asked: {said}" in ended.err + ended.out
    assert "100.0" in ended.out and "effective" not in ended.out, "guessing gives 25: no effective length"


def test_the_answers_of_the_parents_replace_the_assumptions(mergeyard: Mergeyard, tmp_path: Path) -> None:
    parents = {name: str(PARENTS / name) for name in ("long", "fmt")}
    text = job_text(tmp_path, parents=parents, recipe=SOUP, grid={"w": [0.5]}, evaluate=ruler(items=40))
    (tmp_path / "job.yaml").write_text(text)
    before = json.loads(mergeyard("plan", tmp_path / "job.yaml", "--json").out)["evaluation"]["sees"]
    with scripted(lambda task, item: item.answers[0]):
        assert mergeyard("evaluate", tmp_path / "job.yaml", "--in-process").code == 0
    same = mergeyard("plan", tmp_path / "job.yaml", "--json").facts["evaluation"]["sees"]
    assert same == before, "parents that agree on everything measure nothing"
    shutil.rmtree(tmp_path / "runs")
    with scripted(lambda task, item: "" if task.point == "fmt" and item.index % 4 == 0 else item.answers[0]):
        assert mergeyard("evaluate", tmp_path / "job.yaml", "--in-process").code == 0
    ended = mergeyard("plan", tmp_path / "job.yaml", "--json")
    sees = json.loads(ended.out)["evaluation"]["sees"]
    assert (before["discordance"], before["measured"]) == (0.1, False)
    assert (sees["discordance"], sees["measured"]) == (0.25, True)
    assert sees["overall"][0] > before["overall"][0]
    assert "(8 times in 10, if answers differ as those of the parents)" in mergeyard("plan", tmp_path / "job.yaml").out
