"""transformers loads the merges of fifteen architectures, and every weight is the formula's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from transformers import PreTrainedModel

from orchestrator.cli import main
from tests.conformance.architectures import ARCHITECTURES, GEMMA, write_family
from tests.conformance.conftest import in_ordinary_runs
from tests.conformance.measures import explained, find_masks
from tests.conformance.reference import Array, Exact, TaskVectors, checkpoint, linear, slerp
from tests.conformance.verdicts import SIGMAS, assert_scaled_by_norms, wrongly_trimmed
from workers.methods import METHODS

METHODS_SHOWN = [name for name in ("linear", "slerp", "ties", "della", "model_stock") if name in METHODS]
WEIGHTS = (0.7, 0.4)
DENSITY, EPSILON = 0.6, 0.2


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the parents of an architecture at its first use; returns their folder."""
    root = tmp_path_factory.mktemp("architectures")

    def family(architecture: str) -> Path:
        folder = root / architecture.replace(" ", "-")
        if not folder.exists():
            write_family(folder, architecture)
        return folder

    return family


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`make test` takes one method of each architecture in turn, `make conformance` all."""
    if metafunc.definition.name.startswith("test_transformers_loads_the_merge"):
        every = len(METHODS_SHOWN) if in_ordinary_runs(metafunc.config) else 1
        pairs = [
            (architecture, method)
            for row, architecture in enumerate(ARCHITECTURES)
            for column, method in enumerate(METHODS_SHOWN)
            if (row + column) % every == 0
        ]
        metafunc.parametrize(("architecture", "method"), pairs)


def test_transformers_loads_the_merge_and_every_weight_is_the_formula_s(
    architecture: str, method: str, families: Callable[[str], Path], tmp_path: Path
) -> None:
    parents = families(architecture)
    merge, again = tmp_path / "merge", tmp_path / "again"
    run_merge(document(method, parents), merge)
    base, one, two = (doubles(parents / who) for who in ("base", "one", "two"))
    merged = checkpoint(str(merge))
    assert merged.keys() == base.keys()
    kept = Kept()
    for name, tensor in merged.items():
        assert tensor.dtype == (torch.float32 if method == "della" else torch.bfloat16)
        check(method, name, tensor, base[name], [one[name], two[name]], kept)
    kept.check()
    loaded(architecture, merge).save_pretrained(again)
    saved = checkpoint(str(again))
    assert saved.keys() == merged.keys()
    assert all(torch.equal(saved[name], merged[name]) for name in merged)


@pytest.mark.parametrize("method", METHODS_SHOWN)
def test_one_wrong_element_is_noticed(method: str, families: Callable[[str], Path], tmp_path: Path) -> None:
    parents = families("qwen2")
    run_merge(document(method, parents), tmp_path / "merge")
    name = "model.layers.0.mlp.up_proj.weight"
    base, *others = (doubles(parents / who)[name] for who in ("base", "one", "two"))
    wrong = checkpoint(str(tmp_path / "merge"))[name].clone()
    wrong[24, 7] += 0.01
    with pytest.raises(AssertionError):
        check(method, name, wrong, base, others, Kept())


def test_stacked_slices_answer_as_a_model_of_these_layers(families: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma 2, whose layers 0 and 1 differ: one slides, one does not."""
    parents = families("gemma2")
    layers = [("one", 0), ("one", 1), ("two", 1), ("two", 0)]
    sources = [{"model": str(parents / who), "layer_range": [layer, layer + 1]} for who, layer in layers]
    slices = [{"sources": [source]} for source in sources]
    run_merge({"merge_method": "passthrough", "slices": slices, "dtype": "float32"}, tmp_path / "merge")
    model = loaded("gemma2", tmp_path / "merge").float()

    own = transformers.Gemma2Config(**{**GEMMA, "num_hidden_layers": 4})
    kinds = ["sliding_attention", "full_attention"]
    own.layer_types = [kinds[layer] for _, layer in layers]
    by_hand = transformers.Gemma2ForCausalLM(own)
    one, two = (checkpoint(str(parents / who)) for who in ("one", "two"))
    weights = {name: (two if name == "model.norm.weight" else one)[name] for name in one if ".layers." not in name}
    for number, (who, layer) in enumerate(layers):
        stored = f"model.layers.{layer}."
        of_layer = {name: tensor for name, tensor in (one if who == "one" else two).items() if name.startswith(stored)}
        weights |= {name.replace(stored, f"model.layers.{number}."): tensor for name, tensor in of_layer.items()}
    assert by_hand.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
    tokens = torch.arange(24).reshape(1, 24)  # more than the window of 8
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, by_hand.eval()(tokens).logits)


