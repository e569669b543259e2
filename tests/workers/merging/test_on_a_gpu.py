"""Merging on a GPU that is not there: the bytes of a CPU, whatever lags behind."""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.errors import MergeyardError
from jobs.job import load_job
from jobs.manifest import Manifest
from orchestrator.cluster.in_process import InProcessPool
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.watching import Watcher
from tests.workers.merging.test_resident import WITHOUT_STATISTICS, recipe_of
from workers.gpu_memory import OUTSIDE_BYTES
from workers.merging.reading import ParentReader, Stretch
from workers.merging.resident import ResidentParents
from workers.merging.streams import Mark, Streams
from workers.methods.tile import TILE_ELEMENTS

VALUES = 3000
RECIPES = {
    "task_arithmetic": "base_model: base, parameters: {normalize: true, lambda: 0.8},"
    " models: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.5}}]",
    "ties": "base_model: base, parameters: {normalize: false, lambda: 0.7, density: 0.6},"
    " models: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.4}}]",
    "dare_ties": "base_model: base, parameters: {density: 0.4},"
    " models: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.4}}]",
    "model_stock": "base_model: base, models: [{model: a}, {model: b}, {model: c}]",
}
"""Beside those of `test_resident`, where a GPU rounds otherwise: with divisions, and with votes of -0.0."""


