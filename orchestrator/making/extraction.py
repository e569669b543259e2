"""A LoRA adapter from a fine-tuned model and its base: which tensor goes in how, and the files of the adapter.

The layout of the files is PEFT's: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Literal

from jobs.errors import BadInput, StorageError, writing
from jobs.merge_tasks import DTYPE_BITS
from jobs.yaml_nodes import suggestion
from orchestrator.making.card import made_card
from orchestrator.making.output import Output
from orchestrator.merging.card import repository
from orchestrator.merging.gathering import json_file
from orchestrator.planning.compatibility import check_architecture
from orchestrator.words import code
from workers.checkpoints.canonical import ModelNames, aligned, model_names
from workers.checkpoints.dtypes import FLOATS, torch_dtype
from workers.checkpoints.opening import Checkpoint, all_places
from workers.making.low_rank import low_rank, squares
from workers.making.writing import Made, write_file
from workers.merging.buffers import keep_freed_memory
from workers.merging.deriving import Deriving
from workers.methods.tile import as_tensor

if TYPE_CHECKING:
    from torch import Tensor

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
PIECE_BYTES = 16 << 20
PIECE_ELEMENTS = 1 << 18
EXPERT = re.compile(r"\.experts\.\d+\.")

How = Literal["low rank", "whole", "bias", "left out"]

Compared = tuple[float, float, "Tensor | None", "Tensor | None"]
"""The squared norms of a change and of what is lost of it, and B and A; no factors if it has none, or is no change."""


@dataclass(frozen=True, slots=True)
class Wish:
    """The options of `extract-lora`; names and defaults are those of mergekit-extract-lora."""

    max_rank: int = 128
    distribute_scale: bool = True
    embed_lora: bool = False
    save_modules: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    sv_epsilon: float = 0.0
    skip_undecomposable: bool = False

    def check(self) -> None:
        """`BadInput` for values that cannot work."""
        if self.max_rank < 1:
            raise BadInput(f"--max-rank {self.max_rank}: a rank is at least 1")
        if not 0 <= self.sv_epsilon < math.inf:
            raise BadInput(f"--sv-epsilon {self.sv_epsilon}: it takes a number from 0 on")
        for option, patterns in (("--exclude-regex", self.exclude), ("--include-regex", self.include)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise BadInput(f"{option} {pattern!r}: not a regular expression ({error})") from None

    def excludes(self, module: str) -> bool:
        """Whether a pattern of `exclude` is found in its name."""
        return any(re.search(pattern, module) for pattern in self.exclude)

    def takes(self, module: str) -> bool:
        """Whether its name has a pattern of `include`, if there are any, and none of `exclude`."""
        included = not self.include or any(re.search(pattern, module) for pattern in self.include)
        return included and not self.excludes(module)

    def saves(self, module: str) -> bool:
        """Whether the module is to be stored whole."""
        return module in self.save_modules or module.rpartition(".")[2] in self.save_modules


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the adapter's model: its names in both models and in the class, and how its change is kept.

    `base` is None if the base lacks it or has it in another shape. `transposed` is set for embeddings and for GPT-2's
    layers, whose weight is (inputs × outputs).
    """

    tensor: str
    base: str | None
    module: str
    parameter: str
    how: How
    kind: str

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to one of several experts, which PEFT wants all, and at one rank."""
        return EXPERT.search(self.module) is not None

    @property
    def transposed(self) -> bool:
        """Whether the adapter holds the factors of the transposed change."""
        return self.kind in ("embedding", "conv1d")


@dataclass(frozen=True, slots=True)
class Kept:
    """A changed tensor: the rank of its factors, and the squared norms of its change and of what is lost of it.

    `rank` is None for a tensor that is stored whole or left out; `change` is NaN if the base has no such tensor.
    """

    tensor: str
    how: How
    rank: int | None
    change: float
    lost: float

    def document(self) -> dict[str, Any]:
        """For `--json`; `relative_error` is ‖change − kept‖₂ / ‖change‖₂."""
        return {"tensor": self.tensor, "how": self.how, "rank": self.rank, "relative_error": relative([self])}


def relative(kept: Collection[Kept]) -> float:
    """‖change − kept‖₂ / ‖change‖₂ over these tensors together."""
    change = sum(one.change for one in kept if one.change == one.change)
    return math.sqrt(sum(one.lost for one in kept) / change) if change else 0.0


@dataclass(frozen=True)
class Extraction:
    """A finished adapter; `rank` is that of its config, the largest, and `whole` are the modules stored whole."""

    url: str
    kept: Sequence[Kept]
    rank: int
    bytes: int
    whole: Sequence[str]
    biases: bool


class Extractor:
    """Makes one adapter. Raises `BadInput` at once for models that do not fit together.

    On a CPU, as many tensors as `threads` are compared at once; `threads` does not change the adapter.
    """

    def __init__(self, model: Checkpoint, base: Checkpoint, wish: Wish, url: str, *, device: str, threads: int) -> None:
        wish.check()
        check_architecture([base, model], "extract-lora")
        self.output = Output(url, {"extract_lora": asdict(wish)}, {"base": base, "model": model})
        (self._base, self._model), _ = aligned([base, model], base)
        self._wish, self._device, self._origin = wish, device, base
        self._threads = threads if device == "cpu" else 1
        names = model_names(json.dumps(base.config))
        self._modules = {**_guessed(self._model, names), **names.modules}
        self._reading = Deriving(all_places({base.name: base, model.name: model}))
        self.parts = _parts(self._base, self._model, names, self._modules, wish)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the tensors that are compared."""
        return sum(map(self._bytes, self.parts))

    def run(self, progress: Callable[[int], None]) -> Extraction:
        """Reads both models tensor by tensor and writes the adapter; a tensor that is stored whole is read twice."""
        keep_freed_memory()
        decomposed: dict[str, list[Made]] = {}
        kept: list[Kept] = []
        whole = {part.module for part in self.parts if self._wish.saves(part.module)}
        try:
            with (
                tempfile.TemporaryFile() as spool,  # a file begins with the sizes of its tensors: the ranks
                closing(self._all_compared()) as all_compared,
            ):
                for part, (norm, lost, b, a) in all_compared:
                    if b is not None and a is not None:
                        factors = self._spooled(part, b, a, spool)
                        if rank := factors[0].shape[0]:
                            decomposed[part.module] = factors
                        if norm > 0:
                            kept.append(Kept(part.tensor, "low rank", rank, norm, lost))
                    elif norm != 0:
                        whole |= {part.module} if part.how == "whole" else set[str]()
                        kept.append(Kept(part.tensor, part.how, None, norm, norm if part.how == "left out" else 0.0))
                    progress(self._bytes(part))
                changed = {one.tensor for one in kept}
                if not any(part.is_expert and part.tensor in changed for part in self.parts):
                    decomposed = {name: factors for name, factors in decomposed.items() if not EXPERT.search(name)}
                ranks = {module: factors[0].shape[0] for module, factors in decomposed.items()}
                made = [factor for factors in decomposed.values() for factor in factors]
                biases = [part for part in self.parts if part.how == "bias" and part.tensor in changed]
                layers = {module: f"{module}.base_layer" for module in ranks}  # as PEFT wraps them
                made += [self._stored(part, f"{layers.get(part.module, part.module)}.bias") for part in biases]
                made += [
                    self._stored(part, f"{part.module}.{part.parameter}") for part in self.parts if part.module in whole
                ]
                return self._write(made, kept, ranks, whole, biases=bool(biases))
        except OSError as error:
            folder = tempfile.gettempdir()
            raise StorageError(f"{folder}: {error.strerror}; set TMPDIR to a folder with more room") from error

    def _bytes(self, part: Part) -> int:
        return _size(self._model, part.tensor) + (_size(self._base, part.base) if part.base is not None else 0)

    def _all_compared(self) -> Generator[tuple[Part, Compared]]:
        """All parts in order, each compared on one processor, so that their number does not change the rounding."""
        import torch

        with ThreadPoolExecutor(self._threads, "compare", torch.set_num_threads, (1,)) as pool:
            try:
                yield from zip(self.parts, pool.map(self._compared, self.parts), strict=True)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _compared(self, part: Part) -> Compared:
        import torch

        if part.base is None:
            return math.nan, 0.0, None, None
        if part.how != "low rank":
            return self._finite(part, sum(map(squares, self._changes(part, part.base)))), 0.0, None, None
        change, norm = torch.empty(math.prod(self._model.shapes[part.tensor])), 0.0
        places = change.split(PIECE_ELEMENTS)
        for place, piece in zip(places, self._changes(part, part.base), strict=True):
            norm += squares(place.copy_(piece))
        if self._finite(part, norm) == 0 and not part.is_expert:
            return norm, 0.0, None, None
        change = change.reshape(self._model.shapes[part.tensor]).to(self._device)
        change = change.T if part.transposed else change
        wish, name = self._wish, self._model.tensors[part.tensor].dtype
        factors = low_rank(change, wish.max_rank, wish.sv_epsilon, distribute=wish.distribute_scale)
        b, a = (factor.to(torch_dtype(name)) for factor in factors)
        lost = squares(change, b, a)
        if part.is_expert:
            more = min(wish.max_rank, *change.shape) - len(a)
            b, a = (torch.nn.functional.pad(b, (0, more)), torch.nn.functional.pad(a, (0, 0, 0, more)))
        return norm, lost, b, a

    def _finite(self, part: Part, norm: float) -> float:
        if not math.isfinite(norm):
            raise BadInput(f"tensor {part.tensor} holds NaN or infinity; -e {part.module} leaves it out")
        return norm

    def _changes(self, part: Part, base: str) -> Iterator[Tensor]:
        """The model's tensor less the base's, 1-D in float32, in pieces of at most `PIECE_ELEMENTS`."""
        ours, theirs = (
            self._reading.pieces(member.name, member.tensors[name], name, PIECE_ELEMENTS)
            for member, name in ((self._model, part.tensor), (self._base, base))
        )
        for new, old in zip(ours, theirs, strict=True):
            yield as_tensor(new).float() - as_tensor(old).float()

    def _spooled(self, part: Part, b: Tensor, a: Tensor, spool: IO[bytes]) -> list[Made]:
        """A and B, whose bytes lie in `spool`."""
        name = self._model.tensors[part.tensor].dtype
        suffixes = (
            ("lora_embedding_A", "lora_embedding_B") if part.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        )
        made: list[Made] = []
        for suffix, factor in zip(suffixes, (a, b), strict=True):
            start = spool.seek(0, 2)
            data = _bytes_of(factor)
            spool.write(data)
            pieces = partial(_read_pieces, spool, start, len(data))
            made.append(Made(f"{PREFIX}{part.module}.{suffix}", name, tuple(factor.shape), pieces))
        return made

    def _stored(self, part: Part, name: str) -> Made:
        """The model's own tensor under this name."""
        at, shape = self._model.tensors[part.tensor], self._model.shapes[part.tensor]

        def pieces() -> Iterator[memoryview]:
            for piece in self._reading.pieces(self._model.name, at, part.tensor, PIECE_ELEMENTS):
                yield piece.view("u1").data

        return Made(f"{PREFIX}{name}", at.dtype, shape, pieces)

    def _write(
        self,
        made: Sequence[Made],
        kept: Sequence[Kept],
        ranks: Mapping[str, int],
        whole: Collection[str],
        *,
        biases: bool,
    ) -> Extraction:
        if not ranks:
            raise BadInput(
                f"{self._model.url}: no tensor that is to be decomposed differs from {self._base.url};"
                " is it the right base?"
            )
        ordered = sorted(made, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
        config = self._config(ranks, whole, biases=biases)
        extraction = Extraction(
            self.output.store.url,
            kept,
            config["r"],
            sum(tensor.bytes for tensor in made),
            config["modules_to_save"],
            biases,
        )
        self.output.begin()
        with writing():
            entry, tensors = write_file(self.output.store, FILE, ordered)
        side = {"README.md": self._card(extraction).encode(), CONFIG: json_file(config)}
        self.output.finish(side, {FILE: entry}, tensors)
        return extraction

    def _card(self, extraction: Extraction) -> str:
        front = {
            "base_model": repository(self._origin.url),
            "base_model_relation": "adapter",
            "library_name": "peft",
            "tags": ["mergeyard", "lora"],
        }
        low = [one for one in extraction.kept if one.rank is not None]
        facts = {
            "Fine-tuned model": code(self._model.url),
            "Base": code(self._origin.url),
            "Largest rank": str(extraction.rank),
            "Tensors as low-rank factors": str(len(low)),
            "Lost of their change": f"{relative(low):.2%} (‖change − kept‖₂ / ‖change‖₂)",
            "Stored whole": ", ".join(map(code, extraction.whole)) or "–",
        }
        return made_card(
            extraction.url, front, f"A LoRA adapter extracted from {code(self._model.url)} by mergeyard.", facts
        )

    def _config(self, ranks: Mapping[str, int], whole: Collection[str], *, biases: bool) -> dict[str, Any]:
        """adapter_config.json. The scale of every module is 1: its alpha is its rank."""
        largest = max(ranks.values())
        others = {module: rank for module, rank in sorted(ranks.items()) if rank != largest}
        url, _, revision = self._origin.url.removeprefix("hf://").partition("@")
        on_hub = self._origin.url.startswith("hf://")
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": url if on_hub else self._origin.url,
            "revision": revision if on_hub and revision else None,
            "r": largest,
            "lora_alpha": largest,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": _shortest(ranks, self._modules, lambda module, end: f".{module}".endswith(f".{end}")),
            "modules_to_save": _shortest(whole, self._modules, str.endswith),
            "bias": "all" if biases else "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "use_rslora": False,
            "inference_mode": True,
        }