@pytest.mark.parametrize(
    ("architecture", "module"),
    [("gpt2", None), ("qwen3 MoE", None), ("bert", None), ("gemma3 VLM", "text_decoder"), ("llava", "vision_tower")],
)
def test_transformers_loads_stacked_slices(
    architecture: str, module: str | None, families: Callable[[str], Path], tmp_path: Path
) -> None:
    parents = families(architecture)
    ranges = (("one", [0, 2]), ("two", [0, 2]), ("one", [1, 2]))
    slices = [{"sources": [{"model": str(parents / who), "layer_range": layers}]} for who, layers in ranges]
    parts = {"slices": slices} if module is None else {"modules": {module: {"slices": slices}}}
    run_merge({"merge_method": "passthrough", **parts}, tmp_path / "merge")
    counts = [loaded(architecture, folder).num_parameters() for folder in (parents / "one", tmp_path / "merge")]
    assert counts[0] < counts[1]


def test_a_language_model_is_merged_into_a_multimodal_one(families: Callable[[str], Path], tmp_path: Path) -> None:
    vlm, plain = families("llava") / "one", families("llama") / "one"
    parents = [{"model": str(plain), "parameters": {"weight": 0.5}}, {"model": str(vlm), "parameters": {"weight": 0.5}}]
    run_merge({"merge_method": "linear", "models": parents, "dtype": "float32"}, tmp_path / "merge")
    loaded("llava", tmp_path / "merge")
    merged, whole, language = (checkpoint(str(folder)) for folder in (tmp_path / "merge", vlm, plain))
    assert merged.keys() == whole.keys()
    for name, tensor in merged.items():
        expected = whole[name].float()
        if name.startswith("language_model."):
            expected = (expected + language[name.removeprefix("language_model.")].float()) / 2
        assert torch.equal(tensor, expected), name


VLMS, MIXTURES = ("gemma3 VLM", "qwen2-vl", "llava"), ("mixtral", "qwen3 MoE")


