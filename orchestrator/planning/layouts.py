"""The common part of points of one kind: their tensors, sources, arithmetic and files."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jobs.errors import BadInput
from jobs.job import COMMAND_LINE, Job
from jobs.merge_tasks import DTYPE_BITS, ParentFile, Source, TensorMerge, digest
from jobs.recipe import Recipe
from jobs.sources import Filtered
from jobs.tokenizers import AddedToken
from orchestrator.planning.beside import chat_template, copied_files, tokenizer_owner, without_absent_code
from orchestrator.planning.compatibility import (
    check_architecture,
    check_configs,
    check_tokenizers,
    is_tied,
    merged_config,
    untied_one,
)
from orchestrator.planning.language_models import adopted
from orchestrator.planning.slicing import (
    donor_of,
    held_whole,
    natural,
    pieces_of,
    plain_recipes,
    restacked,
)
from orchestrator.planning.tokenizers import fitted
from workers.checkpoints.activations import Activations
from workers.checkpoints.canonical import aligned, is_head, stored_name
from workers.checkpoints.configs import with_own_head, with_token_ids, with_vocabulary
from workers.checkpoints.dtypes import DTYPE_NAMES, FLOATS, TORCH_NAMES
from workers.checkpoints.fishers import FisherFile
from workers.checkpoints.grams import GramFile
from workers.checkpoints.opening import Checkpoint
from workers.checkpoints.stacks import layer_of

_EXPERT = re.compile(r"\.experts\.\d")
"""One expert of a mixture that is stored expert by expert."""

_UNTIED = "some parents tie their head to the embeddings, and others do not: the merge has a head of its own"


@dataclass(frozen=True)
class Shard:
    """One output file: its name and its tensors in file order."""

    name: str
    tensors: tuple[TensorMerge, ...]

    @cached_property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The settings that its tensors are merged by."""
        return tuple(sorted({tensor.setting for tensor in self.tensors}))


