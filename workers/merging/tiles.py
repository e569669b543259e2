"""The door to the methods: how one tensor is merged for several points, and which facts about it they need before.

Elements on a CPU are numpy arrays. Torch is imported here, when a formula needs it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput
from jobs.merge_tasks import Setting, TensorMerge
from workers.checkpoints.dtypes import FLOATS, TORCH_NAMES, any_nonfinite, nonfinite
from workers.methods import METHODS, running
from workers.methods.aim import relaxed, relaxed_pass
from workers.methods.passes import Pass
from workers.methods.tile import FACT_UNITS, TILE_ELEMENTS, Inputs, NotYetKnown, Reduction, Tile, as_tensor

if TYPE_CHECKING:
    from torch import Tensor

Elements = Any
"""1-D elements of a tensor in its own dtype: a numpy array, or a torch tensor on a GPU."""

Facts = dict[Reduction, Any]

FEW = 64
"""Elements by which two stretches nearly always differ already."""


class TensorMerger:
    """One tensor for the settings of several points, each by the cheapest way that it allows; its facts are known.

    That is a copy of bytes, or one pass by compiled loops for all points together, or the torch formula. On a GPU the
    loops are Triton's, where that is installed.
    """

    def __init__(
        self,
        tensor: TensorMerge,
        settings: Sequence[Setting],
        facts: Facts,
        *,
        seed: int,
        numerics: str,
        device: str = "cpu",
    ) -> None:
        self._tensor, self._settings, self._facts = tensor, settings, facts
        self._seed, self._numerics, self._device = seed, numerics, device
        self._copies: list[tuple[int, str]] = []
        self._passes: list[tuple[int, Pass]] = []
        self._formulas: list[tuple[int, Setting]] = []
        self.collapses: list[str | None] = [None] * len(settings)
        """For each setting, the reason why its merge is not one, in words."""
        self.alike: dict[tuple[int, str], bool] = {}
        """Whether all that was merged so far of (place, parent) has the parent's bytes; without plain copies."""
        if tensor.dtype not in FLOATS or not tensor.elements:
            return
        tile = _probe(tensor, facts, seed)
        for place, setting in enumerate(settings):
            if (parent := copied(tensor, setting)) is not None:
                self._copies.append((place, parent))
                continue
            self.collapses[place] = _collapse_of(tile, setting, tensor.arithmetic, numerics)
            for parent in setting.parents:
                self.alike[place, parent] = tensor.sources[parent].dtype == tensor.dtype
            found = pass_of(tile, setting, tensor.arithmetic, numerics)
            if found is not None and has_loop(tensor, setting, device):
                self._passes.append((place, found))
            else:
                self._formulas.append((place, setting))

    @property
    def by_torch(self) -> bool:
        """Whether a setting is merged by its torch formula, in one thread of torch."""
        return bool(self._formulas)

    def run(
        self, start: int, around: Mapping[str, Elements], first: int, outputs: Sequence[Elements]
    ) -> tuple[bool, list[int]]:
        """Writes the elements from `start` on, a multiple of `TILE_ELEMENTS`, of each point to its output.

        `around` has every parent's elements from `first` on, on the device; the outputs are equally long. Returns
        whether an element of a parent is NaN or infinite, and the places of the outputs that have such an element.
        """
        stop = start + len(outputs[0])
        raw = {name: elements[start - first : stop - first] for name, elements in around.items()}
        if self._tensor.dtype not in FLOATS:
            for output, setting in zip(outputs, self._settings, strict=True):
                _put(output, _common_value(self._tensor, setting, raw))
            return False, []
        if self._device != "cpu":
            return self._run_on_gpu(start, around, first, raw, outputs)
        for place, parent in self._copies:
            _put(outputs[place], raw[parent])
        finite: set[str] = set()
        broken: dict[int, bool] = {}
        if self._passes:
            places, passes = zip(*self._passes, strict=True)
            tile = Tile(self._tensor.name, start, raw, self._facts, self._seed, self._tensor.shape, around, first)
            into = [outputs[place] for place in places]
            of_parents, of_outputs = running.run(passes, tile, into, TORCH_NAMES[self._tensor.arithmetic])
            finite = {name for name, found in of_parents.items() if not found}
            broken = dict(zip(places, of_outputs, strict=True))
        if self._formulas:
            self._run_formulas(start, around, first, [as_tensor(output) for output in outputs])
        for (place, parent), alike in self.alike.items():
            if alike and not _equal(outputs[place], raw[parent]):
                self.alike[place, parent] = False
        for place in range(len(outputs)):
            if place not in broken:
                broken[place] = _has_nonfinite(outputs[place])
        of_any_parent = any(_has_nonfinite(raw[name]) for name in raw.keys() - finite)
        return of_any_parent, [place for place, found in broken.items() if found]

    def _run_on_gpu(
        self,
        start: int,
        around: Mapping[str, Elements],
        first: int,
        raw: Mapping[str, Tensor],
        outputs: Sequence[Elements],
    ) -> tuple[bool, list[int]]:
        """As `run`; an output is on the GPU or in pinned memory. The host waits once, where nothing equals a parent.

        What is rounded and compared is on the GPU: a copy with a change of dtype would take float32 over the bus.
        """
        import torch

        with torch.inference_mode():
            ours = [as_tensor(output) for output in outputs]
            into = [
                each if each.device.type != "cpu" else torch.empty(each.shape, dtype=each.dtype, device=self._device)
                for each in ours
            ]
            broken: dict[int, Tensor] = {}
            for place, parent in self._copies:
                into[place].copy_(raw[parent])
            if self._passes:
                tile = Tile(self._tensor.name, start, raw, self._facts, self._seed, self._tensor.shape, around, first)
                broken = self._launched(tile, into)
            if self._formulas:
                self._run_formulas(start, around, first, into)
            for output, found in zip(ours, into, strict=True):
                if output is not found:
                    output.copy_(found, non_blocking=True)  # has arrived when the flags have, which come after it
            alike = [pair for pair, so_far in self.alike.items() if so_far]
            heads = [_same_bits(into[place][:FEW], raw[parent][:FEW]) for place, parent in alike]
            broken = {
                place: broken[place] if place in broken else _lacks_a_number(each) for place, each in enumerate(into)
            }
            seen = {parent for place, _ in self._passes for parent in self._settings[place].parents}
            others = [_lacks_a_number(elements) for name, elements in raw.items() if name not in seen]
            flags: list[bool] = torch.stack([*heads, *broken.values(), *others]).tolist()
            for (place, parent), head in zip(alike, flags, strict=False):
                self.alike[place, parent] = head and bool(_same_bits(into[place], raw[parent]))
            found = [place for place, flag in zip(broken, flags[len(heads) :], strict=False) if flag]
            # an element that is NaN or infinite in a parent is so in the result of a pass that has read it
            suspects = {parent for place in found for parent in self._settings[place].parents} & seen
            of_any_parent = any(flags[len(heads) + len(into) :]) or any(_lacks_a_number(raw[name]) for name in suspects)
        return of_any_parent, found

    def _launched(self, tile: Tile, into: Sequence[Tensor]) -> dict[int, Tensor]:
        """Begins the passes where the parents are; by place, whether the output has an element that is no number."""
        from workers.methods import launching

        works = [launching.Work(each, tile, into[place]) for place, each in self._passes]
        flags = launching.run(works, TORCH_NAMES[self._tensor.arithmetic]) > 0
        return {place: flag for (place, _), flag in zip(self._passes, flags, strict=True)}

    def _run_formulas(self, start: int, around: Mapping[str, Elements], first: int, into: Sequence[Tensor]) -> None:
        import torch

        one_torch_thread()
        with torch.inference_mode():
            stop, units = start + len(into[0]), 1 if self._device == "cpu" else None
            for tile in tiles(self._tensor, start, stop, around, first, self._facts, self._seed, units=units):
                place = slice(tile.start - start, tile.start - start + tile.elements)
                for index, setting in self._formulas:
                    into[index][place].copy_(merge_tile(tile, setting, self._tensor.arithmetic, self._numerics))


