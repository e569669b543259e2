"""Points merged in memory: bit for bit what the written point holds, whatever is merged before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Semaphore, Timer, current_thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.errors import BadInput, CorruptData, ObjectChanged
from jobs.job import load_job
from jobs.manifest import Manifest
from jobs.merge_tasks import Setting
from orchestrator.cluster.in_process import InProcessPool
from orchestrator.merging.driver import drive
from orchestrator.planning.parents import parents_as_points
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.watching import Watcher
from tests.orchestrator.models import weights, write_model
from workers.merging import resident as resident_module
from workers.merging.resident import ResidentParents
from workers.merging.tiles import TensorMerger
from workers.methods import METHODS
from workers.methods.tile import TILE_ELEMENTS

RECIPES = {
    "linear": "models: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.3}}]",
    "ties": "base_model: base, parameters: {weight: 0.5}, "
    "models: [{model: a, parameters: {density: 0.3}}, {model: b, parameters: {density: 0.6}}]",
    "breadcrumbs_ties": "base_model: base, parameters: {weight: 0.5, density: 0.4, gamma: 0.1}, "
    "models: [{model: a}, {model: b}]",
    "della_linear": "base_model: base, parameters: {weight: 0.5, density: 0.4, rescale: false}, "
    "models: [{model: a}, {model: b}]",
    "nuslerp": "base_model: base, parameters: {weight: 0.5, nuslerp_flatten: false, nuslerp_row_wise: true}, "
    "models: [{model: a}, {model: b}]",
    "model_stock": "base_model: base, parameters: {filter_wise: true}, models: [{model: a}, {model: b}]",
    "sce": "base_model: base, parameters: {select_topk: 0.3}, models: [{model: a}, {model: b}]",
    "ramplus_tl": "base_model: base, parameters: {epsilon: 1}, models: [{model: a}, {model: b}]",
    "consensus_ta": "base_model: base, parameters: {tall_lambda: 0.3}, models: [{model: a}, {model: b}]",
    "arcee_fusion": "base_model: base, models: [{model: b}]",
    "nearswap": "base_model: base, parameters: {t: 0.01}, models: [{model: b}]",
    "passthrough": "models: [{model: b, parameters: {scale: 0.5}}]",
}
"""Of other methods, two models with values that change something."""

WITHOUT_STATISTICS = [name for name, method in METHODS.items() if method.given is None]

VALUES = {"weight": 0.5, "density": 0.4, "t": 0.3, "lambda": 0.8, "select_topk": 0.5}


def recipe_of(method: str) -> str:
    base = {"required": "base_model: base,", "one of the models": "base_model: a,"}.get(METHODS[method].base, "")
    given = {name: VALUES[name] for name in METHODS[method].parameters if name in VALUES}
    return RECIPES.get(method) or f"{base} parameters: {json.dumps(given)}, models: [{{model: a}}, {{model: b}}]"


def write_parent(folder: Path, who: str, dtype: torch.dtype, **more: Tensor) -> None:
    """A sibling with a tensor of several tiles, an empty one, and integers and booleans that all siblings share."""
    generator = torch.Generator().manual_seed(len(who) + 7 * ord(who[0]))
    odd = {
        "wide": torch.randn(2 * TILE_ELEMENTS + 17, generator=generator).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "steps": torch.arange(6).view(2, 3),
        "mask": torch.tensor([True, False]),
    }
    write_model(folder / who, {**weights(who, dtype=dtype), **odd, **more})


def planned(folder: Path, method: str, dtype: str = "bfloat16", **more: str) -> Plan:
    recipe = recipe_of(method)
    parents = [name for name in ("a", "b", "base") if f"model: {name}" in recipe]
    text = "".join(
        [
            f"name: {method}-{more.get('numerics', 'float32')}\n",
            f"parents: {json.dumps({name: str(folder / name) for name in parents})}\n",
            f"recipe: {{merge_method: {method}, {recipe}, dtype: {dtype}}}\n",
            f"output: {folder / 'runs'}\n",
            *(f"{key}: {value}\n" for key, value in more.items()),
        ]
    )
    return make_plan(load_job(text, "job.yaml"))


def resident(plan: Plan, threads: int) -> ResidentParents:
    return ResidentParents(
        [tensor for shard in plan.points[0].layout.shards for tensor in shard.tensors],
        {name: checkpoint.parent for name, checkpoint in plan.parents.items()},
        seed=plan.job.seed,
        numerics=plan.job.numerics,
        threads=threads,
    )


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siblings")
    for who in ("base", "a", "b"):
        write_parent(folder, who, torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def written(siblings: Path) -> Callable[[Plan], tuple[dict[str, Tensor], Manifest]]:
    """The only point of a plan as the merge writes it: its tensors and its manifest."""

    def write(plan: Plan) -> tuple[dict[str, Tensor], Manifest]:
        result = drive(plan, InProcessPool(), Watcher(visible=False))
        [name] = result.points
        folder = Path(result.url) / "points" / name
        return load_file(folder / "model.safetensors"), Manifest.from_json((folder / "manifest.json").read_bytes())

    return write


@pytest.mark.parametrize("numerics", ["float32", "mergekit"])
@pytest.mark.parametrize("method", WITHOUT_STATISTICS)
def test_unwritten_tensors_are_the_written_ones_bit_for_bit(
    siblings: Path, written: Callable[[Plan], tuple[dict[str, Tensor], Manifest]], method: str, numerics: str
) -> None:
    plan = planned(siblings, method, numerics=numerics, seed="5")
    expected, manifest = written(plan)
    for threads in (1, 2):
        digests: dict[str, str] = {}
        merged = dict(resident(plan, threads).merged(plan.points[0].settings, digests))
        assert {name: same_bytes(merged[name], expected[name]) for name in expected} == dict.fromkeys(expected, True)
        assert digests == {name: entry.digest for name, entry in manifest.tensors.items()}


@pytest.mark.parametrize("numerics", ["float32", "mergekit"])
def test_a_thread_that_answers_merges_small_tensors_and_keeps_its_threads_of_torch(
    siblings: Path, numerics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A formula is computed by one thread of torch, so in another thread."""
    plan, run, threads = planned(siblings, "linear", numerics=numerics), TensorMerger.run, set[str]()
    seen = lambda *given: threads.add(current_thread().name) or run(*given)  # noqa: E731
    monkeypatch.setattr(TensorMerger, "run", seen)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        dict(resident(plan, 2).merged(plan.points[0].settings))
        assert torch.get_num_threads() == 2
        assert current_thread().name in threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("placed", "begun"), [(0, 3), (2, 5), (100, 6)])
