"""The names of a model's tensors in transformers: parents may store a tensor by another name, twice, or needlessly.

Sources: `PreTrainedModel.state_dict`, `_tied_weights_keys`, `_keys_to_ignore_on_load_unexpected` and the renamings of
`transformers.conversion_mapping`, all of a model on the meta device.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from jobs.merge_tasks import ParentTensor
from workers.checkpoints.configs import completed, text_fields
from workers.checkpoints.hashing import range_digest
from workers.checkpoints.opening import Checkpoint
from workers.digests import algorithm_of
from workers.storage import open_store

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
OLD_BUFFERS = {"masked_bias", "position_ids"}
"""Stored by older versions of transformers, and in newer ones not even computed for every class that had them."""


@dataclass(frozen=True)
class ModelNames:
    """The names of one class: tensors that it stores, and buffers that it computes.

    `ignored` are patterns of names that it does not load, `tied` maps a head to its embeddings, `prefix` is that of the
    class without a head. `modules` maps each module to `linear`, `embedding`, `conv1d` or, for all others, nothing.
    """

    stored: frozenset[str]
    computed: frozenset[str]
    ignored: tuple[str, ...]
    tied: Mapping[str, str]
    prefix: str
    renamings: Sequence[Any]
    modules: Mapping[str, str] = field(default_factory=dict[str, str])

    def canonical(self, name: str) -> str | None:
        """The name in the class; None for a tensor that it ignores. An unknown name stays as it is."""
        for spelling in self._spellings(name):
            if spelling in self.stored:
                return spelling
        last = {buffer.rpartition(".")[2] for buffer in self.computed} | OLD_BUFFERS
        last -= {stored.rpartition(".")[2] for stored in self.stored}
        if name.rpartition(".")[2] in last or any(spelling in self.computed for spelling in self._spellings(name)):
            return None
        return None if any(re.search(pattern, name) for pattern in self.ignored) else name

    def _spellings(self, name: str) -> Iterable[str]:
        renamed = name
        for renaming in self.renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        for spelling in (name, renamed):
            yield from (spelling, f"{self.prefix}.{spelling}", spelling.removeprefix(f"{self.prefix}."))


PLAIN = ModelNames(frozenset(), frozenset({"inv_freq"}), (), {HEAD: EMBEDDINGS}, "model", ())
"""For classes that transformers does not have."""


def aligned(members: Sequence[Checkpoint], owner: Checkpoint) -> tuple[list[Checkpoint], Mapping[str, str]]:
    """The members with the tensors' names as in `owner`, without what transformers ignores; and heads to embeddings.

    A head that repeats the embeddings in a model whose config ties them is left out. Members with equal names and
    without such a head stay as they are.
    """
    differ = len({frozenset(member.tensors) for member in members}) > 1
    if not differ and not any(_may_repeat(member) for member in members):
        return [*members], PLAIN.tied
    model = model_names(json.dumps(owner.config)) if differ else PLAIN
    names: dict[str, str] = {}
    for stored in owner.tensors:
        if (canonical := model.canonical(stored)) is not None:
            names.setdefault(canonical, stored)
    tied = {names.get(head, head): names.get(source, source) for head, source in model.tied.items()}
    return [_renamed(member, model, names, tied) for member in members], tied


@lru_cache(maxsize=16)
def model_names(config_text: str) -> ModelNames:
    """The names of the class that a config.json states; imports transformers. No code of a checkpoint is run."""
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = {key: value for key, value in json.loads(config_text).items() if "attn_implementation" not in key}
    kind, classes = config.get("model_type"), config.get("architectures")
    found: Any = getattr(transformers, str(classes[0]), None) if isinstance(classes, list) and classes else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return PLAIN
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with torch.device("meta"):
            model: Any = found(CONFIG_MAPPING[str(kind)].from_dict(config))
        conversions: Any = get_model_conversion_mapping(model)
    except Exception:  # of any type: the class is a program, and a field may have any value
        return PLAIN
    finally:
        logger.setLevel(level)
    stored = frozenset[str](model.state_dict())
    tied: Any = model._tied_weights_keys
    return ModelNames(
        stored=stored,
        computed=frozenset[str](name for name, _ in model.named_buffers()) - stored,
        ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
        tied={head: source for head, source in tied.items() if {head, source} <= stored} if tied else {},
        prefix=model.base_model_prefix,
        renamings=[conversion for conversion in conversions if type(conversion) is WeightRenaming],
        modules={name: _kind(module) for name, module in model.named_modules()},
    )


def _kind(module: Any) -> str:
    import torch

    if type(module).__name__ == "Conv1D":  # of transformers: a linear layer whose weight is transposed
        return "conv1d"
    kinds = {torch.nn.Linear: "linear", torch.nn.Embedding: "embedding"}
    return next((kind for of, kind in kinds.items() if isinstance(module, of)), "")


def is_head(name: str, tied: Mapping[str, str]) -> bool:
    """Whether a tensor may be tied to embeddings; the head of the language model has a prefix in multimodal models."""
    return name in tied or name.endswith(HEAD)


def is_embedding(name: str) -> bool:
    """Whether a tensor is of embeddings, by the names that transformers gives them."""
    return re.search(r"embed|\bw[tp]e\b", name) is not None


def embeddings_in(tensors: Collection[str]) -> str | None:
    """The input embeddings of the language model, whose name has a prefix in multimodal models."""
    found = [name for name in tensors if name.endswith("embed_tokens.weight")]
    return EMBEDDINGS if EMBEDDINGS in found else found[0] if len(found) == 1 else None


def stored_name(name: str, member: Checkpoint, tied: Mapping[str, str]) -> str | None:
    """The member's tensor of that name: of a head without one, its embeddings, unless its config unties them."""
    if name in member.tensors or not is_head(name, tied):
        return name if name in member.tensors else None
    source = tied.get(name)
    source = source if source in member.tensors else embeddings_in(member.tensors)
    unties = text_fields(member.config).get("tie_word_embeddings") is False
    return None if unties else source


