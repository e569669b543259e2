"""YAML is read strictly: exact numbers, one place for every refusal, nothing that costs more than it looks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import BadInput
from jobs.yaml_nodes import Node, load_document, suggestion


def value(text: str) -> Node:
    return load_document(f"key: {text}", "job.yaml").mapping()["key"]


def plain(node: Node) -> Any:
    """The node as JSON would have it."""
    if isinstance(node.value, Mapping):
        return {key: plain(entry) for key, entry in node.value.items()}
    if isinstance(node.value, tuple):
        return [plain(entry) for entry in node.value]
    if node.kind == "number":
        return node.number()
    return {"boolean": node.boolean, "nothing": lambda: None}.get(node.kind, lambda: node.value)()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(st.characters(codec="utf-8", categories="LN")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcdef<.é", min_size=1), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON)
def test_every_json_document_means_what_json_says(document: Any) -> None:
    assert plain(load_document(json.dumps(document, ensure_ascii=False), "job.json")) == document


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.7", Fraction(7, 10)),
        ("1e-6", Fraction(1, 10**6)),
        ("1E+3", Fraction(1000)),
        ("-1.5e2", Fraction(-150)),
        (".5", Fraction(1, 2)),
        ("3.", Fraction(3)),
        ("012", Fraction(12)),
        ("+4", Fraction(4)),
        ("0.1000000000000000055511151231257827", Fraction("0.1000000000000000055511151231257827")),
    ],
)
def test_numbers_are_exact_and_read_as_yaml_1_2_reads_them(text: str, number: Fraction) -> None:
    assert value(text).number() == number


@pytest.mark.parametrize("text", ["1:30", "0x1F", "1_000", "2026-01-01", '"0.7"', "1e", "--1", "0o17", "e5"])
def test_what_only_looks_like_a_number_is_text(text: str) -> None:
    assert value(text).string() == text.strip('"')
    with pytest.raises(BadInput, match=r'job\.yaml:1: "key" must be a number, not a string'):
        value(text).number()


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e400", "1234567890e300", "1e-999999999", "9" * 65])
def test_numbers_without_a_sane_size_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r'job\.yaml:1: "key" (must be finite|is out of range)'):
        value(text).number()


@pytest.mark.parametrize("text", ["1e9999999999999", "1" * 100_000 + "x"])
def test_what_no_number_can_be_is_text_and_costs_nothing(text: str) -> None:
    assert value(text).kind == "string"


@pytest.mark.parametrize(
    ("text", "boolean"), [("on", True), ("Yes", True), ("TRUE", True), ("off", False), ("No", False)]
)
def test_booleans_are_pyyamls(text: str, boolean: bool) -> None:
    assert value(text).boolean() is boolean


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GB", 10**9),
        ("500MB", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5 KiB", 1536),
        ("7000B", 7000),
        ("1TB", 10**12),
        ("4096", 4096),
        ('"1 GB"', 10**9),
    ],
)
def test_sizes_know_decimal_and_binary_units(text: str, size: int) -> None:
    assert value(text).size_bytes() == size


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "0GB", "1gb", "GB", "1 G B", "0.5B", "5B", "1e3GB", "9" * 80 + "GB", "[]"]
)
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"job\.yaml:1: "):
        value(text).size_bytes()


def test_unknown_key_names_its_line_and_the_nearest_key() -> None:
    node = load_document("weight: 1\n\nwieght: 2\n", "job.yaml")
    with pytest.raises(BadInput) as caught:
        node.mapping(("weight", "density"))
    assert str(caught.value) == 'job.yaml:3: unknown key "wieght"; did you mean "weight"?'


def test_a_value_stands_on_the_line_of_its_key() -> None:
    root = load_document("a: 1\nb:\n\n  - x\n  - y: 2\n", "job.yaml").mapping()
    assert root["b"].place == "job.yaml:2"
    assert [entry.place for entry in root["b"].sequence()] == ["job.yaml:4", "job.yaml:5"]
    assert root["b"].sequence()[1].mapping()["y"].path == "b[1].y"


def test_a_key_that_holds_anchors_may_stand_there_again() -> None:
    """As in cards of self-merges, `const_tag: &MODEL …` again and again; an unknown key without anchors may not."""
    root = load_document("tag: &a 1\ntag: &b 2\ntag: &c 3\nx: [*a, *b]\n", "job.yaml").without_anchors(["x"])
    assert root.plain() == {"x": [1, 2]}
    for text in ("x: &a 1\nx: &b 2\ny: [*a, *b]\n", "y: {x: &a 1, x: &b 2}\n"):
        found = load_document(text, "job.yaml")
        with pytest.raises(BadInput, match=r'the key "x" stands here twice \(first on line 1\)'):
            found.without_anchors(["x", "y"]).mapping()["y"].mapping()
    for text in ("x: &a 1\nx: 2\n", "x: 1\nx: &a 2\n", "y: &a 1\nx: &b 1\nx: *a\n"):
        with pytest.raises(BadInput, match='the key "x" stands here twice'):
            load_document(text, "job.yaml")


def test_missing_key_is_named() -> None:
    with pytest.raises(BadInput, match=r'^job\.yaml:1: the document needs the key "parents"$'):
        load_document("name: x", "job.yaml").mapping(("name", "parents"), ("name", "parents"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: *x\n", "job.yaml:2: no value above is marked &x; mark it, or write the value out"),
        ("a: &x [1, *x]\n", "job.yaml:1: no value above is marked &x"),
        ("a: &x " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 20 + "*x" + "]" * 20, "job.yaml:2: nested more than 32"),
        ("a: 1\na: 2\n", 'job.yaml:2: the key "a" stands here twice (first on line 1)'),
        ("a: !!python/object/apply:os.system [ls]\n", "job.yaml:1: the tag"),
        ("a: !x 1\n", "job.yaml:1: the tag"),
        ("a: 1\n---\nb: 2\n", "job.yaml:3: a second document"),
        ("a:\n  <<: 1\n", "job.yaml:2: a merge key (<<) takes a mapping, or a list of mappings"),
        ("a: 1\n? [1, 2]\n: 3\n", "job.yaml:2: a key must be a word"),
        ("a: 1\n b: 2\n", "job.yaml:2: not YAML: "),
        ("a: [1, 2\nb: 3\n", "job.yaml:2: not YAML: "),
        ("a: \x07\n", "job.yaml:1: not YAML: "),
        ("a: \ud800\n", "job.yaml:1: not YAML: "),
        ("", "job.yaml:1: the file is empty"),
        ("# nothing\n", "job.yaml:1: the file is empty"),
        ("a: 1\nb: " + "[" * 40 + "]" * 40, "job.yaml:2: nested more than 32 levels deep"),
        ("[" * 500_000, "job.yaml:1: nested more than 32 levels deep"),
        ("a: " + "x" * (1 << 20), "job.yaml:1: the file is larger than 1 MiB"),
        ("é" * (1 << 19) + "é", "job.yaml:1: the file is larger than 1 MiB"),
    ],
)
def test_what_yaml_allows_and_a_job_does_not_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_document(text, "job.yaml")
    assert str(caught.value).startswith(message)


def test_a_placeholder_without_quotes_in_braces_gets_the_remedy() -> None:
    with pytest.raises(BadInput, match=r'^job\.yaml:2: not YAML: .*; put what has braces in quotes: "\$\{w\}"$'):
        load_document("models:\n  - {model: a, weight: ${w}}\n", "job.yaml")


def test_the_aliases_bomb_is_refused_before_it_grows() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    with pytest.raises(BadInput, match=r"^job\.yaml:15: aliases repeat more than 100,000 values"):
        load_document(bomb, "job.yaml")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.7", 0.7),
        ("1e3", 1000),
        ("1e309", Decimal("1e309")),
        ("-1e309", Decimal("-1e309")),
        ("0.1234567890123456789", Decimal("0.1234567890123456789")),
        (".inf", math.inf),
    ],
)
def test_a_number_that_no_float_holds_stays_a_decimal(text: str, number: object) -> None:
    assert load_document(f"key: {text}", "job.yaml").plain() == {"key": number}


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1, c: [2, z]}\nd: *x\ne: [*x, 3]\n",
        "a: &x {b: 1}\nd: {c: 2, <<: *x}\n",
        "a: &x {b: 1}\nd: {<<: *x, b: 2}\n",
        "a: {<<: [{b: 1}, {b: 2, c: 3}]}\n",
        "a: &x {b: &y [1]}\nc: {<<: *x, d: *y}\n",
        'a: {"<<": 1}\n',
    ],
)
def test_anchors_and_merge_keys_are_read_as_pyyaml_reads_them(text: str) -> None:
    assert load_document(text, "job.yaml").plain() == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "read", "message"),
    [
        ("5", "string", "must be a string, not a number 5; put it in quotes"),
        ("on", "string", "must be a string, not a boolean on; put it in quotes"),
        ("{w}", "string", "must be a string, not a mapping; put it in quotes"),
        ("", "string", "must be a string, not nothing"),
        ("[]", "string", "must be a string, not a list"),
        ('""', "string", "is empty"),
        ("[]", "sequence", "is an empty list"),
        ("x", "sequence", 'must be a list, not a string "x"'),
        ("x", "mapping", 'must be a mapping, not a string "x"'),
        ('"0.7"', "number", 'must be a number, not a string "0.7"; take off the quotes'),
        ("1", "boolean", "must be true or false, not a number 1"),
        ("1.5", "integer", "must be a whole number, not 1.5"),
    ],
)
def test_wrong_types_say_what_was_expected_and_found(text: str, read: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        getattr(value(text), read)()
    assert str(caught.value) == f'job.yaml:1: "key" {message}'


def test_errors_stay_on_one_line_whatever_they_quote() -> None:
    with pytest.raises(BadInput) as caught:
        value('"a\\nb\\u0007' + "c" * 1000 + '"').number()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_suggestion_lists_the_choices_where_none_is_near() -> None:
    assert suggestion("4096", {"256", "1024", "512"}) == "; choose from 256, 512, 1024"
    assert suggestion("zzz", ("all", "none")) == "; choose from all, none"
    assert suggestion("zzz", ()) == ""
