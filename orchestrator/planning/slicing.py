"""A recipe with slices or modules as pieces: each is a plain recipe over checkpoints under the output's names.

As in mergekit 0.1.5 (`plan.py`), embeddings belong to the first slice, final norm and head to the last, and a gradient
goes over the layers of its slice. Unlike there, a module that a document leaves out is copied and not dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.errors import BadInput
from jobs.recipe import Recipe
from jobs.slices import Module, Slice
from jobs.sources import Filtered, Setting, Source
from jobs.yaml_nodes import quoted
from workers.checkpoints.canonical import model_names
from workers.checkpoints.depths import Depth, depth_of, with_layers, without_layers
from workers.checkpoints.modules import in_stack, is_before_layers, modules_of, stack_of, tensors_of
from workers.checkpoints.opening import Checkpoint
from workers.checkpoints.stacks import layer_counts, layer_of
from workers.methods import METHODS


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of the output that one plain recipe merges.

    `members` have the output's names. `layers` are the output's layers by stack, over which gradients go. Of a slice
    of `stack`, `first` has the first layer of each member, by name.
    """

    recipe: Recipe
    members: Sequence[Checkpoint]
    names: Sequence[str]
    layers: Mapping[str, range]
    stack: str | None = None
    first: Mapping[str, int] = field(default_factory=dict[str, int])


def donor_of(recipe: Recipe) -> str:
    """The parent whose config, tokenizer and other files hold."""
    return recipe.base_model or recipe.references()[0]