def tiles(
    tensor: TensorMerge,
    start: int,
    stop: int,
    around: Mapping[str, Elements],
    first: int,
    facts: Facts,
    seed: int,
    *,
    units: int | None = 1,
    asked: Sequence[Reduction] = (),
) -> Iterator[Tile]:
    """The elements `[start, stop)` cut into tiles of so many `TILE_ELEMENTS`; None leaves them whole.

    `around` has those from `first` on; `asked` are the facts that are sought.
    """
    step = max(1, stop - start) if units is None else units * TILE_ELEMENTS
    for at in range(start, stop, step):
        inside = slice(at - first, min(at + step, stop) - first)
        raw = {name: elements[inside] for name, elements in around.items()}
        yield Tile(tensor.name, at, raw, facts, seed, tensor.shape, around, first, asked)


def in_rows(settings: Iterable[Setting]) -> bool:
    """Whether a setting asks for the whole rows of which a tile has a part."""
    return any(METHODS[setting.method].whole_rows for setting in settings)


def merge_tile(tile: Tile, setting: Setting, arithmetic: str, numerics: str) -> Tensor:
    """The merged elements of one tile in the arithmetic dtype; `NotYetKnown` when a whole-tensor fact is missing."""
    inputs = _inputs(tile, setting, arithmetic, numerics)
    merged = METHODS[setting.method].merge(inputs, **_keywords(setting))
    return merged if setting.omega is None else relaxed(inputs, merged, setting.omega)