def _parts(
    base: Checkpoint,
    model: Checkpoint,
    names: ModelNames,
    modules: Mapping[str, str],
    wish: Wish,
) -> list[Part]:
    """Every tensor whose change the adapter may hold."""
    for asked in wish.save_modules:
        if not any(replace(wish, save_modules=(asked,)).saves(module) for module in modules):
            known = sorted({module.rpartition(".")[2] for module in modules} - {""})
            raise BadInput(f"--save-module {asked}: the model has no module of that name{suggestion(asked, known)}")
    own = {names.canonical(name) or name: name for name in model.tensors}
    theirs = {names.canonical(name) or name: name for name in base.tensors}
    shared = {head for head, source in names.tied.items() if head not in theirs and source in theirs}
    for head in shared - own.keys():  # PEFT loads both, each by itself
        if not wish.excludes(names.tied[head].rpartition(".")[0]):
            own[head] = own[names.tied[head]]
    theirs |= {head: theirs[names.tied[head]] for head in names.tied.keys() - theirs.keys() if head in own}
    if lacking := sorted(theirs.keys() - own.keys() - names.tied.keys()):
        raise BadInput(f"{model.url} lacks {theirs[lacking[0]]}, which {base.url} has; is it the right base?")
    pair = shared | {names.tied[head] for head in shared}
    found: list[Part] = []
    for name, tensor in own.items():
        if model.tensors[tensor].dtype not in FLOATS:
            continue
        module, _, parameter = name.rpartition(".")
        source, shape = theirs.get(name), model.shapes[tensor]
        same = source is not None and base.shapes[source] == shape
        vocabulary = name in names.tied or modules[module] == "embedding"
        how = _how(module, parameter, modules[module], wish, vocabulary=vocabulary, whole=name in pair or not same)
        if how is not None and how != "whole" and not same:
            there = "missing" if source is None else f"{list(base.shapes[source])}"
            raise BadInput(
                f"tensor {tensor} is {list(shape)} in {model.url} and {there} in {base.url};"
                f" --save-module {module} stores it whole"
            )
        if how is not None:
            found.append(Part(tensor, source if same else None, module, parameter, how, modules[module]))
    return found


