"""mergeyard against mergekit 0.1.5 and against the formulas, merge by merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conformance import cases, tally
from tests.conformance.conftest import Ours, in_ordinary_runs, merge_ours
from tests.conformance.measures import find_masks
from tests.conformance.oracle import Answer, Answers
from tests.conformance.reference import TaskVectors, checkpoint, merged
from tests.conformance.verdicts import (
    SIGMAS,
    against_formulas,
    assert_as_mergekit,
    assert_follows_formulas,
    assert_within_one_ulp,
    share_correctly_rounded,
)

pytestmark = pytest.mark.oracle

CASES = cases.ours(cases.CASES)
BIT_EXACT = cases.ours(cases.BIT_EXACT)
ONE_ROUNDING = {**cases.LINEAR, **cases.TASK_ARITHMETIC}


def model_fields(folder: Path) -> dict[str, Any]:
    """config.json, less who wrote it, and with the dtype under its newer name."""
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype", None) or config.get("dtype")
    return {field: value for field, value in config.items() if field != "transformers_version"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`make test` holds every third case of each method against the formulas, and every sixth against mergekit.
    `make conformance` takes all."""
    ordinary = in_ordinary_runs(metafunc.config)
    for argument, documents, every in (
        ("case", CASES, 3),
        ("judged_case", cases.CASES, 6),
        ("exact_case", BIT_EXACT, 6),
    ):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, cases.of_each_method(documents, every if ordinary else 1))


def test_every_merge_follows_the_formulas(case: str, ours: Ours, parents: Path, counting: bool) -> None:
    text = cases.CASES[case]
    document = cases.parsed(text, parents)
    assert_follows_formulas(ours(text), document)
    if counting:
        tally.add(document["merge_method"], "formula", against_formulas(ours(text), document))


def test_mergekit_in_float32_follows_the_formulas_and_every_merge_is_within_one_ulp_of_it(
    judged_case: str, ours: Ours, mergekit: Mapping[str, Answer], parents: Path
) -> None:
    text = cases.CASES[judged_case]
    document, theirs = cases.parsed(text, parents), mergekit[judged_case]
    assert theirs.error is None
    assert_follows_formulas(theirs.folder, document)
    if judged_case in CASES:
        counts = assert_within_one_ulp(ours(text), theirs.folder, document)
        tally.add(document["merge_method"], "float32", counts)


@pytest.mark.parametrize("name", ONE_ROUNDING)
def test_linear_and_task_arithmetic_are_rounded_once(name: str, ours: Ours, parents: Path) -> None:
    text = ONE_ROUNDING[name]
    assert share_correctly_rounded(ours(text), cases.parsed(text, parents)) >= 0.999


def test_mergekit_numerics_repeat_mergekit_bit_for_bit(
    exact_case: str, ours: Ours, mergekit: Mapping[str, Answer], parents: Path
) -> None:
    answer = mergekit[f"bit exact {exact_case}"]
    assert answer.error is None
    document = cases.parsed(BIT_EXACT[exact_case], parents)
    counts = assert_as_mergekit(ours(BIT_EXACT[exact_case], "mergekit"), answer.folder, document)
    tally.add(document["merge_method"], "bf16", counts)


@pytest.mark.parametrize("name", ["ties-zero-sums-elect-the-positive"])
def test_a_sum_of_exactly_zero_elects_the_positive(
    name: str, ours: Ours, mergekit: Mapping[str, Answer], parents: Path
) -> None:
    text = cases.CASES[name]
    expected = merged(cases.parsed(text, parents))
    for folder in (mergekit[name].folder, ours(text)):
        actual = checkpoint(str(folder))
        for tensor, vectors in expected.items():
            assert isinstance(vectors, TaskVectors)
            assert find_masks(actual[tensor], vectors, signs_exact=True).unexplained == 0, tensor


@pytest.mark.parametrize("name", ["dare-linear-two-everywhere-unscaled"])
def test_two_parents_are_thinned_by_independent_dice(name: str, ours: Ours, parents: Path) -> None:
    text = cases.CASES[name]
    actual = checkpoint(str(ours(text)))
    agreements = trials = 0
    for tensor, vectors in merged(cases.parsed(text, parents)).items():
        assert isinstance(vectors, TaskVectors)
        masks = find_masks(actual[tensor], vectors)
        known = np.logical_and.reduce([s == p for s, p in zip(masks.sure, masks.possible, strict=True)])
        known &= np.logical_and.reduce([delta != 0 for delta in vectors.deltas])
        agreements += int((masks.sure[0] == masks.sure[1])[known].sum())
        trials += int(known.sum())
    chance = 0.7 * 0.7 + 0.3 * 0.3
    assert abs(agreements - chance * trials) <= SIGMAS * (trials * chance * (1 - chance)) ** 0.5


@pytest.mark.parametrize(
    "name", ["linear-bf16", "task-arithmetic-untied", "passthrough-to-float32", "ties-sharded-untied"]
)
def test_the_output_folder_holds_what_mergekit_writes(name: str, ours: Ours, mergekit: Mapping[str, Answer]) -> None:
    folder, theirs = ours(cases.CASES[name]), mergekit[name].folder
    assert model_fields(folder) == model_fields(theirs)
    names = {path.name for path in theirs.iterdir()}
    assert names - {path.name for path in folder.iterdir()} == set()
    for file in names - {"config.json", "README.md", "mergekit_config.yml"}:
        if not file.endswith(".safetensors"):
            assert (folder / file).read_bytes() == (theirs / file).read_bytes(), file


def test_a_sharded_output_has_the_same_tensors_and_an_index_of_the_same_form(
    mergekit: Answers, parents: Path, tmp_path: Path
) -> None:
    text = cases.CASES["linear-bf16"]
    document = cases.parsed(text, parents)
    sharded = mergekit.merge("sharded output", document, shard_bytes=30_000)
    config = yaml.safe_dump(document, sort_keys=False)
    assert merge_ours(config, tmp_path / "out", "float32", "--out-shard-size", "30000") == 0
    index, theirs = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (tmp_path / "out", sharded.folder)
    )
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    written = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == sorted(set(index["weight_map"].values()))
    assert written == [f"model-{i:05d}-of-{len(written):05d}.safetensors" for i in range(1, len(written) + 1)]
    assert len(written) == len(set(theirs["weight_map"].values()))
    assert_follows_formulas(tmp_path / "out", cases.parsed(text, parents))


def test_mergekit_can_read_the_recipe_written_beside_the_merge(ours: Ours, parents: Path) -> None:
    text = cases.CASES["linear-bf16"]
    written = yaml.safe_load((ours(text) / "mergekit_config.yml").read_text())
    assert written == cases.parsed(text, parents)


@pytest.mark.parametrize("name", cases.REFUSED)
def test_what_mergekit_refuses_is_refused_before_anything_is_written(
    name: str, mergekit: Mapping[str, Answer], parents: Path, tmp_path: Path
) -> None:
    assert mergekit[f"refused {name}"].error
    out = tmp_path / "out"
    config = yaml.safe_dump(cases.parsed(cases.REFUSED[name], parents), sort_keys=False)
    assert merge_ours(config, out) == (1 if name in cases.REFUSED_BY_NUMBERS else 2)
    assert {path.name for path in out.glob("*")} <= ({".mergeyard"} if name in cases.REFUSED_BY_NUMBERS else set())
