"""Slices, gradients, filters and unions of vocabularies over fifteen architectures: transformers loads each merge."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.conftest import in_ordinary_runs
from tests.conformance.deep_cases import LAYERS
from tests.conformance.measures import explained
from tests.conformance.reference import Array, checkpoint, linear
from tests.conformance.test_architectures import doubles, loaded, run_merge

VLMS = ("gemma3 VLM", "qwen2-vl", "llava")
LAYER = re.compile(r"^(.*?\b(?:layers|layer|blocks|h))\.(\d+)\.")
VISION = re.compile(r"visual|vision|projector")
BEFORE = re.compile(r"embed|wte|wpe")
WEIGHTS = (0.7, 0.4)


IN_TURN = (
    "test_a_filter_takes_the_tensors_with_its_text",
    "test_two_slices_have_weights_of_their_own",
    "test_a_union_of_vocabularies_has_a_row_for_every_token",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`make test` takes each architecture to one of these tests, `make conformance` to all."""
    if metafunc.definition.name in IN_TURN:
        every = len(IN_TURN) if in_ordinary_runs(metafunc.config) else 1
        names = [*ARCHITECTURES]
        metafunc.parametrize("architecture", names[IN_TURN.index(metafunc.definition.name) % every :: every])


def place(name: str) -> tuple[str, int] | None:
    """The stack of a tensor and the number of its layer."""
    found = LAYER.match(name)
    return (found[1], int(found[2])) if found else None


def position(name: str, names: Sequence[str]) -> float:
    """Where its layer lies in its stack, from 0 to 1, as mergekit counts."""
    if "merger.mlp." in name:
        return 1.0  # a number that is no layer's: mergekit takes it for a stack of one
    here = place(name)
    if here is None:
        return 0.0
    count = 1 + max(at[1] for other in names if (at := place(other)) and at[0] == here[0])
    return here[1] / (count - 1)


def assert_linear(
    merged: Mapping[str, torch.Tensor], parents: Path, weights_of: Callable[[str], tuple[float, float]]
) -> None:
    """Every tensor is the weighted mean of `one` and `two` with the weights of its name."""
    one, two = doubles(parents / "one"), doubles(parents / "two")
    assert merged.keys() == one.keys()
    for name, tensor in merged.items():
        wrong = ~explained(tensor, linear([one[name], two[name]], weights_of(name), normalize=True))
        assert not wrong.any(), f"{name}: {wrong.sum()} of {tensor.numel()} elements"


def merge(document: Mapping[str, Any], out: Path, architecture: str) -> dict[str, torch.Tensor]:
    """The tensors of `mergeyard merge`, which transformers loads and saves as they are."""
    run_merge({"dtype": "bfloat16", **document}, out)
    merged, again = checkpoint(str(out)), out.with_name("again")
    loaded(architecture, out).save_pretrained(again)
    saved = checkpoint(str(again))
    assert saved.keys() == merged.keys()
    assert all(torch.equal(saved[name], merged[name]) for name in merged)
    return merged


def source(folder: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(folder), **more}


