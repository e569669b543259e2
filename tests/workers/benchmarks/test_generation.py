"""The settings of answers: a thought as the job or the chat template says, and the prompts that follow from it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BadInput
from jobs.evaluate import NeedleSpec, ThinkingSpec
from jobs.evaluation_tasks import PLAINLY, Generation
from workers.benchmarks.generation import earlier, generation_of, messages_of
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.engine import Message

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
R1 = TURN + "<think>\n{% endif %}"
MENTIONS = "{# drops what precedes </think> in earlier turns #}" + TURN + "{% endif %}"
SWITCHED = (
    TURN
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OFF_AT_FIRST = TURN + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
MAGISTRAL = "{# [THINK] and [/THINK] #}" + TURN + "{% endif %}"
GRANITE = "{% if thinking %}<system>Think between <think> and </think>.{% endif %}" + TURN + "{% endif %}"
"""As of Granite 3.3: off by default, and nothing in the assistant's turn."""
V31 = TURN + "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
"""As of DeepSeek V3.1: it closes a thought that it does not open."""
GEMMA = "{% if enable_thinking %}<|think|>{% endif %}" + TURN
GEMMA += "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
"""As of Gemma 4: an empty thought unless it is told to think; the model opens the thought itself."""
HARMONY = "{# <|channel|>analysis<|message|> in earlier turns #}" + TURN + "{% endif %}"
"""As of gpt-oss: the model writes its channels, and cannot be told not to think."""
PLAIN = TURN + "{% endif %}"


def spec(**more: Any) -> NeedleSpec:
    return NeedleSpec(lengths=(256,), place="job.yaml:7", **({"chat": True} | more))


@pytest.fixture(scope="module")
def tokenizer_json(parents: Path) -> bytes:
    return (parents / "base" / "tokenizer.json").read_bytes()


def settings(tokenizer_json: bytes, template: str, **more: Any) -> Generation:
    return generation_of(spec(**more), chat_of(tokenizer_json, template), 0)[1]


@cache  # one process renders the template for all tests of it
def chat_of(tokenizer_json: bytes, template: str) -> Tokenizer:
    return Tokenizer.from_files({"tokenizer.json": tokenizer_json}, place="here", chat_template=template)


EMPTY = "<assistant><think>\n\n</think>\n\n"
ON = ThinkingSpec()


