"""Every merge method in float64 on whole tensors, written from the papers' formulas: slow, plain, and
independent of the code of both programs.

`merged(document)` reads a mergekit document and its parents from disk and says what every output tensor must be:

    Exact         a value, and the sum of the magnitudes that went into it (what bounds the rounding noise of float32)
    Choice        the values that an element may have where float32 or equal values leave a choice
    TaskVectors   a base and its task vectors, when a choice stands between them and the value (ties, breadcrumbs: which
                  of several equal magnitudes stay, what sign a sum within the noise has; dare, della: which elements
                  the dice keep); `combined(kept, scales)` gives the Exact of a choice

Sources: linear, "Model soups" (arXiv 2203.05482); task arithmetic (2212.04089); TIES (2306.01708); DARE (2311.03099),
Model Breadcrumbs (2312.06795) and DELLA (2406.11617), rescaled as mergekit does it, by the ratio of L1 norms; slerp,
Shoemake 1985; the others in directions.py and selections.py. Parameter resolution follows mergekit 0.1.5's behaviour.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tests.conformance.directions import karcher, model_stock, multislerp, nuslerp
from tests.conformance.exact import Array, Choice, Exact
from tests.conformance.selections import arcee_fusion, nearswap, ram, sce

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TRIMS = {
    "task_arithmetic": None,
    "ties": "magnitude",
    "dare_ties": "random",
    "dare_linear": "random",
    "breadcrumbs": "outliers",
    "breadcrumbs_ties": "outliers",
    "della": "ranks",
    "della_linear": "ranks",
}


@dataclass(frozen=True)
class TaskVectors:
    """What is left to combine once a mask says which elements of each task vector are kept."""

    base: Array
    deltas: tuple[Array, ...]
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    trim: str | None  # "magnitude" (ties), "outliers" (breadcrumbs), "random" (dare), "ranks" (della) or None
    consensus: bool
    normalize: bool
    rescale: bool
    strength: float  # the document's `lambda`
    extra: tuple[float, ...] = ()  # gamma of breadcrumbs or epsilon of della, per task vector

    @property
    def dice(self) -> bool:
        """Whether random numbers decide which elements are kept."""
        return self.trim in ("random", "ranks")

    def readings(self) -> tuple[TaskVectors, ...]:
        """These, and where a density is a whole number of elements less float64's own rounding, the whole number too:
        a gradient's 0.41 and 0.46 meet at 0.435 in fractions, and just below it in floats."""
        whole = tuple(density * (1 + 1e-12) for density in self.densities)
        size = self.base.size
        if all(int(d * size) == int(w * size) for d, w in zip(self.densities, whole, strict=True)):
            return (self,)
        return (self, replace(self, densities=whole))

    def kept_count(self, i: int) -> int:
        """How many elements of task vector i a trim without dice keeps."""
        return int(self.trimmed(i).sum())

    def trimmed(self, i: int) -> Array:
        """The mask of a trim without dice; among equals those that a stable sort puts first."""
        delta, density = self.deltas[i], self.densities[i]
        return largest(delta, density) if self.trim == "magnitude" else between(delta, density, self.extra[i])

    def chances(self, i: int) -> Array:
        """For each element of task vector i, the probability that the dice keep it."""
        delta, density = self.deltas[i], self.densities[i]
        if self.trim == "random" or density >= 1:
            return np.full(delta.shape, min(density, 1.0))
        rows = delta.reshape(1, -1) if delta.ndim < 2 else delta
        order = np.argsort(np.argsort(abs(rows), axis=1, kind="stable"), axis=1)
        share = order / (rows.shape[1] - 1)
        return (density - self.extra[i] + 2 * self.extra[i] * share).reshape(delta.shape)

    def terms(self, kept: Sequence[Array], scales: Sequence[float]) -> list[Array]:
        """The weighted, scaled, masked task vectors."""
        parts = zip(self.weights, scales, kept, self.deltas, strict=True)
        return [weight * scale * np.where(mask, delta, 0.0) for weight, scale, mask, delta in parts]

    def combined(
        self, kept: Sequence[Array], scales: Sequence[float] | None = None, sign: Array | None = None
    ) -> Exact:
        """The merged tensor when `kept[i]` marks the elements that stay of task vector i and `scales[i]` multiplies
        them. `sign` overrules the election."""
        terms = self.terms(kept, scales or [1.0] * len(self.deltas))
        if self.consensus:
            elected = elected_sign(terms) if sign is None else sign
            agree = [np.sign(term) == elected for term in terms]
        else:
            agree = [np.ones(self.base.shape, bool) for _ in terms]
        total = sum(np.where(a, term, 0.0) for a, term in zip(agree, terms, strict=True))
        magnitude = sum(np.where(a, abs(term), 0.0) for a, term in zip(agree, terms, strict=True))
        if self.normalize:
            divisor = sum(np.where(a, weight, 0.0) for a, weight in zip(agree, self.weights, strict=True))
            parts = sum(np.where(a, abs(weight), 0.0) for a, weight in zip(agree, self.weights, strict=True))
            vanished = divisor == 0 if self.consensus else abs(divisor) < 1e-8
            amplified = np.where(vanished, 1.0, parts / np.where(vanished, 1.0, abs(divisor)))
            divisor = np.where(vanished, 1.0, divisor)
            total, magnitude = total / divisor, magnitude * amplified / abs(divisor)
        return Exact(
            self.base + self.strength * total,
            abs(self.base) + abs(self.strength) * magnitude,
            operations=3 * len(terms) + 8 + 16 * self.rescale,  # a norm's ratio is a long sum
        )