def in_its_module(architecture: str, slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The slices at the top of a document, or under the module that holds a multimodal model's text."""
    return {"modules": {"text_decoder": {"slices": slices}}} if architecture in VLMS else {"slices": slices}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gradient_goes_over_the_layers_of_each_stack(
    architecture: str, deep: Callable[[str], Path], tmp_path: Path
) -> None:
    parents = deep(architecture)
    rising, falling = [0.1, 0.5, 0.2], [0.9, 0.3]
    models = [
        source(parents / "one", parameters={"weight": rising}),
        source(parents / "two", parameters={"weight": falling}),
    ]
    merged = merge({"merge_method": "linear", "models": models}, tmp_path / "merge", architecture)

    def weights_of(name: str) -> tuple[float, float]:
        at = position(name, [*merged])
        return float(np.interp(at, [0, 0.5, 1], rising)), float(np.interp(at, [0, 1], falling))

    assert_linear(merged, parents, weights_of)


def test_a_wrong_weight_is_noticed(deep: Callable[[str], Path], tmp_path: Path) -> None:
    parents = deep("qwen2")
    models = [source(parents / who, parameters={"weight": weight}) for who, weight in (("one", [0.1, 0.2]), ("two", 1))]
    merged = merge({"merge_method": "linear", "models": models}, tmp_path / "merge", "qwen2")
    with pytest.raises(AssertionError, match=r"model\.layers\.1\."):
        assert_linear(merged, parents, lambda name: (0.2 if ".2." in name else 0.1, 1.0))


def test_a_filter_takes_the_tensors_with_its_text(
    architecture: str, deep: Callable[[str], Path], tmp_path: Path
) -> None:
    parents = deep(architecture)
    by_name = [
        {"filter": "att", "value": 0.9},
        {"filter": "embed", "value": 0.2},
        {"filter": "norm", "value": [0.3, 0.8]},
    ]
    models = [
        source(parents / "one", parameters={"weight": [*by_name, {"value": 0.5}]}),
        source(parents / "two", parameters={"weight": 0.4}),
    ]
    merged = merge({"merge_method": "linear", "models": models}, tmp_path / "merge", architecture)

    def weights_of(name: str) -> tuple[float, float]:
        if "att" in name:
            return 0.9, 0.4
        if "embed" in name:
            return 0.2, 0.4
        return (0.3 + 0.5 * position(name, [*merged]), 0.4) if "norm" in name else (0.5, 0.4)

    assert_linear(merged, parents, weights_of)


def test_two_slices_have_weights_of_their_own(architecture: str, deep: Callable[[str], Path], tmp_path: Path) -> None:
    parents = deep(architecture)
    first, last = (0.7, 0.4), (0.2, 0.9)
    slices = [
        {
            "sources": [
                source(parents / who, layer_range=[begin, end], parameters={"weight": weight})
                for who, weight in zip(("one", "two"), weights, strict=True)
            ]
        }
        for (begin, end), weights in (((0, 2), first), ((2, LAYERS), last))
    ]
    merged = merge({"merge_method": "linear", **in_its_module(architecture, slices)}, tmp_path / "merge", architecture)

    def weights_of(name: str) -> tuple[float, float]:
        if architecture in VLMS and VISION.search(name):
            return 1.0, 0.0  # the tower and the projector are copied from the first model
        at = place(name)
        return first if (at[1] < 2 if at else BEFORE.search(name)) else last

    assert_linear(merged, parents, weights_of)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stack_of_two_models_loads_with_as_many_layers(
    architecture: str, deep: Callable[[str], Path], tmp_path: Path
) -> None:
    parents = deep(architecture)
    origins = [("one", 0), ("one", 1), ("two", 1), ("two", 2)]
    slices = [
        {"sources": [source(parents / "one", layer_range=[0, 2])]},
        {"sources": [source(parents / "two", layer_range=[1, LAYERS])]},
    ]
    document = {"merge_method": "passthrough", **in_its_module(architecture, slices)}
    merged = merge(document, tmp_path / "merge", architecture)
    of = {who: checkpoint(str(parents / who)) for who in ("one", "two")}
    for name, tensor in merged.items():
        at = place(name)
        if architecture in VLMS and VISION.search(name):
            expected = of["one"][name]
        elif at is None:
            expected = of["one" if BEFORE.search(name) else "two"][name]
        else:
            who, layer = origins[at[1]]
            expected = of[who][re.sub(rf"^{re.escape(at[0])}\.\d+\.", f"{at[0]}.{layer}.", name)]
        assert torch.equal(tensor, expected), name
    whole = loaded(architecture, tmp_path / "merge").config.get_text_config()
    before = loaded(architecture, parents / "one").config.get_text_config()
    assert whole.num_hidden_layers == len(origins)
    if getattr(before, "layer_types", None) is not None:
        assert whole.layer_types == [before.layer_types[layer] for _, layer in origins]


def test_a_union_of_vocabularies_has_a_row_for_every_token(
    architecture: str, deep: Callable[[str], Path], tmp_path: Path
) -> None:
    parents = deep(architecture)
    size = 64
    words = [f"t{number}" for number in range(size)]
    vocabularies = {"one": words, "two": [*words[: size - 2], "x", "y"]}  # two lacks two tokens, and has two others
    for who, tokens in vocabularies.items():
        shutil.copytree(parents / who, tmp_path / who)
        (tmp_path / who / "tokenizer.json").write_text(json.dumps(word_level(tokens)))
    models = [
        source(tmp_path / who, parameters={"weight": weight}) for who, weight in zip(vocabularies, WEIGHTS, strict=True)
    ]
    document = {"merge_method": "linear", "models": models, "tokenizer_source": "union"}
    merged = merge(document, tmp_path / "merge", architecture)
    union: dict[str, int] = json.loads((tmp_path / "merge" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {*union} == {*words, "x", "y"}
    one, two = doubles(tmp_path / "one"), doubles(tmp_path / "two")
    for name, tensor in merged.items():
        pair = [one[name], two[name]]
        if tensor.shape != one[name].shape:
            assert tensor.shape == (len(union), *one[name].shape[1:])
            pair = rows_of_union(union, vocabularies, pair)
        wrong = ~explained(tensor, linear(pair, WEIGHTS, normalize=True))
        assert not wrong.any(), f"{name}: {wrong.sum()} of {tensor.numel()} elements"
    assert loaded(architecture, tmp_path / "merge").get_input_embeddings().weight.shape[0] == len(union)


def rows_of_union(
    union: Mapping[str, int], vocabularies: Mapping[str, Sequence[str]], tables: Sequence[Array]
) -> list[Array]:
    """Each model's table in the union's order; a token that a model lacks has there the row of the other."""
    found: list[Array] = []
    for index in range(2):
        numbers = [{token: row for row, token in enumerate(tokens)} for tokens in vocabularies.values()]
        table = np.zeros((len(union), *tables[0].shape[1:]))
        for token, row in union.items():
            owner = index if token in numbers[index] else 1 - index
            table[row] = tables[owner][numbers[owner][token]]
        found.append(table)
    return found


def word_level(tokens: Sequence[str]) -> dict[str, Any]:
    """A tokenizer.json of whole words."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": tokens[0]},
    }
