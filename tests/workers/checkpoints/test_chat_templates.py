"""The named chat templates say what their makers' pages say; a text that is no chat template is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.errors import BadInput, CorruptData
from jobs.recipe import CHAT_TEMPLATES
from tests.orchestrator.models import weights, write_model
from workers.checkpoints.chat_templates import NAMED, check_template, jinja, template_of
from workers.checkpoints.opening import open_checkpoint

SYSTEM, QUESTION, ANSWER, NEXT = (
    {"role": role, "content": text}
    for role, text in (("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yo."), ("user", "And?"))
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nHi?\n\n### Response:\n"
)


def rendered(name: str, *messages: dict[str, str], opens: bool = True) -> str:
    template = jinja().from_string(NAMED[name])
    return template.render(
        messages=messages, add_generation_prompt=opens, bos_token="<s>", eos_token="</s>", raise_exception=refuse
    )


def refuse(message: str) -> None:
    raise ValueError(message)


def test_every_name_of_a_recipe_has_its_template():
    assert {"auto", *NAMED} == {*CHAT_TEMPLATES}


@pytest.mark.parametrize(
    ("name", "first", "later"),
    [
        (
            "chatml",
            "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYo."
            "<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYo.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] Hi? [/INST]", "<s>[INST] Be brief.\n\nHi? [/INST] Yo.</s>[INST] And? [/INST]"),
        (
            "exaone",
            "[|system|][|endofturn|]\n[|user|]Hi?\n[|assistant|]",
            "[|system|]Be brief.[|endofturn|]\n[|user|]Hi?\n[|assistant|]Yo.[|endofturn|]\n[|user|]And?\n[|assistant|]",
        ),
        (
            "alpaca",
            ALPACA,
            "Be brief.\n\n### Instruction:\nHi?\n\n### Response:\nYo.</s>\n\n### Instruction:\nAnd?\n\n### Response:\n",
        ),
    ],
)
def test_a_named_template_writes_the_public_format(name: str, first: str, later: str):
    assert rendered(name, QUESTION) == first
    assert rendered(name, SYSTEM, QUESTION, ANSWER, NEXT) == later
    assert first.startswith(rendered(name, QUESTION, opens=False))


def test_no_named_template_drops_a_message_without_a_word():
    for name in NAMED:
        try:
            assert "tool says" in rendered(name, QUESTION, {"role": "tool", "content": "tool says"})
        except ValueError as error:
            assert str(error) == "no place for the role tool"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for message in messages %}{{ message.content }}", "is not Jinja (Unexpected end of template"),
        ("{{ messages | no_such_filter }}", "is not Jinja (No filter named 'no_such_filter'., line 1)"),
        ("{{ 'hello' }}", "never names `messages`"),
        ("{{ " + "(" * 5000 + "messages" + ")" * 5000 + " }}", "is not Jinja"),
    ],
)
def test_a_text_that_is_no_chat_template_is_refused(template: str, said: str):
    with pytest.raises(BadInput) as refused:
        check_template(template, "job.yaml:7")
    assert str(refused.value).startswith("job.yaml:7: the chat template ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_templates_with_generation_marks_and_loop_controls_are_chat_templates():
    check_template(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}", ""
    )


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"chat_template.jinja": "{{ a }}", "tokenizer_config.json": {"chat_template": "{{ b }}"}}, "{{ a }}"),
        (
            {"tokenizer_config.json": {"chat_template": "{{ b }}"}, "chat_template.json": {"chat_template": "c"}},
            "{{ b }}",
        ),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
                }
            },
            "d",
        ),
        ({"tokenizer_config.json": {"chat_template": [7, {"name": [], "template": 7}]}}, None),
        ({"tokenizer_config.json": {"chat_template": None}, "chat_template.json": {"chat_template": "c"}}, "c"),
        ({"tokenizer_config.json": {}}, None),
        ({}, None),
    ],
)
def test_the_template_of_a_checkpoint_is_the_one_that_transformers_takes(
    tmp_path: Path, files: dict[str, object], found: str | None
):
    write_model(tmp_path, weights("cos"))
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert template_of(open_checkpoint(str(tmp_path), "cos")) == found


def test_a_template_that_is_not_text_is_a_damaged_parent(tmp_path: Path):
    write_model(tmp_path, weights("cos"))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptData, match=r"chat_template\.jinja: not a text in UTF-8"):
        template_of(open_checkpoint(str(tmp_path), "cos"))
