"""A user's own questions: rows of three formats, their lengths, their scorers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BadInput
from jobs.evaluate import CustomSpec, Evaluation, Several, read_evaluation
from jobs.yaml_nodes import load_document, node_of
from workers.benchmarks.custom import custom_files, plan_custom
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.scorers import score
from workers.benchmarks.texts.tokenizer import Tokenizer

ROWS = [
    {"input": "What is the code of Anna?", "target": "4711"},
    {"input": "What is the code of Ben?", "target": ["1234", "12 34"]},
    {"input": " ".join(map(str, range(100))), "target": 7},
]


@pytest.fixture
def asked(tokenizer: Tokenizer, tmp_path: Path) -> Any:
    """asked(rows or text, **keys): the planned sets of one file, `q.jsonl` unless `file` names another."""

    def plan(rows: Any, *, using: Tokenizer | None = None, **keys: Any) -> list[PlannedSet]:
        text = rows if isinstance(rows, str) else "".join(f"{json.dumps(row)}\n" for row in rows)
        keys = {"file": "q.jsonl", "scorer": "contains", "max_new_tokens": 10} | keys
        (tmp_path / keys["file"]).write_text(text)
        spec = read_evaluation(node_of({"custom": keys}, "job.yaml")).benchmarks["custom"]
        assert isinstance(spec, CustomSpec)
        return plan_custom(spec, using or tokenizer, 0, Reader(tmp_path), 0)

    return plan


def items_of(sets: list[PlannedSet]) -> list[Item]:
    return [item for planned in sets for item in read_items(planned.build(range(planned.count)))]


def test_a_question_is_asked_at_the_next_power_of_two(asked: Any, tokenizer: Tokenizer) -> None:
    sets = asked(ROWS)
    items = items_of(sets)
    assert [item.answers for item in items] == [("4711",), ("1234", "12 34"), ("7",)]
    for item in items:
        need = tokenizer.count(item.text) + 10
        assert item.tokens == need - 10 and item.max_new_tokens == 10
        assert item.length >= need and (item.length == 64 or item.length < 2 * need), "the next power of two"
    assert [(planned.task, planned.count) for planned in sets] == [("q", 2), ("q", 1)]


def test_lengths_gather_and_a_column_keeps_a_question_longer(asked: Any) -> None:
    lengths = [planned.length for planned in asked(ROWS, lengths=[100, 300])]
    assert lengths == [100, 300]
    assert [planned.length for planned in asked(ROWS, lengths=[100])] == [100], "the third needs more"
    rows = [{**row, "length": length} for row, length in zip(ROWS, (90, 500, 64), strict=True)]
    assert sorted((item.length, item.answers[0]) for item in items_of(asked(rows))) == [
        (90, "4711"),
        (500, "1234"),
        (512, "7"),
    ]
    many = [{**ROWS[0], "length": 90 + number} for number in range(13)]
    assert [planned.length for planned in asked(many)] == [64], "words, not lengths"
    assert [planned.count for planned in asked(many, limit=5)] == [5]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("q.jsonl", '{"input": "a, \\"b\\"\\nc", "target": "x"}\n\n{"input": "d", "target": "y"}'),
        ("q.json", '[{"input": "a, \\"b\\"\\nc", "target": "x"}, {"input": "d", "target": "y"}]'),
        ("q.csv", 'input,target\r\n"a, ""b""\nc",x\r\nd,y\r\n'),
        ("Q.CSV", '\ufeffinput,target\r\n"a, ""b""\nc",x\r\nd,y\r\n'),
        ("q.json", '\ufeff[{"input": "a, \\"b\\"\\nc", "target": "x"}, {"input": "d", "target": "y"}]'),
    ],
)
def test_every_format_has_the_same_items(asked: Any, file: str, text: str) -> None:
    found = [(item.prompt, item.answers) for item in items_of(asked(text, file=file))]
    assert found == [('a, "b"\nc', ("x",)), ("d", ("y",))]


def test_a_parquet_file_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"input": "d", "target": ["y", "z"]}]), tmp_path / "q.parquet")
    spec = CustomSpec(file="q.parquet", scorer="exact")
    [item] = items_of(plan_custom(spec, tokenizer, 0, Reader(tmp_path), 0))
    assert (item.prompt, item.answers, item.scorer) == ("d", ("y", "z"), "exact")


def test_cells_as_pandas_writes_them_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"input": "d", "target": datetime.date(2026, 11, 29), "length": float("nan"), "depth": float("nan")}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    [item] = items_of(plan_custom(CustomSpec(file="q.parquet", scorer="contains"), tokenizer, 0, Reader(tmp_path), 0))
    assert score(item.scorer, "on 2026-11-29", item.answers) == 1.0 and item.depths == ()


def test_blanks_around_a_target_do_not_count(asked: Any) -> None:
    for scorer in ("contains", "exact", "f1"):
        [item] = items_of(asked([{"input": "a", "target": " New\tYork\n"}], scorer=scorer))
        assert score(item.scorer, "New\tYork", item.answers) == 1.0, scorer
    [item] = items_of(asked([{"input": "a", "target": " b"}], scorer="regex"))
    assert score(item.scorer, "ab", item.answers) == 0.0, "a blank of a pattern counts"


def test_columns_lead_into_objects_and_questions_on_one_context_are_one_haystack(asked: Any) -> None:
    rows = [
        {"vars": {"q": f"{name}?", "doc": doc}, "want": name, "depth": 0.25}
        for name, doc in (("A", "one"), ("B", "one"), ("C", "two"))
    ]
    columns = {"input": "vars.q", "target": "want", "context": "vars.doc"}
    first, second, third = items_of(asked(rows, columns=columns))
    assert first.prefix == "one\n\n" and first.text == "one\n\nA?" and first.depths == (0.25,)
    assert first.haystack == second.haystack != third.haystack
    assert len({item.pair for item in (first, second, third)}) == 3


def test_messages_are_a_conversation(asked: Any) -> None:
    said = [("user", "hi"), ("assistant", "hello"), ("user", "who?")]
    rows = [{"input": [{"role": role, "content": text} for role, text in said], "target": "x"}]
    [item] = items_of(asked(rows))
    assert item.text == "User: hi\n\nAssistant: hello\n\nUser: who?\n\nAssistant:"
    parts = [{"type": "text", "text": "wh"}, {"type": "text", "text": "o?"}]
    rows[0]["input"][2]["content"] = parts  # as OpenAI writes it
    assert items_of(asked(rows))[0].text == item.text


@pytest.mark.parametrize(
    ("text", "keys", "error"),
    [
        ('{"input": "a", "target": "b"}\n{"input":', {}, "q.jsonl:2: not JSON"),
        ('{"input": "a", "target": "b"}\n[1]', {}, "q.jsonl:2: not a JSON object"),
        ('{"input": "a", "target": "b"}\n{"input": "a", "target": []}', {}, "q.jsonl:2: target must be a text"),
        ('{"input": "a", "target": "b"}\n{"input": " ", "target": "b"}', {}, "q.jsonl:2: input must be a text"),
        ('{"input": "a", "target": "("}', {"scorer": "regex"}, 'q.jsonl:1: "(" is not a regular expression'),
        ('{"input": "a", "target": "b", "depth": 2}', {}, "q.jsonl:1: depth must be a number from 0 to 1, not 2"),
        ('{"input": "a", "target": "b", "length": "long"}', {}, "q.jsonl:1: length must be a number"),
        ('{"question": "a", "target": "b"}', {}, '"input", only question, target; name it as `columns: {input: …}`'),
        ("input,target\na,b\nc\n", {"file": "q.csv"}, "q.csv:3: 1 cells for 2 columns"),
        ("input,target\na,b\nc,d,e\n", {"file": "q.csv"}, "q.csv:3: 3 cells for 2 columns"),
        ("\n", {}, "q.jsonl has no questions"),
        ('{"input": "a", "target": NaN}', {}, "q.jsonl:1: target must be a text"),
        ('{"input": "a", "target": [null, "b"]}', {}, "q.jsonl:1: target must be a text"),
        ('{"input": "a", "target": "привет"}', {"scorer": "rouge_l"}, 'q.jsonl:1: rouge_l reads no word in "привет"'),
        ('{"input": "a", "target": "A"}', {"scorer": "f1"}, 'q.jsonl:1: f1 reads no word in "A"; take `scorer: exact`'),
        (
            '{"input": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "target": "b"}',
            {},
            "q.jsonl:1: a system message belongs in the job; take it out, and add `chat: true` and `system:`",
        ),
        ('{"input": [{"role": "user"}], "target": "b"}', {}, "q.jsonl:1: not a list of messages"),
        (
            '{"input": [{"role": "user", "content": null}], "target": "b"}',
            {},
            "q.jsonl:1: the content of a message must be a text",
        ),
        (
            '{"input": [{"role": "user", "content": [{"type": "image_url"}]}], "target": "b"}',
            {},
            "q.jsonl:1: the content of a message must be a text",
        ),
        ("input,target,target\na,b,c\n", {"file": "q.csv"}, 'q.csv:1: the column "target" is there twice; rename one'),
        ('{"input": null, "target": "b"}\n{"input": "a", "target": "b"}', {}, "q.jsonl:1: input must be a text"),
        ('{"input": "a", "target": "b"}', {"lengths": [64], "max_new_tokens": 64}, "no question fits in 64 tokens"),
    ],
)
def test_a_bad_row_is_named_by_its_line(asked: Any, text: str, keys: dict[str, Any], error: str) -> None:
    with pytest.raises(BadInput) as caught:
        asked(text, **keys)
    assert error in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ("{file: q.jsonl, scorer: contain}", 'there is no scorer "contain"; did you mean "contains"?'),
        ("{file: q.jsonl, scorer: json_field}", "name it, as `field: city`"),
        ("{file: q.jsonl, scorer: f1, field: city}", "only with `scorer: json_field`"),
        ("{file: q.jsonl, scorer: 'python:score'}", "your own is python:module.function"),
        ("{file: q.jsonl, scorer: 'python:a/b.score'}", "your own is python:module.function"),
        ("[{file: q.jsonl, scorer: f1}, {file: q.jsonl, scorer: f1}]", "is listed twice"),
    ],
)
def test_a_bad_section_is_refused(section: str, error: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_evaluation(load_document(f"custom: {section}", "job.yaml"))
    assert error in str(caught.value)


def test_a_list_asks_several_files_and_reads_back_as_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "custom: [{file: q.jsonl, scorer: f1}, {name: again, file: q.jsonl, scorer: 'python:my.own.score'}]"
    section = read_evaluation(load_document(text, "job.yaml"))
    assert read_evaluation(node_of(section.document(), "job.yaml")) == section
    spec = section.benchmarks["custom"]
    assert isinstance(spec, Several) and [*custom_files(spec)] == ["q.jsonl", "q.jsonl", "my/own.py"]
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "own.py").write_text("def score(answer, targets):\n    return answer in targets\n")
    assert [planned.task for planned in plan_custom(spec, tokenizer, 0, Reader(tmp_path), 0)] == ["q", "again"]
    same = Several(specs=(spec.specs[0], CustomSpec(file="folder/q.csv", scorer="f1")))
    with pytest.raises(BadInput, match="two files are called q"):
        plan_custom(same, tokenizer, 0, Reader(tmp_path), 0)
    assert Evaluation(benchmarks={"custom": spec}).digested()["custom"] == spec


OWN = """\
import re

