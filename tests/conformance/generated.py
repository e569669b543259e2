"""Documents drawn at random for every method, over parents of odd shapes: cases beyond the written ones.

A document follows from its method, its number and the seed. Parents are Qwen2 checkpoints by their names alone: vectors
of two to 300 elements, single rows, and one matrix of more than a tile. The narrow families add single columns and
single elements: della of mergekit cannot take those, and in multislerp single elements of opposite sign cancel.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.conformance.case_builder import document
from tests.conformance.checkpoints import Tensors, qwen2_shapes, write_checkpoint

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MORE_THAN_A_TILE = (363, 362)
ODD = [(300,), (2,), (1, 50), (33,), (3, 5), (99,), (7, 129), (100,), (1, 2), (101,), (64, 32), (3,), (40, 3), (2, 500)]
NARROW = [(1,), (37, 1), (5, 2), (1, 1), (2,), (1, 9), (2, 1), (17,), (300, 3)]
SIBLINGS = ("a", "b", "c")

Draw = Callable[[], Any]


def write_odd_parents(root: Path) -> None:
    """`root/{odd,narrow}-{bf16,fp32}/PARENT`: base; a, b, c near it; sparse, a few steps; far, strange; left and right,
    which move overlapping parts; blank, in which every third tensor is zero."""
    for shapes, large in (("odd", [MORE_THAN_A_TILE]), ("narrow", [])):
        pool = {"odd": ODD, "narrow": NARROW}[shapes]
        sizes = [*large, *(pool[i % len(pool)] for i in range(len(qwen2_shapes(True))))]
        base = {name: 0.02 * _normal("base", name, size) for name, size in zip(qwen2_shapes(True), sizes, strict=False)}
        for precision, dtype in DTYPES.items():
            for who, tensors in _kin(base).items():
                folder = root / f"{shapes}-{precision}" / who
                write_checkpoint(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def _kin(base: Tensors) -> dict[str, Tensors]:
    def moved(who: str, scale: float, share: float = 1.0, begin: float = 0.0, end: float = 1.0) -> Tensors:
        tensors: Tensors = {}
        for name, t in base.items():
            place = (torch.arange(t.numel()) / t.numel()).reshape(t.shape)
            taken = (_uniform(who, name, t.shape) < share) & (begin <= place) & (place < end)
            step = _normal(who, name, t.shape)
            tensors[name] = t + scale * (step + step.sign() * (begin > 0 or end < 1)) * taken
        return tensors

    blank = moved("blank", 1e-3)
    return {
        "base": base,
        **{who: moved(who, 1e-3) for who in SIBLINGS},
        "sparse": moved("sparse", 1e-3, share=0.1),
        "far": {name: 0.02 * _normal("far", name, tuple(t.shape)) for name, t in base.items()},
        "left": moved("left", 0.01, end=5 / 8),
        "right": moved("right", 0.01, begin=3 / 8),
        "blank": {name: t * (i % 3 != 1) for i, (name, t) in enumerate(blank.items())},
    }


def documents(method: str, count: int, seed: int) -> list[str]:
    """`count` documents of a method; PARENTS stands for the folder of the parents."""
    return [_drawn(method, random.Random(f"{seed} {method} {number}")) for number in range(count)]


def in_bf16(text: str) -> str:
    """The same merge of the bf16 parents, computed in bfloat16, and stored in it: mergekit 0.1.5 stores float32 where
    arcee_fusion or ramplus_tl multiplies with a tensor of float32."""
    lines = text.replace("-fp32/", "-bf16/").splitlines()
    kept = [line for line in lines if not line.startswith(("dtype:", "out_dtype:"))]
    return "\n".join([*kept, "dtype: bfloat16", "out_dtype: bfloat16", ""])


def _drawn(method: str, dice: random.Random) -> str:
    shapes = "odd" if method in ("della", "della_linear", "multislerp") else dice.choice(("odd", "odd", "narrow"))
    precision = dice.choice(tuple(DTYPES))
    choices = [("float32", None), ("float32", "bfloat16")]
    if method.startswith(("dare", "della")):
        choices = choices[:1]  # masks and scales are read off the merge, and bf16 would blur them
    elif precision == "bf16" and method != "arcee_fusion":
        choices += [("bfloat16", None), ("float32", "float16")]
    dtype, out_dtype = dice.choice(choices)
    models, base, shared = _METHODS[method](dice)
    return document(method, models, base, family=f"{shapes}-{precision}", dtype=dtype, out_dtype=out_dtype, **shared)


Models = dict[str, dict[str, Any]]
Drawn = tuple[Models, str | None, dict[str, Any]]


def _setting(dice: random.Random, draw: Draw) -> Any:
    """A number, a gradient, or a list of filters."""
    match dice.randrange(6):
        case 0:
            return [draw() for _ in range(dice.randint(2, 4))]
        case 1:
            return [{"filter": dice.choice(("mlp", "attn", "norm")), "value": draw()}, {"value": draw()}]
        case _:
            return draw()


def _shared(dice: random.Random, **draws: Draw) -> dict[str, Any]:
    """Each of these parameters of the merge in half of the documents."""
    return {name: _setting(dice, draw) for name, draw in draws.items() if dice.random() < 0.5}


def _flag(dice: random.Random) -> Draw:
    return lambda: dice.random() < 0.5


def _weight(dice: random.Random, signed: bool = True, zero: bool = True) -> Draw:
    def draw() -> float:
        kind = dice.random()
        if kind < 0.15 and signed:
            return -round(dice.uniform(0.1, 1.0), 3)
        if kind < 0.25 and zero:
            return dice.choice((0, 1e-10, 3e-7))
        return dice.choice((1, 2, round(dice.uniform(0.1, 1.5), 3)))

    return draw


def _density(dice: random.Random) -> Draw:
    return lambda: dice.choice((1, 0.01, 0.29, 0.57, 0.58, round(dice.uniform(0.05, 0.95), 3)))


def _strength(dice: random.Random) -> Draw:
    return lambda: dice.choice((0, -0.4, round(dice.uniform(0.2, 1.8), 3)))


def _some(dice: random.Random, fewest: int, most: int, *more: str) -> list[str]:
    return dice.sample([*SIBLINGS, "sparse", *more], dice.randint(fewest, most))


def _each(names: list[str], dice: random.Random, **draws: Draw) -> Models:
    return {name: {key: _setting(dice, draw) for key, draw in draws.items()} for name in names}


def _with_base(dice: random.Random, models: Models) -> Models:
    """The base is sometimes listed, somewhere among the models."""
    if dice.random() < 0.3:
        listed = [*models.items()]
        listed.insert(dice.randint(0, len(listed)), ("base", {}))
        return dict(listed)
    return models


def _linear(dice: random.Random) -> Drawn:
    normalize = dice.random() < 0.6
    models = _each(_some(dice, 1, 4, "far"), dice, weight=_weight(dice, signed=not normalize, zero=not normalize))
    if dice.random() < 0.2:
        return models, "base", {"normalize": normalize, "weight": 0.3}
    return models, None, {"normalize": normalize}


def _slerp(dice: random.Random) -> Drawn:
    other = dice.choice(("a", "far", "sparse", "blank"))
    models: Models = {other: {}} | ({"base": {}} if dice.random() < 0.7 else {})
    return models, "base", {"t": _setting(dice, lambda: dice.choice((0, 1, round(dice.uniform(-0.3, 1.3), 3))))}


def _passthrough(dice: random.Random) -> Drawn:
    return _each([dice.choice(("a", "far"))], dice, scale=_weight(dice)), None, {}


def _task_vectors(dice: random.Random, **per_model: Draw) -> Drawn:
    names = _some(dice, 1, 3, "far")
    models = _each(names, dice, weight=_weight(dice), **per_model)
    shared = _shared(dice, normalize=_flag(dice), rescale=_flag(dice), lambda_=_strength(dice), int8_mask=_flag(dice))
    if dice.random() < 0.15:  # one value for all models
        for values in models.values():
            del values["weight"]
        shared["weight"] = _setting(dice, _weight(dice))
    return _with_base(dice, models), "base", shared


def _thinned(dice: random.Random, **per_model: Draw) -> Drawn:
    """One parent, or two unscaled: the masks can be told from the merge of tensors of any size."""
    names, rescale = dice.choice(((["c"], None), (["left", "right"], False), (["left", "far"], False)))
    shared = _shared(dice, normalize=_flag(dice), lambda_=lambda: round(dice.uniform(0.5, 1.8), 3))
    if rescale is not None or dice.random() < 0.3:
        shared["rescale"] = False
    return _with_base(dice, _each(names, dice, weight=_weight(dice, zero=False), **per_model)), "base", shared


def _nuslerp(dice: random.Random) -> Drawn:
    models = _each(_some(dice, 2, 2, "far"), dice, weight=_weight(dice, signed=False, zero=False))
    base = dice.choice((None, "base"))
    flags = _shared(dice, nuslerp_flatten=_flag(dice), nuslerp_row_wise=_flag(dice))
    return _with_base(dice, models) if base else models, base, flags


def _multislerp(dice: random.Random) -> Drawn:
    models = _each(_some(dice, 1, 4, "far"), dice, weight=_weight(dice, signed=False, zero=False))
    base = dice.choice((None, "base"))
    shared = _shared(dice, normalize_weights=_flag(dice), eps=lambda: dice.choice((1e-8, 1e-6, 1e-4)))
    return _with_base(dice, models) if base else models, base, shared


def _karcher(dice: random.Random) -> Drawn:
    names = _some(dice, 1, 4, "far", "blank")
    shared = _shared(dice, tol=lambda: dice.choice((1e-5, 1e-3, 0.1)))
    if dice.random() < 0.5:
        shared["max_iter"] = dice.choice((0, 1, 3, 20))
    return {name: {} for name in names}, dice.choice((None, None, "base")), shared


def _model_stock(dice: random.Random) -> Drawn:
    names = _some(dice, 2, 4, "far", "left", "right", "blank")
    return _with_base(dice, {name: {} for name in names}), "base", _shared(dice, filter_wise=_flag(dice))


def _nearswap(dice: random.Random) -> Drawn:
    models: Models = {dice.choice(("a", "sparse", "far")): {}}
    steps = (0, -0.1, 1e-7, 1e-4, 5e-4, 1e-3, 0.02, 3)
    return _with_base(dice, models), "base", {"t": _setting(dice, lambda: dice.choice(steps))}


def _arcee_fusion(dice: random.Random) -> Drawn:
    return _with_base(dice, {dice.choice(("far", "left", "sparse", "a")): {}}), "base", {}


def _sce(dice: random.Random) -> Drawn:
    shares = (0.01, 0.3, 1, round(dice.uniform(0.05, 0.95), 3))
    names = _some(dice, 1, 4, "far", "left", "right")
    shared = _shared(dice, select_topk=lambda: dice.choice(shares), int8_mask=_flag(dice))
    return _with_base(dice, {name: {} for name in names}), "base", shared


def _ram(dice: random.Random, **more: Draw) -> Drawn:
    names = _some(dice, 1, 4, "left", "right")
    shared = _shared(dice, epsilon=lambda: dice.choice((1e-5, 1e-4, 1e-3, 0.01)), **more)
    return _with_base(dice, {name: {} for name in names}), "base", shared


def _ramplus_tl(dice: random.Random) -> Drawn:
    return _ram(dice, r=lambda: dice.choice((0, 0.3, -0.2, 1)), alpha=lambda: dice.choice((0, 0.2, 0.9, 3)))


def _ties(dice: random.Random) -> Drawn:
    return _task_vectors(dice, density=_density(dice))


def _breadcrumbs(dice: random.Random) -> Drawn:
    return _task_vectors(dice, density=_density(dice), gamma=lambda: dice.choice((0, 0.01, 0.1, 0.45)))


def _dare(dice: random.Random) -> Drawn:
    return _thinned(dice, density=lambda: dice.choice((1, 0.3, round(dice.uniform(0.1, 0.9), 3))))


def _della(dice: random.Random) -> Drawn:
    return _thinned(
        dice,
        density=lambda: round(dice.uniform(0.25, 0.75), 3),
        epsilon=lambda: dice.choice((0.15, round(dice.uniform(0.01, 0.2), 3))),
    )


_METHODS: dict[str, Callable[[random.Random], Drawn]] = {
    "linear": _linear,
    "slerp": _slerp,
    "passthrough": _passthrough,
    "task_arithmetic": _task_vectors,
    "ties": _ties,
    "dare_linear": _dare,
    "dare_ties": _dare,
    "breadcrumbs": _breadcrumbs,
    "breadcrumbs_ties": _breadcrumbs,
    "della": _della,
    "della_linear": _della,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
    "nearswap": _nearswap,
    "arcee_fusion": _arcee_fusion,
    "sce": _sce,
    "ram": _ram,
    "ramplus_tl": _ramplus_tl,
}
GENERATED_METHODS = tuple(_METHODS)


def _normal(who: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(who, name))


def _uniform(who: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=_generator(who + " taken", name))


def _generator(who: str, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"odd {who}/{name}".encode()))