def pass_of(tile: Tile, setting: Setting, arithmetic: str, numerics: str) -> Pass | None:
    """The setting as one pass over memory, or None where only the formula has it; raises as `merge_tile` does."""
    fused = METHODS[setting.method].fused
    if fused is None or numerics == "mergekit":
        return None
    inputs = _inputs(tile, setting, arithmetic, numerics)
    if setting.omega is None:
        return fused(inputs, **_keywords(setting))
    plain = replace(setting, omega=None)
    merged = tile.remember((plain, arithmetic), lambda: fused(inputs, **_keywords(plain)))  # once for all ω
    return relaxed_pass(inputs, merged, setting.omega)


def has_loop(tensor: TensorMerge, setting: Setting, device: str) -> bool:
    """Whether the pass of a setting has a compiled loop on a device."""
    if device == "cpu":
        return True
    if METHODS[setting.method].by_torch:
        return False
    from workers.methods.launching import launches  # imports Triton, where it is installed

    return launches(device, (tensor.sources[name].dtype for name in setting.parents), tensor.dtype)


def _collapse_of(tile: Tile, setting: Setting, arithmetic: str, numerics: str) -> str | None:
    """The reason why a merge of these models is not one, in words."""
    collapse = METHODS[setting.method].collapse
    if collapse is None:
        return None
    taken = inspect.signature(collapse).parameters
    keywords = {name: value for name, value in _keywords(setting).items() if name in taken}
    return collapse(_inputs(tile, setting, arithmetic, numerics), **keywords)


def _inputs(tile: Tile, setting: Setting, arithmetic: str, numerics: str) -> Inputs:
    return Inputs(tile, setting.models, setting.base, TORCH_NAMES[arithmetic], numerics == "mergekit")


def _keywords(setting: Setting) -> dict[str, Any]:
    return {"lambda_" if name == "lambda" else name: value for name, value in setting.parameters}


def copied(tensor: TensorMerge, setting: Setting) -> str | None:
    """The parent whose bytes are the merged ones, if the setting is a plain copy in the parent's dtype."""
    if setting.method == "passthrough" and setting.parameters == (("scale", (1.0,)),):
        (parent,) = setting.models
        return parent if tensor.sources[parent].dtype == tensor.dtype else None
    return None


def _common_value(tensor: TensorMerge, setting: Setting, raw: Mapping[str, Elements]) -> Elements:
    """Integers and booleans are not averaged: the value that all of the point's parents share, else `BadInput`."""
    first, *others = setting.parents
    for other in others:
        here, there = raw[first], raw[other]
        if not (np.array_equal(here, there) if isinstance(here, np.ndarray) else here.equal(there)):
            raise BadInput(
                f"tensor {tensor.name} ({tensor.dtype}) differs between {first} and {other};"
                " integers cannot be merged, take it from one parent"
            )
    return raw[first]


def _put(output: Elements, elements: Elements) -> None:
    """Stores elements in an output of their dtype."""
    if isinstance(elements, np.ndarray) and isinstance(output, np.ndarray):
        output[:] = elements
    else:
        as_tensor(output).copy_(as_tensor(elements))