def elected_sign(terms: Sequence[Array]) -> Array:
    """TIES' election on the weighted task vectors: the sign of their sum; a sum of zero elects the positive."""
    return np.where(sum(terms) >= 0, 1.0, -1.0)


def trimmed_count(delta: Array, density: float) -> int:
    """How many elements of a task vector TIES keeps: ⌊density · n⌋, but one at the least (none at density 0)."""
    if density >= 1:
        return delta.size
    if density <= 0:
        return 0
    return max(1, int(density * delta.size))


def largest(delta: Array, density: float) -> Array:
    """The mask of the `trimmed_count` largest magnitudes; among equals the first in memory order stay."""
    order = np.argsort(-abs(delta).ravel(), kind="stable")
    kept = np.zeros(delta.size, bool)
    kept[order[: trimmed_count(delta, density)]] = True
    return kept.reshape(delta.shape)


def between(delta: Array, density: float, gamma: float) -> Array:
    """Model Breadcrumbs' mask: without the ⌊γ · n⌋ largest, and of the rest the ⌊density · n⌋ largest; fewer outliers
    go where fewer than ⌊density · n⌋ would be left."""
    if density >= 1:
        return np.ones(delta.shape, bool)
    count, outliers = int(density * delta.size), int(gamma * delta.size)
    first = max(0, delta.size - count - outliers)
    kept = np.zeros(delta.size, bool)
    kept[np.argsort(abs(delta).ravel(), kind="stable")[first : first + count]] = True
    return kept.reshape(delta.shape)


def l1_scale(delta: Array, kept: Array) -> float:
    """What makes the kept elements weigh, in L1 norm, as much as the whole task vector did; 1 where either is
    nothing."""
    before, after = abs(delta).sum(), abs(delta[kept]).sum()
    return 1.0 if min(before, after) < 1e-7 else before / after


def linear(tensors: Sequence[Array], weights: Sequence[float], normalize: bool) -> Exact:
    """Σ wᵢ xᵢ, divided by Σ wᵢ when normalized."""
    value = sum(w * x for w, x in zip(weights, tensors, strict=True))
    magnitude = sum(abs(w * x) for w, x in zip(weights, tensors, strict=True))
    if normalize:
        total = sum(weights)
        value, magnitude = value / total, magnitude / abs(total) * sum(map(abs, weights)) / abs(total)
    return Exact(value, magnitude, operations=3 * len(tensors) + 4)


def slerp(base: Array, other: Array, t: float) -> Exact:
    """Along the great arc from `base` to `other`, lengths uninterpolated; along the chord when the arc is nearly
    straight."""
    norms = [n if (n := np.linalg.norm(x)) > 1e-8 else 1.0 for x in (base, other)]
    cosine = float(np.clip(np.vdot(base / norms[0], other / norms[1]), -1, 1))
    if abs(cosine) > 0.9995:
        from_base, from_other = 1 - t, t
    else:
        angle = np.arccos(cosine)
        from_base, from_other = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    magnitude = abs(from_base * base) + abs(from_other * other)
    return Exact(
        from_base * base + from_other * other, magnitude, operations=64
    )  # angles in float32 cost more than sums


def passthrough(tensor: Array, scale: float | None) -> Exact:
    """The tensor, scaled when a scale is given."""
    value = tensor if scale is None else scale * tensor
    return Exact(value, abs(value), operations=2)


# ---------------------------------------------------------------- documents


@dataclass(frozen=True)
class Output:
    """One tensor of the merge, and how deep in the model it is: 0 for the first layer and all outside the layers, 1 for
    the last layer."""

    name: str
    depth: float


def merged(document: dict[str, Any]) -> dict[str, Exact | Choice | TaskVectors]:
    """What each tensor of the document's merge must be. Covers Qwen2 checkpoints on local disk."""
    return _merged(json.dumps(document))


@lru_cache(maxsize=4)  # several verdicts ask in turn
def _merged(text: str) -> dict[str, Exact | Choice | TaskVectors]:
    document = json.loads(text)
    return {output.name: _merge_one(document, output) for output in outputs(document)}