def write_parents(folder: Path) -> None:
    """Siblings of four tensors with zeros of both signs, in float32: its last bits show how a sum was rounded."""
    generator = torch.Generator().manual_seed(0)
    ground = torch.randn(VALUES, generator=generator)
    ground[::7], ground[::11] = 0.0, -0.0
    for who in ("base", "a", "b", "c"):
        values = ground if who == "base" else ground + 0.1 * torch.randn(VALUES, generator=generator)
        values = torch.where(torch.arange(VALUES) % 5 == 0, ground, values)
        (folder / who).mkdir(parents=True)
        tensors = {
            "wide": values.view(-1, 6),
            "norm": values[:5].clone(),
            "steps": torch.arange(6).view(2, 3),
            "empty": torch.empty(0, 4),
        }
        save_file(tensors, folder / who / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 64}
        (folder / who / "config.json").write_text(json.dumps(config))
        (folder / who / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siblings")
    write_parents(folder)
    return folder


def planned(folder: Path, method: str, runs: Path, numerics: str = "float32", **more: str) -> Plan:
    recipe = RECIPES.get(method) or recipe_of(method)
    parents = {name: str(folder / name) for name in ("a", "b", "base", "c") if f"model: {name}" in recipe}
    lines = [
        f"name: {method}-{numerics}",
        f"parents: {json.dumps(parents)}",
        f"recipe: {{merge_method: {method}, {recipe}, dtype: float32}}",
        f"output: {runs}",
        f"numerics: {numerics}",
        *(f"{key}: {value}" for key, value in more.items()),
    ]
    return make_plan(load_job("\n".join(lines) + "\n", "job.yaml"))


def resident(plan: Plan, device: str) -> ResidentParents:
    return ResidentParents(
        [tensor for part in plan.points[0].layout.shards for tensor in part.tensors],
        {name: checkpoint.parent for name, checkpoint in plan.parents.items()},
        seed=plan.job.seed,
        numerics=plan.job.numerics,
        device=device,
        threads=2,
    )


def written(plan: Plan, device: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The only point of a plan: its tensors and their digests."""
    result = drive(plan, InProcessPool(device=device), Watcher(visible=False))
    [name] = result.points
    folder = Path(result.url) / "points" / name
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
    return load_file(folder / "model.safetensors"), {name: entry.digest for name, entry in manifest.tensors.items()}


@pytest.mark.parametrize("numerics", ["float32", "mergekit"])
@pytest.mark.parametrize("method", WITHOUT_STATISTICS)
def test_a_gpu_gives_the_bytes_of_a_cpu(siblings: Path, card: Any, tmp_path: Path, method: str, numerics: str) -> None:
    on_cpu, digests = written(planned(siblings, method, tmp_path / "cpu", numerics), "cpu")
    plan = planned(siblings, method, tmp_path / "card", numerics)
    assert written(plan, "card")[1] == digests
    found: dict[str, str] = {}
    merged = dict(resident(plan, "card").merged(plan.points[0].settings, found))
    assert {tensor.device.type for tensor in merged.values()} == {"card"}
    assert found == digests
    assert torch.equal(merged["wide"].cpu(), on_cpu["wide"])


def test_memory_is_not_lent_again_before_the_copy_that_reads_it(siblings: Path, card: Any, tmp_path: Path) -> None:
    """The first slab is still on its way to the GPU when its memory is given back, and the second is read into it."""
    plan = planned(siblings, "linear", tmp_path)
    [tensor] = [each for each in plan.points[0].layout.shards[0].tensors if each.name == "wide"]
    parents = {name: checkpoint.parent for name, checkpoint in plan.parents.items()}
    half = VALUES // 2
    stretches = [Stretch(tensor, start, start + half, start, start + half) for start in (0, half)]
    expected = load_file(siblings / "a" / "model.safetensors")["wide"].view(-1)
    with ParentReader(parents, 4 * VALUES, device="card", progress=lambda read, written: None) as reader:
        slabs = [reader.submit([stretch]) for stretch in stretches]
        copies: list[torch.Tensor] = []
        lent: list[set[int]] = []
        for slab in slabs:
            copies.append(slab.raw[0]["a"])
            lent.append({id(each.buffer) for each in slab.reads})
            reader.release(slab)
        assert {each.device.type for each in copies} == {"card"}
        assert lent[0] == lent[1], "the second has the memory of the first"
        found = [each.cpu() for each in copies]
    assert torch.equal(torch.cat(found), expected)


def test_a_thread_waits_for_the_copies_of_another(siblings: Path, card: Any, tmp_path: Path) -> None:
    """Each thread has its stream, and one of them has copied a slab that both read."""
    plan = planned(siblings, "linear", tmp_path)
    [tensor] = [each for each in plan.points[0].layout.shards[0].tensors if each.name == "wide"]
    parents = {name: checkpoint.parent for name, checkpoint in plan.parents.items()}
    expected = load_file(siblings / "a" / "model.safetensors")["wide"].view(-1)
    streams = Streams("card")
    with ParentReader(parents, 4 * VALUES, device="card", progress=lambda read, written: None) as reader:
        slab = reader.submit([Stretch(tensor, 0, VALUES, 0, VALUES)])

        def read(_: int) -> Tensor:
            with streams.own():
                found = slab.raw[0]["a"]
                barrier.wait()  # neither has waited for the GPU before both have the slab
                return found.cpu()

        barrier = Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            assert [torch.equal(each, expected) for each in pool.map(read, range(2))] == [True, True]


def test_the_host_waits_once_a_piece_and_copies_back_what_is_written(siblings: Path, card: Any, tmp_path: Path) -> None:
    """Three tensors have numbers; the integers are compared. Nothing crosses the bus in memory that is not pinned."""
    drive(planned(siblings, "linear", tmp_path), InProcessPool(device="card"), Watcher(visible=False))
    stored = sum(tensor.nbytes for tensor in load_file(siblings / "a" / "model.safetensors").values())
    assert card.bytes["to the card"] <= 2 * stored + 100
    assert stored <= card.bytes["from the card"] <= stored + 100
    assert not [way for way in card.bytes if "pageable" in way]
    assert card.waits["copy from the card"] <= 4


def test_parents_that_do_not_fit_are_refused_before_they_are_read(siblings: Path, card: Any, tmp_path: Path) -> None:
    plan = planned(siblings, "linear", tmp_path)
    stored = sum(tensor.nbytes for tensor in load_file(siblings / "a" / "model.safetensors").values())
    card.total = OUTSIDE_BYTES + 3 * stored - 1
    with pytest.raises(MergeyardError, match=r"^the parents and a point: .* GB on card, of which this worker has"):
        resident(plan, "card")
    assert not card.bytes
    card.total += 1
    resident(plan, "card")


def large(siblings: Path, folder: Path) -> Plan:
    """A ties merge of one tensor of six tiles."""
    for who in ("base", "a", "b"):
        (folder / who).mkdir()
        values = torch.randn(6 * TILE_ELEMENTS, generator=torch.Generator().manual_seed(len(who)))
        save_file({"wide": values}, folder / who / "model.safetensors", metadata={"format": "pt"})
        for name in ("config.json", "tokenizer.json"):
            (folder / who / name).write_bytes((siblings / who / name).read_bytes())
    return planned(folder, "ties", folder / "runs")


def test_a_large_tensor_is_merged_in_pieces(
    siblings: Path, card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, the intermediate results of ties for all of a tensor would be many times the tensor."""
    monkeypatch.setattr("workers.merging.resident.GPU_PIECE_ELEMENTS", TILE_ELEMENTS)
    plan = large(siblings, tmp_path)
    card.lags = False
    parents = resident(plan, "card")
    settings = plan.points[0].settings
    before = card.live
    deque(parents.merged(settings), maxlen=0)
    card.count_from_here()
    deque(parents.merged(settings), maxlen=0)
    tensor, piece = 6 * TILE_ELEMENTS * 4, TILE_ELEMENTS * 4
    assert card.peak - before <= tensor + 32 * piece, "the point, and the intermediate results of one piece"


def test_where_memory_ends_caches_are_freed_and_then_pieces_are_halved(
    siblings: Path, card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge of all six tiles at once takes most; with less than that the bytes stay, down to a tile at a time."""
    plan = large(siblings, tmp_path)
    settings = plan.points[0].settings
    expected: dict[str, str] = {}
    deque(resident(plan, "cpu").merged(settings, expected), maxlen=0)
    card.lags = False
    parents = resident(plan, "card")
    held, tensor, tile = card.live, 6 * TILE_ELEMENTS * 4, TILE_ELEMENTS * 4
    card.count_from_here()
    deque(parents.merged(settings), maxlen=0)
    most = card.peak
    assert most - held > tensor + 32 * tile, "so that half of it is another thing than a tile"
    given_back: list[int] = []

    def merged_with(total: int, after: int) -> dict[str, str]:
        """The digests of new parents' point with so much memory, and with as much once caches were freed."""
        card.total, found = 80 << 30, dict[str, str]()
        given_back[:] = []
        parents = resident(plan, "card")
        monkeypatch.setattr(card, "empty_cache", lambda: given_back.append(setattr(card, "total", after) or after))
        card.total = total
        deque(parents.merged(settings, found), maxlen=0)
        return found

    del parents
    assert merged_with(most - 1, most) == expected and len(given_back) == 1, "caches alone are enough"
    short = held + tensor + 32 * tile
    assert merged_with(short, short) == expected and 3 <= len(given_back) <= 20
    with pytest.raises(MergeyardError, match=r"^wide: the memory of card that is left .*; give a worker more of a GPU"):
        merged_with(held + tensor + tile, held + tensor + tile)
    card.total = held + tile
    with pytest.raises(MergeyardError, match=r"^a point: the memory of card that is left to this worker is too little"):
        merged_with(held + tile, held + tile)
    assert merged_with(80 << 30, 80 << 30) == expected, "more of a GPU is a remedy"


def test_digests_of_a_loaded_model_are_read_by_another_thread_after_the_merge(
    siblings: Path, card: Any, tmp_path: Path
) -> None:
    """The second merge changes them, so the digests must be those of the memory as it is then."""
    plan = planned(siblings, "ties", tmp_path)
    settings = plan.points[0].settings
    expected: dict[str, str] = {}
    shapes = dict(resident(plan, "cpu").merged(settings, expected))
    parents = resident(plan, "card")
    places = {name: torch.empty_like(tensor, device="card") for name, tensor in shapes.items() if name != "norm"}
    for _ in range(2):
        digests: dict[str, str] = {}
        merged = dict(parents.merged(settings, digests, places))
        assert digests.keys() == {"norm"}, "it has no place"
        mark = Mark("card")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(parents.read_digests, digests, mark).result()
        assert digests == expected
        assert all(merged[name].data_ptr() == place.data_ptr() for name, place in places.items())
    dict(parents.merged(settings, None, places))
    parents.read_digests(digests := {}, Mark("card"))
    assert digests == {}, "nobody has asked"