def _renamed(member: Checkpoint, model: ModelNames, names: Mapping[str, str], tied: Mapping[str, str]) -> Checkpoint:
    stored_as: dict[str, str] = {}
    for stored in member.tensors:
        canonical = model.canonical(stored)
        if canonical is None:
            continue
        name = names.get(canonical, canonical)
        stored_as[stored if name in stored_as else name] = stored
    for head, source in tied.items():
        both = {head, source} <= stored_as.keys()
        if both and _ties(member) and _are_same(member, stored_as[head], stored_as[source]):
            del stored_as[head]
    return replace(
        member,
        tensors={name: member.tensors[stored] for name, stored in stored_as.items()},
        shapes={name: member.shapes[stored] for name, stored in stored_as.items()},
    )


def _ties(member: Checkpoint) -> bool:
    """Whether the config, or the default of its class, ties the head to the embeddings."""
    stated = text_fields(member.config).get("tie_word_embeddings")
    return bool(text_fields(completed(member.config)).get("tie_word_embeddings") if stated is None else stated)


def _may_repeat(member: Checkpoint) -> bool:
    """Whether a head lies beside the embeddings that the config ties it to."""
    return {HEAD, EMBEDDINGS} <= member.tensors.keys() and _ties(member)


def _are_same(member: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors have the same bytes."""
    first, second = member.tensors[one], member.tensors[other]
    if not isinstance(first, ParentTensor) or not isinstance(second, ParentTensor):
        return first == second
    places = (first, second)
    if len({at.end - at.start for at in places}) > 1:
        return False
    digests = [at.digest for at in places]
    if not all(digests) or len({algorithm_of(digest) for digest in digests}) > 1:
        files = [member.files[at.file] for at in places]
        digests = [
            _range_digest(member.url, file.key, at.start, at.end, file.etag)
            for at, file in zip(places, files, strict=True)
        ]
    return digests[0] == digests[1]


@lru_cache(maxsize=256)
def _range_digest(url: str, key: str, start: int, end: int, etag: str) -> str:
    return range_digest(open_store(url), key, start, end, etag=etag)