@pytest.mark.parametrize(
    ("architecture", "own_names"),
    [(vlm, names) for vlm in VLMS for names in ((), ("one",), ("two",))] + [(mixture, ()) for mixture in MIXTURES],
)
def test_parents_by_the_names_of_transformers_5_give_the_same_model(
    architecture: str, own_names: Sequence[str], families: Callable[[str], Path], tmp_path: Path
) -> None:
    """`own_names` keep the names under which the architecture was published."""
    published = families(architecture)
    renamed = {who: tmp_path / who if who not in own_names else published / who for who in ("one", "two")}
    for who, folder in renamed.items():
        if folder.parent == tmp_path:
            save_by_new_names(architecture, published / who, folder)
            assert checkpoint(str(folder)).keys() != checkpoint(str(published / who)).keys()
    expected, merge = tmp_path / "expected", tmp_path / "merge"
    merge_linear([published / who for who in ("one", "two")], expected)
    merge_linear([*renamed.values()], merge)
    states = [loaded(architecture, folder).state_dict() for folder in (expected, merge)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_stored_in_two_ways_are_refused_with_a_remedy_that_works(
    architecture: str, families: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (families(architecture) / who for who in ("one", "two"))
    save_by_new_names(architecture, two, tmp_path / "two")
    with pytest.raises(AssertionError):
        merge_linear([one, tmp_path / "two"], tmp_path / "merge")
    assert "save_pretrained(FOLDER, save_original_format=False)" in capsys.readouterr().err
    save_by_new_names(architecture, one, tmp_path / "one")
    merge_linear([tmp_path / "one", tmp_path / "two"], tmp_path / "merge")
    loaded(architecture, tmp_path / "merge")


def save_by_new_names(architecture: str, parent: Path, folder: Path) -> None:
    """Writes the parent again, by the names that its class has in transformers 5."""
    loaded(architecture, parent).save_pretrained(folder, save_original_format=False)


def loaded(architecture: str, folder: Path) -> PreTrainedModel:
    """The model of that folder, which transformers loads without a word."""
    cls = getattr(transformers, ARCHITECTURES[architecture][0])
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def merge_linear(parents: Sequence[Path], out: Path) -> None:
    """Merges them by `mergeyard merge`."""
    models = [{"model": str(parent), "parameters": {"weight": w}} for parent, w in zip(parents, WEIGHTS, strict=True)]
    run_merge({"merge_method": "linear", "models": models, "dtype": "bfloat16"}, out)


def run_merge(document: Mapping[str, Any], out: Path) -> None:
    """`mergeyard merge` of the document, in this process."""
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(document))
    assert main(["merge", str(config), str(out), "--quiet"]) == 0


def document(method: str, parents: Path) -> dict[str, Any]:
    """A mergekit document of the method."""
    per_model = {"linear": {}, "ties": {"density": DENSITY}, "della": {"density": DENSITY, "epsilon": EPSILON}}
    models: list[dict[str, Any]] = [{"model": str(parents / who)} for who in ("one", "two")]
    if method in per_model:
        for model, weight in zip(models, WEIGHTS, strict=True):
            model["parameters"] = {"weight": weight, **per_model[method]}
    if method == "slerp":
        models = [{"model": str(parents / "base")}, models[1]]
    return {
        "merge_method": method,
        "models": models,
        **({} if method == "linear" else {"base_model": str(parents / "base")}),
        **({"parameters": {"t": 0.3}} if method == "slerp" else {}),
        "dtype": "float32" if method == "della" else "bfloat16",  # the mask can be read off exact steps only
    }


def doubles(folder: Path) -> dict[str, Array]:
    """Every tensor of a checkpoint in float64."""
    return {name: tensor.double().numpy() for name, tensor in checkpoint(str(folder)).items()}


class Kept:
    """The elements that della kept over a whole model, and their expectation."""

    def __init__(self) -> None:
        self.least = self.most = self.expected = self.variance = 0.0

    def add(self, least: int, most: int, chances: Array) -> None:
        self.least += least
        self.most += most
        self.expected += chances.sum()
        self.variance += (chances * (1 - chances)).sum()

    def check(self) -> None:
        slack = SIGMAS * self.variance**0.5
        assert self.least - slack <= self.expected <= self.most + slack


def check(method: str, name: str, actual: torch.Tensor, base: Array, others: Sequence[Array], kept: Kept) -> None:
    """Asserts that one tensor of the merge is the formula's, for some mask where dice or equal magnitudes choose."""
    if method in ("ties", "della"):
        vectors = TaskVectors(
            base=base,
            deltas=tuple(other - base for other in others),
            weights=WEIGHTS,
            densities=(DENSITY, DENSITY),
            trim="magnitude" if method == "ties" else "random",
            consensus=True,
            normalize=True,
            rescale=method == "della",
            strength=1.0,
        )
        masks = find_masks(actual, vectors)
        assert masks.unexplained == 0, f"{name}: {masks.unexplained} of {base.size} elements fit no mask"
        if method == "ties":
            wrong = wrongly_trimmed(masks, vectors)
            assert wrong is None, f"{name}: {wrong}"
            return
        assert_scaled_by_norms(name, masks, vectors)
        for index, delta in enumerate(vectors.deltas):
            kept.add(*masks.bounds(index), della_chances(delta)[delta != 0])
        return
    exact = {
        "linear": lambda: linear(others, WEIGHTS, normalize=True),
        "slerp": lambda: slerp(base, others[1], 0.3),
        "model_stock": lambda: model_stock(base, others),
    }[method]()
    wrong = ~explained(actual, exact)
    assert not wrong.any(), f"{name}: {wrong.sum()} of {base.size} elements"
    return


def della_chances(delta: Array) -> Array:
    """The probability of keeping each element (Deep et al. 2024, arXiv 2406.11617): linear in its rank in its row."""
    rows = abs(delta).reshape(delta.shape[0] if delta.ndim > 1 else 1, -1)
    ranks = rows.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return (DENSITY - EPSILON + 2 * EPSILON * ranks / max(1, rows.shape[1] - 1)).reshape(delta.shape)


def model_stock(base: Array, others: Sequence[Array]) -> Exact:
    """t · mean(xᵢ) + (1 − t) · base with t = 2c / (1 + c), c the cosine of both task vectors (arXiv 2403.19522)."""
    one, two = (other - base for other in others)
    norms = np.linalg.norm(one) * np.linalg.norm(two)
    cosine = np.vdot(one, two) / max(norms, 1e-6)
    t = 2 * cosine / (1 + cosine)
    mean = sum(others) / 2
    return Exact(t * mean + (1 - t) * base, abs(t * mean) + abs((1 - t) * base), operations=64)