def missing_facts(
    tensor: TensorMerge, settings: Iterable[Setting], facts: Facts, *, seed: int, numerics: str
) -> list[Reduction]:
    """The facts about a tensor that these settings need before they merge it: found by merging one zero per parent."""
    if tensor.dtype not in FLOATS or tensor.elements == 0:
        return []
    tile = _probe(tensor, facts, seed)
    missing: dict[Reduction, None] = {}
    for setting in dict.fromkeys(settings):
        try:
            if pass_of(tile, setting, tensor.arithmetic, numerics) is None:
                merge_tile(tile, setting, tensor.arithmetic, numerics)
        except NotYetKnown as question:
            missing.update(dict.fromkeys(first for each in question.reductions for first in _first_unknown(each, tile)))
    return [*missing]


def learn(
    tensor: TensorMerge,
    setting: Setting,
    raw: Mapping[str, Elements],
    facts: Facts,
    step: int,
    *,
    seed: int,
    numerics: str,
    units: int | None = FACT_UNITS,
    each: Callable[[Callable[[int], _Shares], Iterable[int]], Iterable[_Shares]] = map,
) -> None:
    """Adds the facts about a whole tensor that a setting needs, from pieces of `step` elements that `each` maps."""
    while asked := missing_facts(tensor, [setting], facts, seed=seed, numerics=numerics):

        def answer(start: int, asked: Sequence[Reduction] = asked) -> _Shares:
            one_torch_thread()
            place = start, min(start + step, tensor.elements)
            found = [*tiles(tensor, *place, raw, 0, facts, seed, units=units, asked=asked)]
            return [[share for tile in found for share in question.of(tile)] for question in asked]

        answers = [*each(answer, range(0, tensor.elements, step))]
        for question, shares in zip(asked, zip(*answers, strict=True), strict=True):
            facts[question] = question.combine([share for piece in shares for share in piece])


_Shares = list[list[Any]]
"""The shares of one piece in the answer to each question."""


def _probe(tensor: TensorMerge, facts: Facts, seed: int) -> Tile:
    """A tile to ask for facts and passes: one zero of each parent, in a row of zeros."""
    zero, row = np.zeros(1, np.float32), np.zeros(tensor.shape[-1:] or (1,), np.float32)
    return Tile(
        *(tensor.name, 0, dict.fromkeys(tensor.sources, zero), facts, seed, tensor.shape),
        dict.fromkeys(tensor.sources, row),
    )


def _first_unknown(reduction: Reduction, tile: Tile) -> list[Reduction]:
    """The reduction, or whatever must be known before it."""
    try:
        reduction.ask(tile)
    except NotYetKnown as question:
        return [first for each in question.reductions for first in _first_unknown(each, tile)]
    return [reduction]


def _has_nonfinite(elements: Elements) -> bool:
    """Whether an element is NaN or infinite."""
    if isinstance(elements, np.ndarray):
        return any_nonfinite(elements)
    return not bool(elements.isfinite().all())


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two stretches have the same bytes; nearly always their first elements differ already."""
    if a[:FEW].tobytes() != b[:FEW].tobytes():
        return False
    size = FEW * 16
    while (alike := np.array_equal(a[:size].view(np.uint8), b[:size].view(np.uint8))) and size < a.size:
        size *= 16
    return alike


def _lacks_a_number(elements: Tensor) -> Tensor:
    """Whether an element on a GPU is NaN or infinite, as a tensor that nobody waits for."""
    return ~elements.isfinite().all()


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    """The same on a GPU, as a tensor that nobody waits for."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (a.view(bits) == b.view(bits)).all()


def overflowed(merged: Elements, parents: Iterable[Elements]) -> int:
    """How many elements are NaN or infinite, and finite in every parent."""
    broken = _nonfinite(merged)
    for parent in parents:
        broken &= ~_nonfinite(parent)
    return int(broken.sum())


def _nonfinite(elements: Elements) -> NDArray[np.bool_]:
    return nonfinite(elements) if isinstance(elements, np.ndarray) else (~elements.isfinite()).cpu().numpy()


def bytes_of(elements: Elements) -> memoryview:
    """The bytes of elements: their own memory, or a copy from a GPU."""
    if not isinstance(elements, np.ndarray):
        import torch

        elements = elements.cpu().view(torch.uint8).numpy()
    return elements.view(np.uint8).data


def one_torch_thread() -> None:
    """For a thread that merges: others do so beside it, and torch's own threads would only wait for each other."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
