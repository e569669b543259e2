"""Merges of several stages: documents of one file, or a list in a job; named, in any order, none left over."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.errors import BadInput
from jobs.job import load_job, load_merge_document
from jobs.yaml_nodes import load_documents

FIRST = "name: first\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\n"
SECOND = "name: second\nmerge_method: linear\nmodels: [{model: first}, {model: b}]\n"
RESULT = "merge_method: slerp\nbase_model: first\nmodels: [{model: c}]\n"


def merge(*documents: str) -> Any:
    return load_merge_document("---\n".join(documents), "merge.yml", "out")


def refusal(*documents: str) -> str:
    with pytest.raises(BadInput) as caught:
        merge(*documents)
    return str(caught.value)


def job(recipe: str, **more: Any) -> str:
    keys = {"name": "soup", "parents": "{a: x, b: y, c: z}", "output": "runs", **more}
    return "".join(f"{key}: {value}\n" for key, value in keys.items()) + f"recipe:\n{recipe}"


STAGED = """\
  - name: first
    merge_method: linear
    models:
      - model: a
        parameters: {weight: "${w}"}
      - model: b
        parameters: {weight: 1}
  - name: second
    merge_method: linear
    models: [{model: a}, {model: c}]
  - merge_method: slerp
    base_model: first
    models: [{model: second}]
    parameters: {t: "${t}"}