def _how(module: str, parameter: str, kind: str, wish: Wish, *, vocabulary: bool, whole: bool) -> How | None:
    """How the change of a tensor is kept; None if it is not asked for.

    `whole` says that low-rank factors are no option: for a head tied to its embeddings, which would get the change of
    both when it is merged, and for a vocabulary of another size.
    """
    if wish.saves(module):
        return "whole"
    if vocabulary and (whole or not wish.embed_lora):
        return None if wish.excludes(module) else "whole"
    if not wish.takes(module):
        return None
    if kind and parameter == "weight":
        return "low rank"
    if wish.skip_undecomposable:
        return "left out"
    return "bias" if kind and parameter == "bias" else "whole"


def _guessed(model: Checkpoint, names: ModelNames) -> dict[str, str]:
    """The kinds of modules by names and shapes: of classes that transformers lacks, and of single experts.

    PEFT puts the factors of single experts together if the class keeps all experts of a layer in one tensor.
    """
    found: dict[str, str] = {}
    for stored, shape in model.shapes.items():
        name = names.canonical(stored) or stored
        module, _, parameter = name.rpartition(".")
        linear = parameter == "weight" and len(shape) == 2
        embeds = "embed" in module.rpartition(".")[2] or name in names.tied.values()
        found[module] = found.get(module) or ("" if not linear else "embedding" if embeds else "linear")
    return found


def _shortest(chosen: Collection[str], modules: Collection[str], ends: Callable[[str, str], bool]) -> list[str]:
    """The chosen modules by the last parts of their names, or by whole names where a last part is not theirs alone.

    `ends` says whether a module is meant by an ending.
    """
    found: set[str] = set()
    for module in chosen:
        last = module.rpartition(".")[2]
        alone = all(other in chosen for other in modules if ends(other, last))
        found.add(last if alone else module)
    return sorted(found)


def _size(member: Checkpoint, name: str) -> int:
    return math.prod(member.shapes[name]) * DTYPE_BITS[member.tensors[name].dtype] // 8


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_pieces(file: IO[bytes], start: int, size: int) -> Iterator[bytes]:
    for position in range(start, start + size, PIECE_BYTES):
        file.seek(position)
        yield file.read(min(PIECE_BYTES, start + size - position))