@dataclass(frozen=True, eq=False)
class Layout:
    """How a checkpoint is cut into shards; all points with the same parents and dtypes share one.

    There is one representative, piece, owner and position for each class of tensors. A piece is the place of its recipe
    in `plain_recipes`. An owner is the parent that the tensors are copied from, because others do not have them.
    `copied` and `left_out` are the files of the parents that a point gets, and that it does not get, by parent. With
    `tokenizer_stands_in` the donor has no tokenizer, and no recipe chose the one of `tokenizer_from`. `as_it_is` are
    the files of a checkpoint that is evaluated and not merged; it has no shards. `added_tokens` are those that the
    tokenizer of `tokenizer_from` lacks. `activations` are the statistics for AIM, `grams` the files of Gram matrices by
    member, `fishers` those of Fisher information.
    """

    shards: tuple[Shard, ...]
    representatives: tuple[TensorMerge, ...]
    pieces: tuple[int, ...]
    owners: tuple[str | None, ...]
    positions: tuple[float, ...]
    parents: tuple[str, ...]
    whole: tuple[str, ...]
    config: Mapping[str, Any]
    donor: str
    tokenizer_from: str
    chat_template: str | None
    copied: Mapping[str, str]
    left_out: Mapping[str, str]
    with_code: bool
    tokenizer_stands_in: bool
    as_it_is: tuple[ParentFile, ...] = ()
    added_tokens: tuple[AddedToken, ...] = ()
    remarks: tuple[str, ...] = ()
    activations: Activations | None = None
    grams: Mapping[str, GramFile] = field(default_factory=dict[str, GramFile])
    fishers: Mapping[str, FisherFile] = field(default_factory=dict[str, FisherFile])

    @cached_property
    def bytes(self) -> int:
        """Bytes of one point."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def beside(self) -> str:
        """sha256 of the files beside the weights: the config, and the owner of tokenizer and generation settings."""
        added = [dataclasses.asdict(token) for token in self.added_tokens]
        return digest(
            [
                self.config,
                self.donor,
                self.tokenizer_from,
                *(["code"] if self.with_code else []),
                *([added] if added else []),
            ]
        )

    @cached_property
    def index(self) -> dict[str, Any] | None:
        """model.safetensors.index.json, for more than one shard."""
        if len(self.shards) == 1:
            return None
        return {
            "metadata": {"total_size": self.bytes},
            "weight_map": {
                name: shard.name
                for name, shard in sorted((tensor.name, shard) for shard in self.shards for tensor in shard.tensors)
            },
        }


class TensorClasses:
    """Tensors that every recipe of the job treats alike: the same layer where there are gradients, the same filters."""

    def __init__(self, job: Job) -> None:
        self._filters: dict[str, None] = {}
        self._gradients = False
        recipes = (recipe for point in job.points for recipe in point.recipes)
        for part in (part for recipe in recipes for part in plain_recipes(recipe)):
            for parameters in (part.parameters, *(source.parameters for source in part.models)):
                for setting in parameters.values():
                    if isinstance(setting, tuple):
                        self._look(setting)

    def _look(self, setting: tuple[Any, ...]) -> None:
        for entry in setting:
            if isinstance(entry, Filtered):
                self._filters[entry.filter or "*"] = None
                self._gradients = self._gradients or isinstance(entry.value, tuple)
            else:
                self._gradients = True

    def of(self, tensor: str, layers: Mapping[str, range]) -> tuple[tuple[str, ...], float]:
        """(the filters that match, the position that gradients use)."""
        matching = tuple(name for name in self._filters if name in tensor)
        return matching, _position(tensor, layers) if self._gradients else 0.0


def _position(tensor: str, layers: Mapping[str, range]) -> float:
    """Where a tensor's layer lies between the first (0) and the last (1) of its slice, or of its stack without slices.

    As in mergekit, embeddings, final norm and head count as 0; the only layer of a stack, and layers beyond the counted
    ones, as 1.
    """
    stack, layer = layer_of(tensor) or ("", 0)
    if stack not in layers:
        return 0.0
    span = layers[stack]
    return min(1.0, (layer - span.start) / (len(span) - 1)) if len(span) > 1 else 1.0


def layout_of(job: Job, recipe: Recipe, parents: Mapping[str, Checkpoint], classes: TensorClasses) -> Layout:
    members = [parents[name] for name in recipe.references()]
    kin = adopted(members, donor_of(recipe))
    donor_name = kin.whole.name if kin.plain else donor_of(recipe)
    untied = None if kin.plain or job.config_from is not None else untied_one(members)
    context_from = _parent_named(job, "config_from", job.config_from, parents) or untied or parents[donor_name]
    tokenizer_from = tokenizer_owner(recipe, parents, donor_name)
    if any(member.unmergeable for member in members):
        return _as_it_is(job, recipe, members)
    check_architecture([member for member in members if member.name not in kin.plain], recipe.place)
    if context_from.name in kin.plain:
        raise BadInput(
            f"{job.place_of('config_from')}: {context_from.name} is a plain language model, and the output is not;"
            f" say {job.setting('config_from', donor_name)}"
        )
    members = kin.members
    # a transformation of checkpoints belongs here: what follows takes any tensors under any names
    members, tied = aligned(members, context_from)
    stored, vocabulary = members, fitted(recipe, members, parents[tokenizer_from], donor_name, tied)
    members = vocabulary.members
    dtype = recipe.out_dtype or recipe.dtype
    pieces = pieces_of(recipe, members, context_from.config)
    drops_head = job.config_from is not None and is_tied(context_from, context_from.config)
    tensors: list[TensorMerge] = []
    class_of: dict[tuple[Any, ...], int] = {}
    for number, piece in enumerate(pieces):
        names = [name for name in piece.names if not (drops_head and is_head(name, tied))]
        copied = kin.copied(names, piece.members)
        merged = [name for name in names if name not in copied]
        owned = _owned(merged, piece.members, tied, context_from.name, piece.recipe.place, job) | copied
        tensors += [
            _tensor(
                name,
                [member for member in members if member.name == owned[name]] if name in owned else piece.members,
                piece.recipe,
                dtype,
                job.numerics,
                tied,
                class_of.setdefault((number, owned.get(name), *classes.of(name, piece.layers)), len(class_of)),
            )
            for name in names
            if owned.get(name, "") is not None
        ]
    if not any(_floats(tensor) for tensor in tensors):
        raise BadInput(f"{recipe.place}: the parents hold no floating-point tensors; there is nothing to merge")
    donor, tokenizer, renumbered = parents[donor_name], parents[tokenizer_from], vocabulary.renumbered
    files, left_out = copied_files(donor, tokenizer, code=job.copy_code, renumbered=renumbered)
    kinds: Counter[str] = Counter()
    for tensor in tensors:
        kinds[tensor.dtype] += _floats(tensor)
    config = merged_config(donor, context_from, dtype or TORCH_NAMES[kinds.most_common(1)[0][0]])
    if untied is not None:
        config = with_own_head(config)
    if renumbered:
        config = with_token_ids(config, tokenizer.config)
    if vocabulary.rows is not None:
        config = with_vocabulary(config, vocabulary.rows)
    config, alike = restacked(pieces, members, context_from, config, holds=job.config_from is not None)
    # after the tensors: no setting helps parents of other shapes, and none is advised to them
    if job.config_from is None:
        configured = [replace(own, config=new.config) for own, new in zip(stored, alike, strict=True)]
        remedy = job.setting("config_from", "PARENT")
        tying = untied is None or not any(is_head(tensor.name, tied) for tensor in tensors)
        check_configs(kin.comparable(configured), recipe.place, remedy, tying=tying)
    if recipe.tokenizer_source is None:
        check_tokenizers(members, recipe.place)
    if len(pieces) > 1:
        tensors.sort(key=lambda tensor: natural(tensor.name))
    representatives = tuple(
        min(
            (tensor for tensor in tensors if tensor.setting == number),
            key=lambda tensor: _floats(tensor) or math.inf,
        )
        for number in range(len(class_of))
    )
    return Layout(
        shards=_shards(tensors, job.shard_bytes),
        representatives=representatives,
        pieces=tuple(number for number, *_ in class_of),
        owners=tuple(owner for _, owner, *_ in class_of),
        positions=tuple(
            _position(tensor.name, pieces[number].layers)
            for tensor, (number, *_) in zip(representatives, class_of, strict=True)
        ),
        parents=recipe.references(),
        whole=tuple(name for name in held_whole(pieces, members) if all(name in tensor.sources for tensor in tensors)),
        config=without_absent_code(config, files),
        donor=donor_name,
        tokenizer_from=tokenizer_from,
        chat_template=chat_template(recipe, members, tokenizer_from),
        copied={name: parent.name for name, parent in files.items()},
        left_out={name: parent.name for name, parent in left_out.items()},
        with_code=job.copy_code,
        tokenizer_stands_in=recipe.tokenizer_source is None and tokenizer_from != donor_name,
        added_tokens=vocabulary.added,
        remarks=(*vocabulary.remarks, *([_UNTIED] if untied else [])),
    )


def _as_it_is(job: Job, recipe: Recipe, members: Sequence[Checkpoint]) -> Layout:
    """The layout of a checkpoint that an engine runs as it is; `BadInput` where it would be merged or written."""
    refused = next(member for member in members if member.unmergeable)
    plain = (
        not recipe.parameters
        and recipe.models
        and not recipe.models[0].parameters
        and recipe.dtype is recipe.out_dtype is None
    )
    if recipe.merge_method != "passthrough" or len(members) > 1 or not plain or job.keep.kind != "none":
        raise BadInput(refused.unmergeable)
    on_command_line = job.source == COMMAND_LINE
    server = "a server (`--server URL`)" if on_command_line else "a server (`engine: openai`)"
    weights = [file for file in refused.files if file.key.endswith((".safetensors", ".gguf"))]
    if job.engine.name == "vllm" and len([file for file in weights if file.key.endswith(".gguf")]) > 1:
        raise BadInput(f"{refused.unmergeable}; to score it with vllm, give a folder with one GGUF file")
    if job.engine.name == "vllm" and not weights:
        raise BadInput(f"{refused.unmergeable}; to score it as it is, take {server}")
    if job.engine.name == "transformers":
        ways = server if on_command_line else f"`engine: vllm` or {server}"
        raise BadInput(f"{refused.unmergeable}; to score it as it is, take {ways}")
    return Layout(
        shards=(),
        representatives=(),
        pieces=(),
        owners=(),
        positions=(),
        parents=(refused.name,),
        whole=(refused.name,),
        config=refused.config,
        donor=refused.name,
        tokenizer_from=refused.name,
        chat_template=chat_template(recipe, members, refused.name),
        copied={},
        left_out={},
        with_code=False,
        tokenizer_stands_in=False,
        as_it_is=refused.files,
    )


def _floats(tensor: TensorMerge) -> int:
    """How many numbers of a tensor a method computes: all, or none of integers and booleans."""
    return tensor.elements if tensor.dtype in FLOATS else 0


def _parent_named(job: Job, key: str, name: str | None, parents: Mapping[str, Checkpoint]) -> Checkpoint | None:
    if name is None:
        return None
    if name not in parents:
        raise BadInput(
            f"{job.place_of(key)}: {key} names {name}, which is not a parent; the parents are {', '.join(parents)}"
        )
    return parents[name]


def _owned(
    names: Sequence[str],
    members: Sequence[Checkpoint],
    tied: Mapping[str, str],
    owner: str,
    place: str,
    job: Job,
) -> dict[str, str | None]:
    """Tensors outside the layers that some parents lack, and the parent of `config_from`; None if it lacks them too.

    Other differences are refused.
    """
    lacking = {name: [member.name for member in members if stored_name(name, member, tied) is None] for name in names}
    lacking = {name: without for name, without in lacking.items() if without}
    if not lacking:
        return {}
    in_layers = any(layer_of(name) is not None for name in lacking)
    if not in_layers and job.config_from in {member.name for member in members}:
        return {name: None if owner in without else owner for name, without in lacking.items()}
    listed = "; ".join(f"{name} is not in {' and '.join(without)}" for name, without in [*lacking.items()][:3])
    more = f"; and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    remedy = f"say whose to copy with {job.setting('config_from', 'PARENT')}; those that it lacks are left out"
    if in_layers:
        remedy = "take parents with the same layers and parts"
    if len({_EXPERT.search(name) is None for name in lacking if ".experts." in name}) == 2:
        remedy = (
            "some parents store each expert by itself, others all of a layer in one tensor: load each parent in"
            " transformers and save it with `model.save_pretrained(FOLDER, save_original_format=False)`"
        )
    raise BadInput(f"{place}: {len(lacking)} of {len(names)} tensors are not in all parents ({listed}{more}); {remedy}")


def _tensor(
    name: str,
    members: Sequence[Checkpoint],
    recipe: Recipe,
    dtype: str | None,
    numerics: str,
    tied: Mapping[str, str],
    setting: int,
) -> TensorMerge:
    """One output tensor. The head of a parent without one is its embeddings."""
    sources: dict[str, Source] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for member in members:
        stored = stored_name(name, member, tied)
        assert stored is not None, f"{name} is neither in {member.name} nor owned by another"
        sources[member.name], shapes[member.name] = member.tensors[stored], member.shapes[stored]
    first = members[0].name
    for other, shape in shapes.items():
        if shape != shapes[first]:
            raise BadInput(
                f"{recipe.place}: tensor {name} is {list(shapes[first])} in {first} and {list(shape)} in {other};"
                f" only equal shapes can be merged{_resizing(name, shapes[first], shape, tied)}"
            )
    output, arithmetic = _dtypes(name, sources, recipe, dtype, numerics)
    return TensorMerge(name, output, shapes[first], sources, setting, arithmetic)


def _resizing(name: str, shape: tuple[int, ...], other: tuple[int, ...], tied: Mapping[str, str]) -> str:
    """The remedy for embeddings and heads of different vocabularies."""
    if name not in {*tied, *tied.values()} or shape[1:] != other[1:]:
        return ""
    rows = max(shape[0], other[0])
    return f": give the smaller {rows} rows with `model.resize_token_embeddings({rows})` of transformers, and save it"


def _dtypes(
    name: str, sources: Mapping[str, Source], recipe: Recipe, dtype: str | None, numerics: str
) -> tuple[str, str]:
    """(stored dtype, arithmetic dtype) of one output tensor; float32 results are computed in float64."""
    kinds = {source.dtype for source in sources.values()}
    if not kinds <= set(FLOATS):
        if len(kinds) > 1:
            raise BadInput(
                f"{recipe.place}: tensor {name} is stored as {' and '.join(sorted(kinds))}; integers are copied, not"
                " merged: store it in one dtype in all parents"
            )
        return next(iter(kinds)), next(iter(kinds))
    native = next(iter(kinds)) if len(kinds) == 1 else "F64" if "F64" in kinds else "F32"
    output = DTYPE_NAMES[dtype] if dtype else native
    if numerics == "mergekit":
        return output, DTYPE_NAMES[recipe.dtype] if recipe.dtype else native
    return output, "F64" if output in ("F32", "F64") else "F32"


def _shards(tensors: Sequence[TensorMerge], shard_bytes: int) -> tuple[Shard, ...]:
    """Cuts the tensors into files of at most `shard_bytes` (a larger tensor has its own), wider dtypes first in each.

    Names as transformers gives them.
    """
    cut: list[list[TensorMerge]] = []
    room = 0
    for tensor in tensors:
        size = tensor.bytes
        if not cut or size > room:
            cut.append([])
            room = max(shard_bytes, size)
        cut[-1].append(tensor)
        room -= size
    names = (
        ["model.safetensors"]
        if len(cut) == 1
        else [f"model-{number:05d}-of-{len(cut):05d}.safetensors" for number in range(1, len(cut) + 1)]
    )
    return tuple(
        Shard(name, tuple(sorted(part, key=lambda tensor: -DTYPE_BITS[tensor.dtype])))
        for name, part in zip(names, cut, strict=True)
    )