def score(answer, targets):
    return len(re.findall(targets[0], answer)) / 4
"""


def test_a_function_of_ones_own_travels_with_the_items(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    [planned] = asked(ROWS[:1], scorer="python:mine.score")
    [item] = items_of([planned])
    (tmp_path / "mine.py").unlink()
    assert score(item.scorer, "4711 and 4711", item.answers) == 0.5
    with pytest.raises(BadInput, match=r"mine\.score: the scorer gives 1\.25; return a number from 0 to 1"):
        score(item.scorer, "4711" * 5, item.answers)
    with pytest.raises(BadInput, match=r"mine\.score: the scorer fails \(error: "):
        score(item.scorer, "4711", ["("])
    for ends, said in (
        ("import sys\ndef score(answer, targets): sys.exit(3)", "the scorer fails (SystemExit: 3)"),
        ("def score(answer, targets): return '1\\n'", "the scorer gives '1\\n'; return a number"),
        ("def score(answer, targets): return float('nan')", "the scorer gives nan; return a number"),
    ):
        (tmp_path / "mine.py").write_text(ends)
        [item] = items_of(asked(ROWS[:1], scorer="python:mine.score"))
        with pytest.raises(BadInput) as caught:
            score(item.scorer, "4711", item.answers)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "mine.py").write_text(OWN + "# changed\n")
    assert asked(ROWS[:1], scorer="python:mine.score")[0].digest != planned.digest


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (None, "mine.py cannot be read"),
        ("def score(answer:\n", "mine.py:1: not Python"),
        ("def other(answer, targets): return 1\n", 'mine.py defines no function "score"; it has other'),
    ],
)
def test_a_function_that_is_not_there_is_refused(asked: Any, tmp_path: Path, source: str | None, error: str) -> None:
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    with pytest.raises(BadInput) as caught:
        asked(ROWS, scorer="python:mine.score")
    assert error in str(caught.value)


def test_equal_files_have_equal_digests(asked: Any) -> None:
    before = [planned.digest for planned in asked(ROWS)]
    assert before == [planned.digest for planned in asked(ROWS)]
    assert before[0] != asked([ROWS[0], {**ROWS[1], "target": "x"}])[0].digest
    assert before[0] != asked(ROWS, scorer="exact")[0].digest
