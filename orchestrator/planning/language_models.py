"""Plain language models that are merged into the language model of a multimodal one.

Their tensors take the names that they have there; everything else is copied from the multimodal model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.errors import BadInput
from workers.checkpoints.configs import TEXT_SECTIONS, completed, is_section, rope, text_fields
from workers.checkpoints.modules import TEXT, modules_of, stack_of
from workers.checkpoints.opening import Checkpoint

_OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""Fields of RoPE that count the rows and columns of images; for text they change nothing."""

_ROPE = {"rope_parameters", "rope_scaling", "rope_theta"}
_KEPT = {"model_type", "architectures", *_ROPE}


@dataclass(frozen=True)
class Adopted:
    """Members under the names of `whole`, the multimodal model whose other modules are copied; `plain` are the others'
    names."""

    members: Sequence[Checkpoint]
    whole: Checkpoint
    plain: frozenset[str]

    def copied(self, names: Sequence[str], members: Sequence[Checkpoint]) -> dict[str, str | None]:
        """The owner of every tensor outside the language model, if there is a plain one among these members."""
        if not any(member.name in self.plain for member in members):
            return {}
        text = modules_of([*names, *self.whole.tensors])[TEXT]
        return {name: self.whole.name for name in names if name not in text}

    def comparable(self, members: Sequence[Checkpoint]) -> list[Checkpoint]:
        """The members with configs of one form: a plain one's fields stand where `whole` states the same ones."""
        whole = next(member.config for member in members if member.name == self.whole.name)
        return [
            replace(member, config=_as_part(member.config, whole)) if member.name in self.plain else member
            for member in members
        ]


def adopted(members: Sequence[Checkpoint], donor: str) -> Adopted:
    """The members, the plain ones under the names of the donor's language model or, if it is plain, of the first that
    is not.

    Members of one kind stay as they are. `BadInput` for a plain model of another family.
    """
    multimodal = [member for member in members if TEXT in modules_of(member.tensors)]
    whole = next((member for member in multimodal if member.name == donor), (*multimodal, members[0])[0])
    plain = [member for member in members if member not in multimodal] if multimodal else []
    for member in plain:
        kind, of_text = str(member.config.get("model_type")), str(text_fields(whole.config).get("model_type"))
        if not of_text.startswith(kind.removesuffix("_text")):
            return Adopted(members, whole, frozenset())  # refused with all architectures that differ
    names = frozenset(member.name for member in plain)
    return Adopted([_renamed(own, whole) if own.name in names else own for own in members], whole, names)


def _renamed(member: Checkpoint, whole: Checkpoint) -> Checkpoint:
    """The plain member under the names of the language model in `whole`; names that are not there stay."""
    there = modules_of(whole.tensors)[TEXT]
    before, after = _prefix(member.tensors, member), _prefix(there, whole)
    renamed = {
        name: next(
            (other for other in (f"{after}{name.removeprefix(before)}", name) if other in there),
            next((other for other in there if other.endswith(f".{name}")), name),
        )
        for name in member.tensors
    }
    return replace(
        member,
        tensors={renamed[name]: source for name, source in member.tensors.items()},
        shapes={renamed[name]: shape for name, shape in member.shapes.items()},
    )


def _prefix(names: Collection[str], member: Checkpoint) -> str:
    """What stands before `layers.0` in the names of the language model's tensors."""
    stacks = stack_of(names, member.config)
    if len(stacks) != 1:
        shown = ", ".join(stack for stack, _ in stacks) or "none"
        raise BadInput(f"parent {member.name}: one stack of layers was expected in its language model, not {shown}")
    return stacks[0][0].rpartition(".")[0] + "."


def _as_part(plain: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """The config of `whole` with the fields of a plain language model in place of its own of the same name."""
    section = next((name for name in TEXT_SECTIONS if is_section(name, whole.get(name))), None)
    own = whole if section is None else whole[section]
    full = completed(whole)
    known = (full[section] if section is not None and section in full else text_fields(full)).keys() - _KEPT
    fields = {**own, **{key: value for key, value in plain.items() if key in known}}
    (theta, scaling), of_whole = rope(plain), rope(own)[1] or {}
    images = {name: value for name, value in of_whole.items() if name in _OF_IMAGES}
    if images and scaling is None and of_whole["rope_type"] in ("default", "mrope"):
        scaling = {"rope_type": of_whole["rope_type"]}
    rotary = {**({} if theta is None else {"rope_theta": theta}), **(scaling or {}), **images}
    fields = {key: value for key, value in fields.items() if key not in _ROPE} | {"rope_parameters": rotary}
    return fields if section is None else {**whole, section: fields}