@pytest.mark.parametrize(
    ("template", "more", "end", "opened", "after"),
    [
        (R1, {}, "</think>", True, "<assistant><think>\n"),
        (R1, {"thinking": ON}, "</think>", True, "<assistant><think>\n"),
        (R1, {"thinking": False}, "", False, EMPTY),
        (MENTIONS, {}, "</think>", False, "<assistant>"),
        (MENTIONS, {"thinking": False}, "", False, EMPTY),
        (SWITCHED, {}, "</think>", False, "<assistant>"),
        (SWITCHED, {"thinking": False}, "", False, EMPTY),
        (SWITCHED, {"chat": {"enable_thinking": False}}, "", False, EMPTY),
        (OFF_AT_FIRST, {}, "", False, EMPTY),
        (OFF_AT_FIRST, {"thinking": ON}, "</think>", True, "<assistant><think>\n"),
        (GRANITE, {}, "", False, "<assistant>"),
        (GRANITE, {"thinking": False}, "", False, "<assistant>"),
        (GRANITE, {"chat": {"thinking": False}}, "", False, "<assistant>"),
        (V31, {}, "", False, "<assistant></think>"),
        (V31, {"thinking": ON}, "</think>", True, "<assistant><think>"),
        (V31, {"thinking": False}, "", False, "<assistant></think>"),
        (MAGISTRAL, {}, "[/THINK]", False, "<assistant>"),
        ("{# thinking is on #}" + MAGISTRAL, {"thinking": False}, "", False, "<assistant>[THINK]\n\n[/THINK]\n\n"),
        (GEMMA, {}, "", False, "<assistant><|channel>thought\n<channel|>"),
        (GEMMA, {"thinking": False}, "", False, "<assistant><|channel>thought\n<channel|>"),
        (HARMONY, {}, "<|channel|>final<|message|>", False, "<assistant>"),
        (HARMONY, {"thinking": ON}, "<|channel|>final<|message|>", False, "<assistant>"),
        (
            HARMONY,
            {"thinking": False},
            "",
            False,
            "<assistant><|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        (PLAIN, {}, "", False, "<assistant>"),
        (PLAIN, {"thinking": ON}, "</think>", False, "<assistant>"),
        (PLAIN, {"thinking": ThinkingSpec(end="</reason>")}, "</reason>", False, "<assistant>"),
        (PLAIN, {"thinking": False}, "", False, "<assistant>"),
    ],
)
def test_the_template_shows_the_thought_and_the_job_may_say_otherwise(
    tokenizer_json: bytes, template: str, more: dict[str, Any], end: str, opened: bool, after: str
) -> None:
    found = settings(tokenizer_json, template, **more)
    assert (found.end, found.opened, found.frame) == (end, opened, ("<user>", after))
    assert found.budget == (4096 if end else 0)
    assert found.found == (bool(end) and "thinking" not in more)


@pytest.mark.parametrize("more", [{"thinking": ON}, {"chat": {"thinking": True}}])
def test_a_template_that_waits_for_an_argument_thinks_with_it(tokenizer_json: bytes, more: dict[str, Any]) -> None:
    found = settings(tokenizer_json, GRANITE, **more)
    assert (found.end, found.template) == ("</think>", (("thinking", True),))
    assert found.frame == ("<system>Think between <think> and </think>.<user>", "<assistant>")
    if "chat" in more:
        assert settings(tokenizer_json, GRANITE, **more, thinking=False).frame == (found.frame[0], EMPTY)


def test_gemma_4_thinks_in_a_channel_when_told(tokenizer_json: bytes) -> None:
    found = settings(tokenizer_json, GEMMA, thinking=ON)
    assert (found.end, found.frame) == ("<channel|>", ("<|think|><user>", "<assistant>"))


def test_a_template_that_closes_the_thought_of_a_job_is_refused(tokenizer_json: bytes) -> None:
    never = PLAIN.replace("<assistant>", "<assistant><think></think>")
    refused = r"^job.yaml:7: the chat template ends the thought before the answer; give the argument that lets it think"
    with pytest.raises(BadInput, match=refused):
        settings(tokenizer_json, never, thinking=ON)
    switched = {"thinking": ThinkingSpec(template={"enable_thinking": True}), "chat": {"enable_thinking": False}}
    assert settings(tokenizer_json, OFF_AT_FIRST, **switched).end, "the remedy"
    assert not settings(tokenizer_json, never, thinking=False).end, "the other remedy"


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ({"chat": {"enable_thinkin": False}}, 'did you mean "enable_thinking"'),
        ({"thinking": ThinkingSpec(template={"level": "high"})}, "take it out"),
    ],
)
def test_an_argument_that_the_template_does_not_read_is_refused(
    tokenizer_json: bytes, more: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(BadInput, match=rf'^job.yaml:7: the chat template reads no "\w+"; {remedy}'):
        settings(tokenizer_json, SWITCHED, **more)


def test_plain_texts_think_where_the_job_says_so(tokenizer_json: bytes) -> None:
    assert settings(tokenizer_json, R1, chat=False) == PLAINLY
    thinks = settings(tokenizer_json, R1, chat=False, thinking=ThinkingSpec(budget=64))
    assert thinks == Generation(end="</think>", budget=64)


def test_the_system_speaks_first(tokenizer_json: bytes) -> None:
    found = settings(tokenizer_json, PLAIN, system="Think first.")
    assert found.frame == ("<system>Think first.<user>", "<assistant>")
    assert messages_of("<system>Think first.<user>Where?<assistant>", " It is", found) == (
        Message("system", "Think first."),
        Message("user", "Where?"),
        Message("assistant", " It is"),
    )


def test_messages_are_those_of_the_text_with_a_worked_example(tokenizer_json: bytes) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant><think>\n"
    files = {"tokenizer.json": tokenizer_json}
    tokenizer = Tokenizer.from_files(files, place="here", chat_template=template)
    _, found = generation_of(spec(), tokenizer, 0, worked_example=True)
    assert found.turns == ("</s><assistant>", "</s><user>"), "no thought is opened in front of an earlier answer"
    text = "<user>How many?</s><assistant> 1. one</s><user>And now?</s><assistant><think>"
    assert messages_of(text, "", found) == (
        Message("user", "How many?"),
        Message("assistant", " 1. one"),
        Message("user", "And now?"),
    )


def test_earlier_versions_closed_a_thought_that_only_the_template_shows(tokenizer_json: bytes) -> None:
    tokenizer = Tokenizer.from_files({"tokenizer.json": tokenizer_json}, place="here", chat_template=R1)
    assert earlier(tokenizer, generation_of(spec(), tokenizer, 0)[1]).frame == ("<user>", EMPTY)
    asked = generation_of(spec(thinking=ON), tokenizer, 0)[1]
    assert earlier(tokenizer, asked) == asked


def test_prompts_equal_those_of_transformers(tokenizer_json: bytes, parents: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(parents / "base")
    reference.chat_template = SWITCHED
    for thinking in (True, False):
        before, after = settings(tokenizer_json, SWITCHED, thinking=ON if thinking else False).frame
        theirs = reference.apply_chat_template(
            [{"role": "user", "content": "a"}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        assert before + "a" + after == theirs, json.dumps(thinking)
