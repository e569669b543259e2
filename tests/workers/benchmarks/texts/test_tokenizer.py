from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from jobs.errors import BadInput, CorruptData
from workers.benchmarks.texts.tokenizer import Tokenizer

TEXT = "One of the special magic numbers for quiet-fox is: 4815162.\n„Größe“ 1234567 …\n\nEnd."


def test_encoding_equals_transformers(tokenizer: Tokenizer, parents: Path) -> None:
    reference = AutoTokenizer.from_pretrained(parents / "base")
    assert tokenizer.encode(TEXT) == reference(TEXT).input_ids
    assert tokenizer.count(TEXT) == len(reference(TEXT).input_ids)
    assert tokenizer.count_each([TEXT, "", "a"]) == [len(reference(text).input_ids) for text in (TEXT, "", "a")]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_chat_frame_is_what_transformers_puts_around_a_message(tokenizer: Tokenizer, parents: Path) -> None:
    reference = AutoTokenizer.from_pretrained(parents / "base")
    whole = reference.apply_chat_template(
        [{"role": "user", "content": TEXT}], tokenize=False, add_generation_prompt=True
    )
    before, after = tokenizer.chat_frame()
    assert before + TEXT + after == whole


def test_the_next_turn_is_what_transformers_puts_after_an_answer(tokenizer: Tokenizer, parents: Path) -> None:
    reference = AutoTokenizer.from_pretrained(parents / "base")
    contents = [("user", TEXT), ("assistant", "4815162."), ("user", "And now?")]
    whole = reference.apply_chat_template(
        [{"role": role, "content": content} for role, content in contents], tokenize=False, add_generation_prompt=True
    )
    before, after = tokenizer.chat_frame()
    assert before + TEXT + after + "4815162." + tokenizer.next_turn() + "And now?" + after == whole


def test_a_template_of_a_single_message_has_no_next_turn(parents: Path) -> None:
    files = {"tokenizer.json": (parents / "base" / "tokenizer.json").read_bytes()}
    single = Tokenizer.from_files(files, place="here", chat_template="[{{ messages[0].content }}]")
    assert single.chat_frame() == ("[", "]")
    told = "here/tokenizer.json: the chat template does not show a second message; leave out cwe, or ask it plainly"
    with pytest.raises(BadInput, match=f"^{told}$"):
        single.next_turn()


def test_beginning_of_text_is_written_once_whoever_writes_it() -> None:
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.add_special_tokens(["<s>"])
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    silent = Tokenizer(plain.to_str().encode(), chat_template=template, special_tokens={"bos_token": "<s>"})
    assert silent.encode("".join(silent.chat_frame()) + "a") == [0, 1]
    plain.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    adding = Tokenizer(plain.to_str().encode(), chat_template=template, special_tokens={"bos_token": "<s>"})
    assert adding.encode("".join(adding.chat_frame()) + "a") == [0, 1]
    assert adding.count_each(["a"], special_tokens=False) == [1]


LOOP = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}" + LOOP, ("26 Jul 2024[", "]")),
        ("{% for m in messages %}[{{ m.content }}]{% break %}{% endfor %}", ("[", "]")),
        ("{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}", ("[", "]")),
        (LOOP + "{{ eos_token }}", ("[", "]<|endoftext|>")),
        ([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": LOOP}], ("[", "]")),
    ],
)
def test_chat_templates_are_rendered_as_transformers_does_but_for_the_date(
    parents: Path, template: str | list[dict[str, str]], expected: tuple[str, str]
) -> None:
    files = {"tokenizer.json": (parents / "base" / "tokenizer.json").read_bytes()}
    config = {"chat_template": template, "eos_token": {"content": "<|endoftext|>"}}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    assert Tokenizer.from_files(files, place="here").chat_frame() == expected
    if "strftime_now" not in str(template):
        reference = AutoTokenizer.from_pretrained(parents / "base")
        reference.chat_template = template if isinstance(template, str) else template[1]["template"]
        whole = reference.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False)
        assert whole == expected[0] + TEXT + expected[1]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", r"here/tokenizer.json: the chat template fails \(Unexpected end of template"),
        (
            "{{ messages[0].content.parts[0].text }}",
            r"here/tokenizer.json: the chat template fails \('str object' has no",
        ),
        ("{{ 1 + messages[0].content }}", r"here/tokenizer.json: the chat template fails \(unsupported operand"),
        ("{{ raise_exception('only\nsystem') }}", r"chat template: only system$"),
        ("{{ messages | length }}", "the chat template does not show the user's message"),
    ],
)
def test_a_chat_template_that_cannot_ask_is_refused_in_one_line(parents: Path, template: str, message: str) -> None:
    files = {"tokenizer.json": (parents / "base" / "tokenizer.json").read_bytes()}
    with pytest.raises(BadInput, match=message) as refused:
        Tokenizer.from_files(files, place="here", chat_template=template).chat_frame()
    assert "\n" not in str(refused.value)


def test_token_ends_cut_the_text_where_tokens_end(tokenizer: Tokenizer) -> None:
    text = "The grass is green. Here we go."
    ends = tokenizer.token_ends(text)
    pieces = [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    assert "".join(pieces) == text
    assert len(pieces) == tokenizer.count(text)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptData, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_no_chat_template_is_refused(parents: Path) -> None:
    bare = Tokenizer((parents / "base" / "tokenizer.json").read_bytes())
    with pytest.raises(BadInput, match="no chat template"):
        bare.chat_frame()