def test_few_tensors_wait_that_take_memory_of_their_own(
    siblings: Path, placed: int, begun: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`placed` tensors are merged into a model; one piece each, and two of the others or five in all may wait."""
    monkeypatch.setattr(resident_module, "AHEAD", 2)
    monkeypatch.setattr(resident_module, "AHEAD_IN_PLACE", 5)
    plan = planned(siblings, "linear")
    parents, point = resident(plan, 1), plan.points[0].settings
    places = dict([*dict(parents.merged(point)).items()][:placed])
    begin, names = ResidentParents._begin, list[str]()
    monkeypatch.setattr(ResidentParents, "_begin", lambda *given: names.append(given[1].name) or begin(*given))
    next(parents.merged(point, places=places))
    assert len(names) == begun


def test_pieces_that_nobody_asks_for_any_more_are_not_merged(siblings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents, point = resident(plan := planned(siblings, "linear", numerics="mergekit"), 1), plan.points[0].settings
    run, merged, may_run = TensorMerger.run, list[object](), Semaphore(1)
    monkeypatch.setattr(resident_module, "AHEAD", 6)
    monkeypatch.setattr(TensorMerger, "run", lambda *given: (may_run.acquire() and merged.append(given)) or run(*given))
    tensors = parents.merged(point)
    next(tensors)
    Timer(0.3, may_run.release, [100]).start()
    tensors.close()
    assert len(merged) == 2, "the one that was asked for, and the one under way"


def test_a_point_is_merged_into_the_memory_of_a_loaded_model(
    siblings: Path, written: Callable[[Plan], tuple[dict[str, Tensor], Manifest]]
) -> None:
    plan = planned(siblings, "linear")
    expected, manifest = written(plan)
    places = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    unfit = {"wide": places["wide"].float(), "steps": torch.zeros(3, 2, dtype=torch.int64).t(), "mask": torch.ones(1)}
    first, second = [name for name in expected if name.endswith("input_layernorm.weight")][:2]
    tied = {first: places[first], second: places[first]}
    places |= unfit | tied
    digests: dict[str, str] = {}
    merged = resident(plan, 2).merged(plan.points[0].settings, digests, places)
    assert not any(place.any() for name, place in places.items() if name != "mask")  # untouched until asked for
    found = dict(merged)
    assert all(same_bytes(found[name], expected[name]) for name in expected)
    assert digests == {name: entry.digest for name, entry in manifest.tensors.items()}
    elsewhere = {name for name, tensor in found.items() if tensor.data_ptr() != places[name].data_ptr()}
    assert elsewhere - {"empty"} == unfit.keys() | tied.keys()
    assert not any(places[name].any() for name in ("wide", "steps", first))


def _without(setting: Setting, name: str) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in setting.parameters if key != name]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp"])
def test_what_was_merged_before_changes_nothing(siblings: Path, method: str) -> None:
    plan = planned(siblings, method)
    settings = plan.points[0].settings
    other = {"ties": ("density", (0.9, 0.1)), "dare_ties": ("density", (0.9, 0.1)), "slerp": ("t", 0.8)}[method]
    changed = tuple(replace(entry, parameters=(*_without(entry, other[0]), other)) for entry in settings)
    parents = resident(plan, 1)
    first = dict(parents.merged(settings))
    between = dict(parents.merged(changed))
    again = dict(parents.merged(settings))
    assert all(same_bytes(first[name], again[name]) for name in first)
    assert not torch.equal(first["wide"], between["wide"])


def test_overflows_are_counted_as_in_the_written_point(tmp_path: Path) -> None:
    """10⁵ is above 65504, the largest number of float16; a parent's own infinity is no overflow."""
    large = torch.ones(7, dtype=torch.bfloat16)
    large[:3] = 1e5
    for who in ("a", "b"):
        write_parent(tmp_path, who, torch.bfloat16, large=large, broken=torch.full((2,), torch.inf).bfloat16())
    plan = planned(tmp_path, "linear", dtype="float16")
    counted: dict[str, int] = {}
    assert dict(resident(plan, 2).merged(plan.points[0].settings, overflows=counted)).keys() > {"large", "broken"}
    assert counted == {"large": 3}
    assert drive(plan, InProcessPool(), Watcher(visible=False)).overflowed == {"merge": counted}


def test_a_parent_as_a_merge_of_itself_is_the_parent(siblings: Path) -> None:
    plan = planned(siblings, "linear")
    layout = plan.points[0].layout
    parent = next(point for point in parents_as_points(plan, layout) if point.name == "b")
    merged = dict(resident(plan, 2).merged(parent.settings))
    stored = load_file(siblings / "b" / "model.safetensors")
    assert all(same_bytes(merged[name], tensor) for name, tensor in stored.items())


def test_integers_that_differ_between_parents_are_refused(tmp_path: Path) -> None:
    write_parent(tmp_path, "a", torch.bfloat16)
    write_parent(tmp_path, "b", torch.bfloat16, steps=torch.arange(1, 7).view(2, 3))
    plan = planned(tmp_path, "linear")
    with pytest.raises(BadInput, match=r"tensor steps \(I64\) differs between a and b"):
        dict(resident(plan, 2).merged(plan.points[0].settings))


def test_a_parent_that_changed_since_planning_is_refused(tmp_path: Path) -> None:
    for who in ("a", "b"):
        write_parent(tmp_path, who, torch.bfloat16)
    plan = planned(tmp_path, "linear")
    write_parent(tmp_path, "b", torch.bfloat16, wide=torch.zeros(2 * TILE_ELEMENTS + 17, dtype=torch.bfloat16))
    with pytest.raises(ObjectChanged, match=r"b/model\.safetensors"):
        resident(plan, 1)


@pytest.fixture
def again(tmp_path: Path) -> Callable[[], Plan]:
    """Plans the merge of a merge with a parent; the merge lies where mergeyard wrote it, with its manifest."""
    folder = tmp_path
    for who in ("a", "b"):
        write_parent(folder, who, torch.bfloat16)
    drive(planned(folder, "linear"), InProcessPool(), Watcher(visible=False))
    first = folder / "runs" / "linear-float32" / "points" / "merge"
    text = (
        f"name: again\nparents: {{first: {first}, b: {folder / 'b'}}}\noutput: {folder / 'runs'}\n"
        "recipe: {merge_method: linear, models: [{model: first, parameters: {weight: 0.5}},"
        " {model: b, parameters: {weight: 0.5}}]}\n"
    )
    return lambda: make_plan(load_job(text, "job.yaml"))


def test_a_parent_with_a_manifest_is_held_against_it(again: Callable[[], Plan]):
    plan = again()
    manifest = Manifest.from_json((Path(plan.parents["first"].url) / "manifest.json").read_bytes())
    told = {name: place.digest for name, place in plan.parents["first"].tensors.items()}
    assert told == {name: entry.digest for name, entry in manifest.tensors.items()}
    assert {place.digest for place in plan.parents["b"].tensors.values()} == {""}
    assert drive(plan, InProcessPool(), Watcher(visible=False)).units_merged == 1
    assert dict(resident(plan, 1).merged(plan.points[0].settings)).keys() == told.keys()


def test_a_parent_that_is_not_what_its_manifest_says_is_refused_merged_or_resident(again: Callable[[], Plan]):
    first = Path(again().parents["first"].url)
    content = bytearray((first / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (first / "model.safetensors").write_bytes(content)
    plan = again()
    with pytest.raises(CorruptData, match=r"is not the one of manifest\.json there"):
        drive(plan, InProcessPool(), Watcher(visible=False))
    with pytest.raises(CorruptData, match=r"is not the one of manifest\.json there"):
        resident(plan, 1)
