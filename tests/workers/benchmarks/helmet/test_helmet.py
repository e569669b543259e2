"""HELMET: expected values are written down from the reference's own code on the same small files.

Beside princeton-nlp/HELMET 4526dfb (`load_data`, `post_process`), made-up files of all ten tasks gave 3,040 equal
prompts and 20,800 equal scores.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BadInput
from jobs.evaluate import Evaluation, HelmetSpec
from workers.benchmarks.helmet.prompts import FORMS, ICL, JSON_KV, RAG, prompt_of, scorer_of
from workers.benchmarks.helmet.published import icl, json_kv, qa
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.registry import planned_sets
from workers.benchmarks.scorers import score
from workers.benchmarks.texts.tokenizer import Tokenizer

MADE = HelmetSpec(lengths=(1280, 1536), items=6, place="job.yaml:7")


def plan(tokenizer: Tokenizer, spec: HelmetSpec = MADE, folder: Path | None = None) -> list[PlannedSet]:
    return planned_sets(Evaluation(benchmarks={"helmet": spec}), tokenizer, 0, Reader(folder))


def items_of(planned: PlannedSet) -> list[Item]:
    return read_items(planned.build(range(planned.count)))


def documents(kind: str, count: int) -> list[dict[str, Any]]:
    """Questions of two rows each, about one document."""
    return [
        {"question": f"{kind} {number}?", "answers": [f"{kind}{number}"], "ctxs": [_document(kind, number)]}
        for number in range(count)
        for _ in range(2)
    ]


def _document(kind: str, number: int) -> dict[str, str]:
    return {"title": f"T{number}", "text": f"about {kind} {number}"}


def test_questions_and_worked_examples_are_those_that_the_reference_draws() -> None:
    found = qa(documents("Who", 6), documents("What", 4), 3, popular=False)
    assert [sample.question for sample in found] == ["Who 0?", "Who 0?", "Who 4?", "Who 4?", "Who 5?", "Who 5?"]
    shown = [re.findall(r"Answer: What(\d)", sample.demos) for sample in found]
    assert shown == [["2", "0"]] * 2 + [["2", "1"]] * 2 + [["2", "3"]] * 2
    assert prompt_of(RAG, found[2], begun=True) == (
        "Use the given documents to write a concise and short answer to the question. "
        "Write your answer in the following format:\nAnswer: [answer]\n\n"
        "Document (Title: T2): about What 2\n\nQuestion: What 2?\nAnswer: What2\n\n"
        "Document (Title: T1): about What 1\n\nQuestion: What 1?\nAnswer: What1\n\n"
        "Document (Title: T4): about Who 4\n\nQuestion: Who 4?\nAnswer:"
    )
    assert found[2].answers == ("Who4",) and found[2].name == found[3].name != found[4].name


def test_only_questions_about_little_known_things_are_asked_of_popqa() -> None:
    rows = [row | {"s_pop": 10 ** (2 + number)} for number, row in enumerate(documents("Who", 1))]
    demos = [row | {"s_pop": 10} for row in [*documents("Who", 1), *documents("What", 3)]]
    [sample] = qa(rows, demos, 100, popular=True)
    assert sample.question == "Who 0?" and "Who" not in sample.demos, "never its own example"


def test_pairs_are_those_that_the_reference_draws() -> None:
    rows = [
        {"context": "{}", "question": f"k{at}", "answer": f"v{at}", "demos": [["a", "b"], ["c", "d"], ["e", "f"]]}
        for at in range(8)
    ]
    found = json_kv(rows, 4)
    assert [sample.question for sample in found] == ["k3", "k4", "k2", "k7"]
    assert prompt_of(JSON_KV, found[0], begun=True) == (
        "{}\n\nExtract the value corresponding to the specified key in the JSON object below.\n\n"
        "Key: a\nCorresponding value: b\n\nKey: c\nCorresponding value: d\n\nKey: k3\nCorresponding value:"
    )


def test_examples_and_numbers_of_labels_are_those_that_the_reference_draws() -> None:
    train = [{"text": f"word {number}", "coarse_label": number % 3} for number in range(7)]
    test = [{"text": f"ask {number}", "coarse_label": number % 3} for number in range(2)]
    first, second = icl("trec_coarse", train, test, 5, 500)
    assert re.findall(r"word (\d)\nlabel: (\d)", first.context) == [
        ("5", "5"),
        ("0", "4"),
        ("4", "3"),
        ("1", "3"),
        ("2", "5"),
    ]
    assert re.findall(r"word (\d)\nlabel: (\d)", second.context) == [
        ("1", "2"),
        ("5", "3"),
        ("0", "0"),
        ("4", "2"),
        ("6", "0"),
    ]
    assert (first.answers, second.answers) == (("4",), ("2",))
    assert prompt_of(ICL, replace(first, context="CONTEXT"), begun=False) == (
        "Use the provided mapping from the text to label to assign a label to the text. "
        'Only output "label: {label}" and nothing else. \n\nCONTEXT\n\nask 0'
    )


@pytest.mark.parametrize(
    ("task", "answer", "right", "begun", "thinks", "expected"),
    [
        ("nq", " The River Elbe.", "river elbe", True, False, 1),
        ("nq", " Oder\nAnswer: Elbe", "Elbe", True, False, 0),  # the reference stops at the first line
        ("nq", "\n\nElbe", "Elbe", True, True, 1),  # but not after a thought
        ("nq", " Elb", "Elbe", True, False, 0),
        ("json_kv", " x\nThe value is 12-ab", "12-ab", True, False, 1),
        ("json_kv", "", "12-ab", True, False, 0),
        ("nlu", " 12", "12", True, False, 1),
        ("nlu", " 12", "1", True, False, 0),
        ("nlu", "Label: 12", "12", False, False, 1),
        ("nlu", "12", "12", False, False, 1),
        ("nlu", "It is 12", "12", False, False, 0),
        ("nlu", " 3. label: 12", "12", True, False, 0),  # what follows the label in the prompt counts
        ("nlu", " 3. label: 12", "12", False, False, 1),
    ],
)
def test_scores_are_those_of_the_reference(
    task: str, answer: str, right: str, begun: bool, thinks: bool, expected: int
) -> None:
    assert score(scorer_of(FORMS[task], begun=begun, thinks=thinks), answer, (right,)) == expected


def test_made_items_fill_their_length_and_have_the_answer_in_the_context(tokenizer: Tokenizer) -> None:
    sets = plan(tokenizer)
    assert [(of.task, of.length, of.count) for of in sets] == [
        (task, length, 6) for task in ("json_kv_generated", "rag_generated", "icl_generated") for length in (1280, 1536)
    ]
    for planned in sets:
        for item in items_of(planned):
            room = {"json_kv_generated": 90, "rag_generated": 120, "icl_generated": 30}[planned.task]
            assert planned.length - room <= item.tokens + item.max_new_tokens <= planned.length
            assert item.tokens == tokenizer.count_whole(item.text)
    short, long = items_of(sets[0]), items_of(sets[1])
    assert [(item.answers, item.pair) for item in short] == [(item.answers, item.pair) for item in long]


def test_a_made_json_object_can_be_read_and_has_the_value(tokenizer: Tokenizer) -> None:
    for item in items_of(plan(tokenizer)[1]):
        content, _, rest = item.text.removeprefix("JSON data:\n").partition("\n\nExtract")
        pairs = json.loads(content)
        *worked, asked = re.findall(r"Key: (\S+)", rest)
        assert len(worked) == 2 and (pairs[asked],) == item.answers
        assert re.findall(r"value: (\S+)", rest) == [pairs[key] for key in worked]
        line = f'"{asked}": "{pairs[asked]}"'
        [depth] = item.depths
        assert depth * (len("JSON data:\n" + content) - len(line)) == pytest.approx(item.text.index(line))


def test_made_questions_can_be_answered_from_their_documents(tokenizer: Tokenizer) -> None:
    for item in items_of(plan(tokenizer)[3]):
        context = item.text.rpartition("Answer:")[0].split("\nAnswer: ")[-1]
        assert item.answers[0] in context
        assert len(item.depths) == (2 if "On which river" in item.text.splitlines()[-2] else 1)


def test_a_made_label_is_that_of_the_same_verb(tokenizer: Tokenizer) -> None:
    for item in items_of(plan(tokenizer)[5]):
        *shown, question = item.text.removesuffix("\nlabel:").split("\n\n")[1:]
        [verb] = re.findall(r"(\w+) the ", question)
        same = {text.rpartition(": ")[2] for text in shown if f"{verb} the " in text}
        assert same == set(item.answers)


def test_published_files_are_found_by_their_length(tokenizer: Tokenizer, tmp_path: Path) -> None:
    kilt = tmp_path / "data" / "kilt"
    kilt.mkdir(parents=True)
    lines = ("\n".join(map(json.dumps, documents(kind, 6))) for kind in ("Who", "What"))
    for name, text in zip(("nq-dev-multikilt_1000_k50_dep6", "nq-train-multikilt_1000_k3_dep6"), lines, strict=True):
        (kilt / f"{name}.jsonl").write_text(text)
    spec = HelmetSpec(lengths=(8192,), tasks=("nq",), data="data", place="job.yaml:7")
    [planned] = plan(tokenizer, spec, tmp_path)
    items = items_of(planned)
    assert (planned.task, planned.length, len(items)) == ("nq", 8192, 12)
    assert len({item.haystack for item in items}) == 6, "rows of one question are no independent ones"
    assert all(item.text.endswith("\nAnswer:") for item in items)
    for changed, said in (
        ({"lengths": (4096,)}, "HELMET has no files for 4096 tokens; take from 8192, 16384, 32768, 65536, 131072"),
        ({"tasks": ("nlu",)}, "nlu needs its data; give `examples: {nlu: FOLDER}`"),
        ({"data": None, "tasks": ("nq",)}, "nq needs HELMET's data; give `data: FOLDER`"),
        ({"tasks": ("nqq",)}, 'HELMET has no task "nqq"; did you mean "nq"?'),
        ({"lengths": (16384,)}, "nq-dev-multikilt_1000_k105_dep6.jsonl cannot be read"),
    ):
        with pytest.raises(BadInput, match=re.escape(said)):
            plan(tokenizer, replace(spec, **changed), tmp_path)


GOOD = {"context": "{}", "question": "k", "answer": "v", "demos": [["a", "b"]] * 2}


@pytest.mark.parametrize(
    ("task", "rows", "error"),
    [
        ("json_kv", [], "json_kv: there are no questions for at most 8192 tokens"),
        ("json_kv", [GOOD | {"answer": None}], "answer is empty; give the published file"),
        ("json_kv", [GOOD | {"demos": [["a", "b"]]}], "not as published (1 worked examples)"),
        ("json_kv", [GOOD | {"demos": ["a", "b"]}], "a row of json_kv is not as published"),
        ("nlu", [{"text": "t", "label": 68}] * 2, "a row of nlu is not as published (the label 68"),
        ("nlu", [{"text": "t", "label": "x"}] * 2, "a row of nlu is not as published (invalid literal"),
        ("nlu", [{"text": "t", "label": 1}], "a row of nlu is not as published (no examples)"),
    ],
)
def test_a_row_that_is_not_as_published_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, task: str, rows: list[Any], error: str
) -> None:
    path = tmp_path / ("json_kv/test_k105_dep6.jsonl" if task == "json_kv" else "train.jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = HelmetSpec(lengths=(8192,), tasks=(task,), place="job.yaml:7")
    spec = replace(spec, data=".") if task == "json_kv" else replace(spec, examples={task: "."})
    with pytest.raises(BadInput, match=re.escape(error)):
        plan(tokenizer, spec, tmp_path)


def test_a_context_loses_its_end_only_if_the_job_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "json_kv"
    folder.mkdir(parents=True)
    rows = [
        {"context": f"{{{number}}}" + " So it goes." * long, "question": "k", "answer": "v", "demos": [["a", "b"]] * 2}
        for number, long in enumerate((10, 9000))
    ]
    (folder / "test_k105_dep6.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = HelmetSpec(lengths=(8192,), tasks=("json_kv",), data="data", place="job.yaml:7")
    [planned] = plan(tokenizer, spec, tmp_path)
    assert (planned.count, planned.too_long) == (1, 1)
    [planned] = plan(tokenizer, replace(spec, truncate="end"), tmp_path)
    assert (planned.count, planned.too_long) == (2, 0)
    cut = max(items_of(planned), key=lambda item: item.tokens)
    assert 8192 - 4 <= cut.tokens + 100 <= 8192 and cut.text.startswith("{1} So it goes.")
    assert cut.text.endswith("Key: k\nCorresponding value:")