def plain_recipes(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipe of each piece: one of plain models, one for each slice, and one for all that no module names."""
    if recipe.models:
        return (recipe,)
    if recipe.slices:
        return tuple(_of_slice(recipe, part, None) for part in recipe.slices)
    found: list[Recipe] = []
    for module in recipe.modules:
        if module.models:
            parameters = over(module.parameters, recipe.parameters)
            places = {**recipe.places, **module.places}
            found.append(replace(recipe, models=module.models, modules=(), parameters=parameters, places=places))
        found += [_of_slice(recipe, part, module) for part in module.slices]
    rest = Source(model=donor_of(recipe), parameters={}, place=recipe.place)
    plain = replace(recipe, models=(rest,), modules=(), parameters={}, base_model=None)
    plain = replace(plain, aim=None, grams=None, fisher=None)
    return (*found, replace(plain, merge_method="passthrough"))


def _of_slice(recipe: Recipe, part: Slice, module: Module | None) -> Recipe:
    base = part.base_model or recipe.base_model
    method = METHODS.get(recipe.merge_method)
    listed = any(source.model == base for source in part.sources)
    levels = [part.parameters, *([module.parameters] if module else []), recipe.parameters]
    return replace(
        recipe,
        models=part.sources,
        slices=(),
        modules=(),
        base_model=None if method is not None and method.base == "unused" and not listed else base,
        parameters=over(*levels),
        place=part.place,
        places={**recipe.places, **(module.places if module else {}), **part.places},
    )


def over(*levels: Mapping[str, Setting]) -> dict[str, Setting]:
    """The parameters of all levels as one: where no filter of a level matches, the next level applies."""
    merged: dict[str, Setting] = {}
    for level in reversed(levels):
        for name, setting in level.items():
            merged[name] = _before(setting, merged[name]) if name in merged else setting
    return merged


def _before(setting: Setting, next_level: Setting) -> Setting:
    if not (filters := _filters(setting)):
        return setting
    rest = _filters(next_level) or (Filtered(None, next_level),)  # pyright: ignore[reportArgumentType]  (no filters)
    return (*filters, *rest)


def _filters(setting: Setting) -> tuple[Filtered, ...]:
    return tuple(part for part in setting if isinstance(part, Filtered)) if isinstance(setting, tuple) else ()


def pieces_of(recipe: Recipe, members: Sequence[Checkpoint], config: Mapping[str, Any]) -> list[Piece]:
    """The pieces of a recipe, in the order of `plain_recipes`. The members' names are aligned.

    `BadInput` for layers that a model does not have, and for modules that it does not have or leaves unnamed.
    """
    plain = plain_recipes(recipe)
    names = tensor_names(members)
    if recipe.models:
        counts = layer_counts(names, config)
        return [Piece(recipe, members, names, {stack: range(count) for stack, count in counts.items()})]
    by_name = {member.name: member for member in members}
    modules = modules_of(names)
    if recipe.slices:
        if len(modules) > 1:
            raise BadInput(
                f"{recipe.place_of('slices')}: the model has the modules {', '.join(modules)}; write the slices under"
                f" `modules:`, as in `modules: {{{min(modules)}: {{slices: […]}}}}`"
            )
        return [*_slices(recipe.slices, plain, by_name, names)]
    found: list[Piece] = []
    taken = {module.name: tensors_of(module.name, modules) for module in recipe.modules}
    if "default" in taken:  # where there are several, all that the others leave
        others = frozenset[str]().union(*(own for name, own in taken.items() if name != "default"))
        taken["default"] = frozenset(names) - others
    rest = iter(plain)
    for module in recipe.modules:
        of_module = [name for name in names if name in taken[module.name]]
        if not of_module:
            raise BadInput(
                f"{module.place}: the model has no module {quoted(module.name)}; its modules are {', '.join(modules)}"
            )
        if twice := next((name for name in taken if name != module.name and taken[name] & {*of_module}), None):
            raise BadInput(f"{module.place}: {quoted(module.name)} and {quoted(twice)} share tensors; take one out")
        if module.models:
            own = next(rest)
            counts = layer_counts(of_module, config)
            layers = {stack: range(count) for stack, count in counts.items()}
            found.append(Piece(own, [by_name[name] for name in own.references()], of_module, layers))
        else:
            found += _slices(module.slices, [next(rest) for _ in module.slices], by_name, of_module)
    copied = next(rest)
    left = [name for name in names if not any(name in own for own in taken.values())]
    return [*found, Piece(copied, [by_name[name] for name in copied.references()], left, {})]


def _slices(
    slices: Sequence[Slice], plain: Sequence[Recipe], by_name: Mapping[str, Checkpoint], names: Sequence[str]
) -> Iterator[Piece]:
    """The pieces of the slices of one module, whose tensors in any member are `names`."""
    place = slices[0].place
    stacks = {
        stack for member in by_name.values() for stack, _ in stack_of({*names} & {*member.tensors}, member.config)
    }
    if len(stacks) != 1:
        shown = ", ".join(sorted(stacks)) or "none"
        raise BadInput(f"{place}: slices need one stack of layers, and there are {shown}; list the models whole")
    (stack,) = stacks
    outside = [name for name in names if in_stack(name, stack) is None]
    begin = 0
    for number, (part, own) in enumerate(zip(slices, plain, strict=True)):
        first = _first_layers(part, own)
        span = range(begin, begin + part.length)
        members: list[Checkpoint] = []
        for model in own.references():
            member = by_name[model]
            count = _count(member, stack)
            if first[model] + part.length > count:
                source = next((source for source in part.sources if source.model == model), None)
                where = part.place if source is None else source.place_of("layer_range")
                shown = f"[{first[model]}, {first[model] + part.length}]"
                raise BadInput(f"{where}: layer_range {shown} is beyond the {count} layers of {model}")
            members.append(_moved(member, stack, range(first[model], first[model] + part.length), begin))
        is_last = number == len(slices) - 1
        inside = [name for name in tensor_names(members) if in_stack(name, stack) is not None]
        around = [name for name in outside if (number == 0 if is_before_layers(name) else is_last)]
        yield Piece(own, members, sorted([*around, *inside], key=natural), {stack: span}, stack, first)
        begin = span.stop


def _first_layers(part: Slice, own: Recipe) -> dict[str, int]:
    """The first layer of each model of a slice; a base that is not among the sources has the range that they share."""
    found = {source.model: source.layer_range[0] for source in part.sources if source.layer_range is not None}
    base = own.base_model
    if base is not None and base not in found:
        if len({*found.values()}) > 1:
            raise BadInput(
                f"{part.place}: the base_model {base} is not among the sources, whose layers differ; list it with its"
                " layer_range"
            )
        found[base] = next(iter(found.values()))
    return found


def held_whole(pieces: Sequence[Piece], members: Sequence[Checkpoint]) -> tuple[str, ...]:
    """The members that the pieces hold whole, each tensor under its own name."""
    ends = {piece.stack: piece.layers[piece.stack].stop for piece in pieces if piece.stack is not None}
    return tuple(
        member.name
        for member in members
        if all(_count(member, stack) == end for stack, end in ends.items())
        and all(member.name in {own.name for own in piece.members} and _stays(piece, member.name) for piece in pieces)
    )


def restacked(
    pieces: Sequence[Piece],
    members: Sequence[Checkpoint],
    context_from: Checkpoint,
    config: Mapping[str, Any],
    *,
    holds: bool,
) -> tuple[Mapping[str, Any], Sequence[Checkpoint]]:
    """(the output's config with its own layers, the members without the fields that state theirs).

    Both as they are where every layer stays in its place. Every layer keeps the kind that it has in its sources; if
    they disagree, that of `context_from` where it `holds`, else `BadInput`.
    """
    stacks: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.stack is not None:
            stacks.setdefault(piece.stack, []).append(piece)
    for stack, parts in stacks.items():
        total, moved = parts[-1].layers[stack].stop, [not _stays(part, name) for part in parts for name in part.first]
        counts = {_count(member, stack) for member in (*members, context_from)}
        if counts == {total} and not any(moved):
            continue
        place = parts[0].recipe.place
        depths = {
            member.name: depth_of(member.config, stack, _count(member, stack), f"{place}: parent {member.name}")
            for member in (*members, context_from)
        }
        lead = [_lead(part, context_from.name) for part in parts]
        origins = [
            (name, part.first[name] + index)
            for part, name in zip(parts, lead, strict=True)
            for index in range(len(part.layers[stack]))
        ]
        if not holds:
            _check_kinds(parts, stack, depths)
        kinds = {
            kind: [depths[name].kinds[kind][layer] for name, layer in origins]
            for kind in depths[context_from.name].kinds
            if all(kind in depths[name].kinds for name in lead)
        }
        config = with_layers(config, depths[context_from.name], kinds, [layer for _, layer in origins], place)
        _check_names(parts, stack, context_from, config)
        members = [replace(member, config=without_layers(member.config, depths[member.name])) for member in members]
    return config, members


def _count(member: Checkpoint, stack: str) -> int:
    return dict(stack_of(member.tensors, member.config)).get(stack, 0)


def _stays(part: Piece, name: str) -> bool:
    """Whether the layers of that member have in the output the numbers that they have in the member."""
    return part.stack is None or part.first.get(name) == part.layers[part.stack].start


def _lead(part: Piece, preferred: str) -> str:
    """The member whose kinds of layers hold in a slice."""
    names = [member.name for member in part.members]
    return preferred if preferred in names else names[0]


def _check_kinds(parts: Sequence[Piece], stack: str, depths: Mapping[str, Depth]) -> None:
    """Refuses a layer whose sources are of different kinds."""
    for part in parts:
        (one, at), *others = part.first.items()
        for index in range(len(part.layers[stack])):
            for other, other_at in others:
                for name in depths[one].kinds.keys() & depths[other].kinds.keys():
                    here, there = depths[one].kinds[name][at + index], depths[other].kinds[name][other_at + index]
                    if here != there:
                        raise BadInput(
                            f"{part.recipe.place}: {name} of config.json differs between the sources of a layer:"
                            f" {here} of layer {at + index} in {one}, {there} of layer {other_at + index} in"
                            f" {other}; take ranges whose layers are of the same kinds"
                        )


def _check_names(parts: Sequence[Piece], stack: str, parent: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuses layers without a tensor that their class has in their new place, as in ModernBERT's first layer.

    Experts are left out of it, which a class may store in two ways.
    """
    parts_of_layers: dict[int, set[str]] = {}
    for name in parent.tensors:
        if (layer := in_stack(name, stack)) is not None:
            parts_of_layers.setdefault(layer, set()).add(name.removeprefix(f"{stack}.{layer}"))
    if len({*map(frozenset, parts_of_layers.values())}) == 1:
        return
    model = model_names(json.dumps(config))
    there = {model.canonical(name) for part in parts for member in part.members for name in member.tensors}
    lacking = sorted(name for name in model.stored - there if layer_of(name) is not None and "experts" not in name)
    if lacking:
        raise BadInput(
            f"{parts[0].recipe.place}: the output would lack {lacking[0]}, which the layer that comes there does not"
            " have; leave the first layer in its place"
        )


def _moved(member: Checkpoint, stack: str, layers: range, begin: int) -> Checkpoint:
    """The member with these layers of a stack numbered from `begin`, and without its other layers."""
    stored_as: dict[str, str] = {}
    for name in member.tensors:
        layer = in_stack(name, stack)
        if layer is None:
            stored_as[name] = name
        elif layer in layers:
            rest = name[len(f"{stack}.{layer}") :]
            stored_as[f"{stack}.{begin + layer - layers.start}{rest}"] = name
    return replace(
        member,
        tensors={name: member.tensors[stored] for name, stored in stored_as.items()},
        shapes={name: member.shapes[stored] for name, stored in stored_as.items()},
    )


def tensor_names(members: Sequence[Checkpoint]) -> list[str]:
    """Every tensor of any member, layers in their natural order."""
    return sorted({name for member in members for name in member.tensors}, key=natural)


def natural(name: str) -> list[tuple[bool, int | str]]:
    """A key that sorts numbers by their size."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else part) for part in name.split(".")]