"""


def test_documents_feed_each_other_by_name_in_any_order() -> None:
    for documents in ((FIRST, RESULT), (RESULT, FIRST)):
        (point,) = merge(*documents).points
        assert (point.recipe.merge_method, [*point.stages]) == ("slerp", ["first"])
        assert point.parents() == ("a", "b", "c")
    assert [*merge(RESULT.replace("c", "second"), SECOND, FIRST).points[0].stages] == ["first", "second"]


def test_without_an_unnamed_document_the_result_is_the_one_that_feeds_none() -> None:
    (point,) = merge(f"name: all\n{RESULT}", FIRST).points
    assert (point.recipe.merge_method, [*point.stages]) == ("slerp", ["first"])


def test_several_documents_that_feed_none_are_several_results() -> None:
    job = merge(FIRST, SECOND, f"name: third\n{RESULT}", "name: alone\nmerge_method: linear\nmodels: [{model: d}]\n")
    assert {point.name: [*point.stages] for point in job.points} == {
        "second": ["first"],
        "third": ["first"],
        "alone": [],
    }
    assert set(job.parents) == {"a", "b", "c", "d"}
    assert [document.get("name") for document in job.points[1].documents()] == ["first", None]


def test_the_name_may_be_a_path_and_one_document_keeps_it_as_a_label() -> None:
    path = "organisation/model-1"
    assert merge(FIRST.replace("name: first", f"name: {path}"), RESULT.replace("first", path)).points[0].stages
    assert not merge("name: a\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\n").points[0].stages


def test_a_document_of_a_file_is_written_as_the_stage_of_a_job() -> None:
    staged = merge(RESULT, FIRST)
    assert [recipe.get("name") for recipe in staged.document()["recipe"]] == ["first", None]
    assert [document.get("name") for document in staged.points[0].documents()] == ["first", None]


def test_an_adapter_after_the_name_of_a_merge_is_applied_to_it() -> None:
    for model in ("first+some/lora", "{model: {path: first}, lora: some/lora}"):
        (point,) = merge(FIRST, RESULT.replace("base_model: first", f"base_model: {model}")).points
        assert [*point.stages] == ["first"]
        assert point.parents() == ("a", "b", "c", "some/lora")
        assert point.adapters() == {"some/lora"}
    whole = FIRST.replace("name: first", "name: first+lora")
    (point,) = merge(FIRST, whole, RESULT.replace("first", "first+lora").replace("c}", "first}")).points
    assert ([*point.stages], point.adapters()) == (["first", "first+lora"], frozenset()), "the longest name"


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (
            (FIRST, RESULT, RESULT),
            "merge.yml:9: two documents have no name (the first is at merge.yml:5); give `name:`",
        ),
        (
            (FIRST, FIRST, RESULT),
            'merge.yml:5: two merges are called "first" (the first is at merge.yml:1)',
        ),
        ((FIRST, SECOND, RESULT), 'merge.yml:5: no merge uses "second"; name it as a model, or take it out'),
        (
            (FIRST, RESULT.replace("first", "frist")),
            'merge.yml:1: no merge uses "first"; name it as a model, or take it out; did you mean "frist"?',
        ),
        (
            (FIRST.replace("a}", "second+lora}"), SECOND, RESULT),
            'merge.yml:5: the merges "first" → "second" → "first" feed each other in a circle',
        ),
        (
            (FIRST, SECOND, f"name: some/third\n{RESULT}"),
            'merge.yml:9: "some/third" cannot name a folder; at most 201 letters,',
        ),
        (
            (FIRST.replace("a}", "second}"), SECOND, RESULT),
            'merge.yml:5: the merges "first" → "second" → "first" feed each other in a circle',
        ),
        (
            (FIRST.replace("a}", "first}"), RESULT),
            'merge.yml:1: the merges "first" → "first" feed each other in a circle',
        ),
        ((FIRST.replace("a}", "second}"), SECOND), "merge.yml:5: each merge feeds another; take the `name:`"),
        ((FIRST, RESULT.replace("c}", '"${w}"}')), 'merge.yml:7: unknown axis "w"'),
        ((FIRST.replace("first", '"${w}"'), RESULT), 'merge.yml:1: the name "${w}" has a placeholder'),
    ],
)
def test_names_that_lead_nowhere_or_round_are_refused(documents: tuple[str, ...], message: str) -> None:
    assert refusal(*documents).startswith(message)


def test_a_job_takes_stages_and_shares_those_that_no_axis_changes() -> None:
    points = load_job(job(STAGED, grid="{w: [1, 2], t: [0.1, 0.9]}"), "job.yaml").points
    assert [point.name for point in points] == ["w1_t0.1", "w1_t0.9", "w2_t0.1", "w2_t0.9"]
    first, second, third, _ = points
    assert first.stages["first"] is second.stages["first"] is not third.stages["first"]
    assert first.stages["second"] is third.stages["second"]
    assert first.parents() == ("a", "c", "b")


def test_a_job_of_stages_reads_back_and_its_digest_has_the_stages() -> None:
    from jobs.yaml_nodes import yaml_text

    text = job(STAGED, grid="{w: [1, 2], t: [0.1]}")
    staged = load_job(text, "job.yaml")
    assert load_job(yaml_text(staged.document()), "job.yaml").digest() == staged.digest()
    assert load_job(text.replace("weight: 1", "weight: 3"), "job.yaml").digest() != staged.digest()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            STAGED.replace("- name: second\n    merge", "- merge"),
            "job.yaml:13: a merge that feeds another needs",
        ),
        (STAGED.replace("second", "b"), 'job.yaml:13: "b" is the name of a parent too; give the merge another'),
        (
            STAGED.replace("[{model: second}]", "[{model: secnd}]"),
            'job.yaml:13: no merge uses "second"; name it as a model, or take it out; did you mean "secnd"?',
        ),
        (STAGED.replace("model: c", "model: d"), 'job.yaml:15: "d" is not in `parents:`'),
    ],
)
def test_stages_of_a_job_are_refused_with_their_line(recipe: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_job(job(recipe, grid="{w: [1, 2], t: [0.1]}"), "job.yaml")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"config_from": "b"}, "job.yaml:5"),
        ({"gate": "{baseline: b}", "evaluate": "{needle: {lengths: [256]}}"}, "job.yaml:5"),
    ],
)
def test_an_adapter_on_a_stage_is_no_model_of_a_job(keys: dict[str, str], place: str) -> None:
    recipe = """\
  - {name: first, merge_method: linear, models: [{model: a}, {model: c}], parameters: {weight: 1}}
  - {merge_method: slerp, base_model: first, models: [{model: first+b}], parameters: {t: "${t}"}}
"""
    load_job(job(recipe, grid="{t: [0.1]}"), "job.yaml")
    with pytest.raises(BadInput) as caught:
        load_job(job(recipe, grid="{t: [0.1]}", **keys), "job.yaml")
    assert str(caught.value) == f'{place}: "b" is an adapter on a merge, and not a model; name another parent'


def test_empty_documents_are_left_out_and_anchors_end_with_theirs() -> None:
    roots = load_documents("---\n# a card\n---\na: &x 1\n---\nb: 2\n---\n", "merge.yml")
    assert [(root.line, [*root.mapping()]) for root in roots] == [(4, ["a"]), (6, ["b"])]
    with pytest.raises(BadInput, match=r"^merge\.yml:3: no value above is marked &x"):
        load_documents("a: &x 1\n---\nb: *x\n", "merge.yml")