def sources(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The document's models in its order; a base that is not among them comes last."""
    models, base = list(document["models"]), document.get("base_model")
    return models if base is None or any(model["model"] == base for model in models) else [*models, {"model": base}]


def outputs(document: dict[str, Any]) -> list[Output]:
    """Every tensor of the merge. A parent without lm_head lends its embedding where another parent has one."""
    folders = [source["model"] for source in sources(document)]
    names = checkpoint(folders[0]).keys() | ({HEAD} if any(HEAD in checkpoint(f) for f in folders) else set())
    layers = {name: int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
    last = max(layers.values())
    return [Output(name, layers.get(name, 0) / last if last else float(name in layers)) for name in sorted(names)]


def inputs(document: dict[str, Any], name: str) -> list[torch.Tensor]:
    """The parents' tensors that make up one tensor of the merge, in the order of `sources`."""
    parents = [checkpoint(source["model"]) for source in sources(document)]
    return [parent[EMBEDDING if name == HEAD and HEAD not in parent else name] for parent in parents]


def output_dtype(document: dict[str, Any], name: str) -> torch.dtype:
    """`out_dtype`, else `dtype`, else what the inputs promote to."""
    if named := document.get("out_dtype") or document.get("dtype"):
        return getattr(torch, named)
    return reduce(torch.promote_types, [tensor.dtype for tensor in inputs(document, name)])


@cache
def checkpoint(folder: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, from however many safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in list(file.keys())}  # a file is no dict
    return tensors


def resolved(setting: Any, tensor: str, depth: float) -> Any:
    """A parameter's value for one tensor: a scalar, a gradient over depth, or the first filter that matches; None if
    none."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not all(isinstance(entry, dict) for entry in setting):
        position = depth * (len(setting) - 1)
        if isinstance(setting[0], bool):
            return setting[int(position)]
        left = int(position)
        right = min(left + 1, len(setting) - 1)
        return (1 - (position - left)) * setting[left] + (position - left) * setting[right]
    for entry in setting:
        if entry.get("filter") in (None, "*") or entry["filter"] in tensor:
            return resolved(entry["value"], tensor, depth)
    return None


def _merge_one(document: dict[str, Any], output: Output) -> Exact | Choice | TaskVectors:
    method = document["merge_method"]
    tensors = [tensor.double().numpy() for tensor in inputs(document, output.name)]
    models = sources(document)
    names = [model["model"] for model in models]
    base = names.index(document["base_model"]) if document.get("base_model") else None
    everyone = range(len(tensors))
    others = [i for i in everyone if i != base]

    def shared(parameter: str, default: Any = None) -> Any:
        return _look_up(parameter, [document], output, default)

    def each(parameter: str, which: Sequence[int], default: Any = None) -> list[Any]:
        return [_look_up(parameter, [models[i], document], output, default) for i in which]

    match method:
        case "linear":
            return linear(tensors, each("weight", everyone), shared("normalize", True))
        case "passthrough":
            return passthrough(tensors[0], each("scale", everyone)[0])
        case "karcher":
            return karcher(tensors, int(shared("max_iter", 10)), shared("tol", 1e-5))
    origin = None if base is None else tensors[base]
    moved = [tensors[i] for i in others]
    match method:
        case "nuslerp":
            row_wise, flatten = shared("nuslerp_row_wise", False), shared("nuslerp_flatten", True)
            first, second = each("weight", others)
            return nuslerp(*moved, (first, second), origin, row_wise, flatten)
        case "multislerp":
            return multislerp(
                moved, each("weight", others), origin, shared("normalize_weights", True), shared("eps", 1e-8)
            )
    assert origin is not None
    match method:
        case "slerp":
            return slerp(origin, moved[0], shared("t"))
        case "model_stock":
            return model_stock(origin, moved, shared("filter_wise", False))
        case "nearswap":
            return nearswap(origin, moved[0], shared("t"))
        case "arcee_fusion":
            return arcee_fusion(origin, moved[0])
        case "sce":
            return sce(origin, moved, shared("select_topk", 1.0))
        case "ram":
            return ram(origin, moved, shared("epsilon", 1e-5))
        case "ramplus_tl":
            return ram(origin, moved, shared("epsilon", 1e-5), shared("r", 0.1), shared("alpha", 0.2))
    extra = {"outliers": ("gamma", 0.01), "ranks": ("epsilon", 0.15)}.get(TRIMS[method] or "")
    vectors = TaskVectors(
        base=origin,
        deltas=tuple(tensor - origin for tensor in moved),
        weights=tuple(each("weight", others)),
        densities=tuple(each("density", others, 1.0)),
        trim=TRIMS[method],
        consensus=method in ("ties", "dare_ties", "breadcrumbs_ties", "della"),
        normalize=shared("normalize", method in ("ties", "della")),
        rescale=shared("rescale", method.startswith(("dare", "della"))),
        strength=shared("lambda", 1.0),
        extra=tuple(each(extra[0], others, extra[1])) if extra else (),
    )
    if vectors.consensus or (vectors.trim and any(density < 1 for density in vectors.densities)):
        return vectors
    return vectors.combined([np.ones(vectors.base.shape, bool)] * len(others))


def _look_up(parameter: str, places: Sequence[dict[str, Any]], output: Output, default: Any) -> Any:
    settings = [place["parameters"][parameter] for place in places if parameter in (place.get("parameters") or {})]
    found = (resolved(setting, output.name, output.depth) for setting in settings)
    return next((value for value in found if value is not None), default)
