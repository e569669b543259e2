from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from jobs.errors import BadInput, CorruptData
from workers.benchmarks.texts import chat_template
from workers.benchmarks.texts.chat_template import ChatTemplate
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.tokenizer import encode_prompt, load_tokenizer

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
    (before, after), (to_answer, to_next) = tokenizer.chat_frame(), tokenizer.turns()
    assert before + TEXT + to_answer + "4815162." + to_next + "And now?" + after == whole


def test_a_template_of_a_single_message_has_no_next_turn(parents: Path) -> None:
    files = {"tokenizer.json": (parents / "base" / "tokenizer.json").read_bytes()}
    single = Tokenizer.from_files(files, place="here", chat_template="[{{ messages[0].content }}]")
    assert single.chat_frame() == ("[", "]")
    told = "here/tokenizer.json: the chat template does not show a second message; leave out cwe, or ask it plainly"
    with pytest.raises(BadInput, match=f"^{told}"):
        single.turns()


def test_a_template_that_shows_the_last_of_three_messages_twice_has_no_next_turn() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}|{% endfor %}{% if messages[1:] %}{{ messages[-1].content }}{% endif %}"
    )
    with ChatTemplate(template, {}, "here") as chat:
        assert chat.frame() == ("", "|")
        with pytest.raises(BadInput, match="here: the chat template shows a message twice; leave out cwe, or ask it"):
            chat.turns()


SPECIAL = [("<s>", 0), ("</s>", 1)]
ADDING = {"nothing": None, "first": "<s> $A", "last": "$A </s>", "both": "<s> $A </s>"}
WRITING = {
    "nothing": "[{{ messages[0].content }}]",
    "by name": "{{ bos_token }}[{{ messages[0].content }}]{{ eos_token }}a",
    "as text": "<s>[{{ messages[0].content }}]",
}


@pytest.fixture(params=ADDING)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tokenizer that adds special tokens around a text."""
    words = {"<s>": 0, "</s>": 1, "[UNK]": 2, "[": 3, "]": 4, "a": 5, "b": 6}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.add_special_tokens(["<s>", "</s>"])
    if ADDING[request.param]:
        post = tokenizers.processors.TemplateProcessing(single=ADDING[request.param], special_tokens=SPECIAL)
        plain.post_processor = post
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return tmp_path


def test_a_plain_text_begins_as_in_transformers_and_never_ends_with_an_end_token(folder: Path) -> None:
    tokenizer, reference = Tokenizer.from_folder(folder), load_tokenizer(folder)
    front = [0] if reference("a b").input_ids[0] == 0 else []
    for text, expected in (("a b", [*front, 5, 6]), ("<s>a b", [0, 5, 6]), ("", front)):
        assert tokenizer.encode(text) == encode_prompt(reference, text, bare=False) == expected
        assert tokenizer.count(text) == tokenizer.count_each([text])[0] == len(expected)
    assert tokenizer.count_each(["a b"], special_tokens=False) == [2]
    long = "a b " * 1000
    assert tokenizer.count(long) == len(tokenizer.encode(long)) == len(front) + 2000


@pytest.mark.parametrize("template", WRITING.values(), ids=WRITING)
def test_a_text_in_a_chat_has_the_tokens_of_apply_chat_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    tokenizer, reference = Tokenizer.from_folder(folder), load_tokenizer(folder)
    before, after = tokenizer.chat_frame()
    text = f"{before}a b{after}"
    expected = reference.apply_chat_template([{"role": "user", "content": "a b"}], return_dict=False)
    assert tokenizer.as_bare().encode(text) == encode_prompt(reference, text, bare=True) == expected
    assert tokenizer.as_bare().count(text) == len(expected)


def test_items_of_another_rule_have_another_address(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    of_the_file = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    added = load_tokenizer(folder)("a").input_ids
    assert (tokenizer.digest == of_the_file) == (added[-1] != 1)
    assert (tokenizer.as_bare().digest == of_the_file) == (added == [5])


LOOP = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}" + LOOP, ("26 Jul 2024[", "]")),
        ("{% for m in messages %}[{{ m.content }}]{% break %}{% endfor %}", ("[", "]")),
        ("{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}", ("[", "]")),
        (LOOP + "{{ eos_token }}", ("[", "]<|endoftext|>")),
        (LOOP + "{% if tools is not none %}tools{% endif %}{{ 'ß<' | tojson }}", ("[", ']"ß<"')),
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
        ("{{ raise_exception('only\nsystem') }}", r"chat template refuses the conversation \(only system\)"),
        ("{{ messages | length }}", "the chat template does not show the user's message"),
        (2 * "{{ messages[0].content }}", "the chat template shows the user's message 2 times; ask it plainly, with"),
        (r"{{ '\ud800' ~ messages[0].content }}", "the chat template writes half of a surrogate pair; ask it plainly"),
        ("{{ 'x' * 10 ** 9 }}", r"the chat template fails \(MemoryError\)"),
    ],
)
def test_a_chat_template_that_cannot_ask_is_refused_in_one_line(parents: Path, template: str, message: str) -> None:
    files = {"tokenizer.json": (parents / "base" / "tokenizer.json").read_bytes()}
    with pytest.raises(BadInput, match=message) as refused:
        Tokenizer.from_files(files, place="here", chat_template=template).chat_frame()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ messages[0].content }}{% macro m() %}{% for i in range(99999) %}{{ m() }}{% endfor %}{% endmacro %}"
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i * j }}{% endfor %}{% endfor %}",
    ],
)
def test_a_chat_template_that_does_not_end_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 1.0)
    with ChatTemplate(template, {}, "here") as chat:
        # of a template that also fills its memory, the memory may be the first to run out
        ended = r"here: the chat template (does not end within 1 seconds|fails \(MemoryError\))"
        with pytest.raises(BadInput, match=ended):
            chat.frame()
        process = chat._process
    assert process is not None and process.poll() is not None


@pytest.mark.parametrize("opened", ["<think>", "<think>\n", "<think>\n\n"])
def test_a_template_that_opens_thoughts_gets_them_closed(opened: str) -> None:
    with ChatTemplate("[{{ messages[0].content }}]" + opened, {}, "here") as chat:
        assert chat.frame() == ("[", "]<think>\n\n</think>\n\n")
        assert chat.render([{"role": "user", "content": "a"}]) == "[a]<think>\n\n</think>\n\n"


def test_a_conversation_may_go_on_in_its_last_message_as_in_transformers(parents: Path) -> None:
    reference = AutoTokenizer.from_pretrained(parents / "base")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is"}]
    with ChatTemplate((parents / "base" / "chat_template.jinja").read_text(), {}, "here") as chat:
        for shown in (messages[:1], messages):
            assert chat.render(shown) == reference.apply_chat_template(
                shown, tokenize=False, add_generation_prompt=True
            )
        goes_on = reference.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert chat.render(messages, open_turn=False) == goes_on


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
