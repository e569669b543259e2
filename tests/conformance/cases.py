"""The merges on which mergekit, the formulas and mergeyard must agree. Each case is a mergekit document; PARENTS
stands for the folder of checkpoints.py's families."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tests.conformance.further_cases import DELLA, FURTHER, FURTHER_REFUSED
from workers.methods import METHODS

METHOD = re.compile(r"^merge_method: (\w+)$", re.MULTILINE)

LINEAR = {
    "linear-bf16": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.3}}
dtype: bfloat16
""",
    "linear-float32": """
merge_method: linear
models:
- {model: PARENTS/fp32/cos, parameters: {weight: 0.7}}
- {model: PARENTS/fp32/fmt, parameters: {weight: 0.3}}
dtype: float32
""",
    "linear-float16": """
merge_method: linear
models:
- {model: PARENTS/fp16/cos, parameters: {weight: 0.6}}
- {model: PARENTS/fp16/fmt, parameters: {weight: 0.4}}
dtype: float16
""",
    "linear-three-unnormalized": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.5}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.4}}
- {model: PARENTS/bf16/third, parameters: {weight: 0.3}}
parameters: {normalize: false}
dtype: float32
out_dtype: bfloat16
""",
    "linear-three-normalized": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 1}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 2}}
- {model: PARENTS/bf16/third, parameters: {weight: 4}}
dtype: float32
out_dtype: float16
""",
    "linear-negative": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 1.4}}
- {model: PARENTS/bf16/fmt, parameters: {weight: -0.4}}
dtype: bfloat16
""",
    "linear-zero-sum-unnormalized": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.5}}
- {model: PARENTS/bf16/fmt, parameters: {weight: -0.5}}
parameters: {normalize: false}
dtype: bfloat16
""",
    "linear-gradients": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: [0.0, 0.3, 1.0]}}
- {model: PARENTS/bf16/fmt, parameters: {weight: [1.0, 0.25]}}
dtype: bfloat16
""",
    "linear-gradient-of-a-single-layer-ends-at-its-last-value": """
merge_method: linear
models:
- {model: PARENTS/shallow/cos, parameters: {weight: [0.2, 0.9]}}
- {model: PARENTS/shallow/fmt, parameters: {weight: [0.8, 0.4, 0.1]}}
dtype: bfloat16
""",
    "linear-filters": """
merge_method: linear
models:
- model: PARENTS/bf16/cos
  parameters: {weight: [{filter: self_attn, value: [0.1, 0.9]}, {filter: mlp.up, value: 0.25}, {value: 0.5}]}
- model: PARENTS/bf16/fmt
  parameters: {weight: [{filter: embed_tokens, value: 2}, {filter: "*", value: 1}]}
dtype: bfloat16
""",
    "linear-filter-falls-through-to-top": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: [{filter: layernorm, value: 0.1}]}}
- {model: PARENTS/bf16/fmt}
parameters: {weight: [{filter: mlp, value: [0.5, 0.75, 2]}, {value: 0.6}], normalize: [{filter: mlp, value: false}]}
dtype: bfloat16
""",
    "linear-base-in-models": """
merge_method: linear
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/bf16/base, parameters: {weight: 0.3}}
dtype: bfloat16
""",
    "linear-base-out-of-models-joins-last": """
merge_method: linear
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
parameters: {weight: 0.3}
dtype: bfloat16
""",
    "linear-dtype-unset": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.3}}
""",
    "linear-dtype-unset-bf16-and-float32": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/fp32/fmt, parameters: {weight: 0.3}}
""",
    "linear-dtype-unset-bf16-and-float16": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/fp16/fmt, parameters: {weight: 0.3}}
""",
    "linear-out-dtype-only": """
merge_method: linear
models:
- {model: PARENTS/fp32/cos, parameters: {weight: 0.7}}
- {model: PARENTS/fp32/fmt, parameters: {weight: 0.3}}
out_dtype: bfloat16
""",
    "linear-sharded": """
merge_method: linear
models:
- {model: PARENTS/sharded/cos, parameters: {weight: 0.7}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.3}}
dtype: bfloat16
""",
    "linear-untied": """
merge_method: linear
models:
- {model: PARENTS/untied/cos, parameters: {weight: [{filter: lm_head, value: 0.9}, {value: 0.7}]}}
- {model: PARENTS/untied/fmt, parameters: {weight: 0.3}}
dtype: bfloat16
""",
    "linear-of-one": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 3}}
dtype: bfloat16
""",
}

SLERP = {
    "slerp-siblings-take-the-chord": """
merge_method: slerp
base_model: PARENTS/bf16/cos
models: [{model: PARENTS/bf16/cos}, {model: PARENTS/bf16/fmt}]
parameters: {t: 0.3}
dtype: bfloat16
""",
    "slerp-strangers-take-the-arc": """
merge_method: slerp
base_model: PARENTS/bf16/cos
models: [{model: PARENTS/bf16/cos}, {model: PARENTS/bf16/far}]
parameters: {t: 0.35}
dtype: float32
out_dtype: bfloat16
""",
    "slerp-base-listed-second-is-still-the-start": """
merge_method: slerp
base_model: PARENTS/bf16/far
models: [{model: PARENTS/bf16/cos}, {model: PARENTS/bf16/far}]
parameters: {t: 0.2}
dtype: bfloat16
""",
    "slerp-base-out-of-models": """
merge_method: slerp
base_model: PARENTS/fp32/base
models: [{model: PARENTS/fp32/far}]
parameters: {t: 0.6}
dtype: float32
""",
    "slerp-opposites-take-the-chord": """
merge_method: slerp
base_model: PARENTS/bf16/base
models: [{model: PARENTS/bf16/base}, {model: PARENTS/bf16/opposite}]
parameters: {t: 0.25}
dtype: bfloat16
""",
    "slerp-gradient-and-filters": """
merge_method: slerp
base_model: PARENTS/bf16/base
models: [{model: PARENTS/bf16/base}, {model: PARENTS/bf16/far}]
parameters:
  t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]
dtype: bfloat16
""",
    "slerp-float16": """
merge_method: slerp
base_model: PARENTS/fp16/base
models: [{model: PARENTS/fp16/base}, {model: PARENTS/fp16/far}]
parameters: {t: 0.5}
dtype: float16
""",
}

PASSTHROUGH = {
    "passthrough-one": """
merge_method: passthrough
models: [{model: PARENTS/bf16/cos}]
dtype: bfloat16
""",
    "passthrough-dtype-unset": """
merge_method: passthrough
models: [{model: PARENTS/fp16/cos}]
""",
    "passthrough-scaled-by-filter": """
merge_method: passthrough
models: [{model: PARENTS/bf16/cos, parameters: {scale: [{filter: o_proj, value: 0.7}, {filter: down_proj, value: 0}]}}]
dtype: bfloat16
""",
    "passthrough-to-float32": """
merge_method: passthrough
models: [{model: PARENTS/bf16/cos}]
dtype: float32
""",
}

TASK_ARITHMETIC = {
    "task-arithmetic": """
merge_method: task_arithmetic
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.3}}
dtype: bfloat16
""",
    "task-arithmetic-base-in-models-three": """
merge_method: task_arithmetic
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.5}}
- {model: PARENTS/bf16/base}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.5}}
- {model: PARENTS/bf16/third, parameters: {weight: 0.25}}
dtype: float32
out_dtype: float16
""",
    "task-arithmetic-lambda-after-normalize": """
merge_method: task_arithmetic
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.6}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.6}}
parameters: {normalize: true, lambda: 1.3}
dtype: bfloat16
""",
    "task-arithmetic-negation": """
merge_method: task_arithmetic
base_model: PARENTS/fp32/base
models:
- {model: PARENTS/fp32/cos, parameters: {weight: -1.0}}
dtype: float32
""",
    "task-arithmetic-zero-sum-normalized-divides-by-one": """
merge_method: task_arithmetic
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.5}}
- {model: PARENTS/bf16/fmt, parameters: {weight: -0.5}}
parameters: {normalize: true}
dtype: bfloat16
""",
    "task-arithmetic-tiny-sum-normalized-divides-by-one": """
merge_method: task_arithmetic
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 3.0e-9}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 4.0e-9}}
parameters: {normalize: true}
dtype: float32
""",
    "task-arithmetic-gradients-and-filters": """
merge_method: task_arithmetic
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: [{filter: mlp, value: [0, 1]}, {filter: layers.1., value: 0.4}]}}
- {model: PARENTS/bf16/fmt, parameters: {weight: [1, 0.2, 0.6]}}
parameters: {weight: 0.8, lambda: [0.5, 1.5]}
dtype: bfloat16
""",
    "task-arithmetic-dtype-unset-mixed": """
merge_method: task_arithmetic
base_model: PARENTS/fp16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/fp32/fmt, parameters: {weight: 0.3}}
""",
    "task-arithmetic-untied": """
merge_method: task_arithmetic
base_model: PARENTS/untied/base
models:
- {model: PARENTS/untied/cos, parameters: {weight: 0.7}}
- {model: PARENTS/untied/fmt, parameters: {weight: 0.3}}
dtype: bfloat16
""",
    "task-arithmetic-tied-parent-lends-its-embedding": """
merge_method: task_arithmetic
base_model: PARENTS/untied/base
models:
- {model: PARENTS/untied/cos, parameters: {weight: 0.7}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.3}}
dtype: bfloat16
""",
    "task-arithmetic-sharded-sparse": """
merge_method: task_arithmetic
base_model: PARENTS/sharded/base
models:
- {model: PARENTS/sharded/sparse, parameters: {weight: 1.0}}
- {model: PARENTS/sharded/third, parameters: {weight: 0.1}}
dtype: bfloat16
""",
}

TIES = {
    "ties": """
merge_method: ties
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7, density: 0.5}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.3, density: 0.5}}
dtype: bfloat16
""",
    "ties-float32-three": """
merge_method: ties
base_model: PARENTS/fp32/base
models:
- {model: PARENTS/fp32/cos, parameters: {weight: 0.5, density: 0.2}}
- {model: PARENTS/fp32/fmt, parameters: {weight: 0.4, density: 0.7}}
- {model: PARENTS/fp32/third, parameters: {weight: 0.3, density: 0.4}}
dtype: float32
""",
    "ties-density-one": """
merge_method: ties
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.3, density: 1}}
- {model: PARENTS/bf16/base}
dtype: bfloat16
""",
    "ties-keeps-one-of-few": """
merge_method: ties
base_model: PARENTS/fp32/base
models:
- {model: PARENTS/fp32/cos, parameters: {weight: 1.0, density: 0.01}}
dtype: float32
""",
    "ties-unnormalized-lambda": """
merge_method: ties
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7, density: 0.3}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.6, density: 0.9}}
parameters: {normalize: false, lambda: 0.8}
dtype: float32
out_dtype: float16
""",
    "ties-negative-weight": """
merge_method: ties
base_model: PARENTS/fp32/base
models:
- {model: PARENTS/fp32/cos, parameters: {weight: 1.0, density: 0.6}}
- {model: PARENTS/fp32/fmt, parameters: {weight: -0.5, density: 0.6}}
parameters: {lambda: 1.5}
dtype: float32
""",
    "ties-weights-that-cancel": """
merge_method: ties
base_model: PARENTS/fp32/base
models:
- {model: PARENTS/fp32/cos, parameters: {weight: 0.5, density: 0.6}}
- {model: PARENTS/fp32/fmt, parameters: {weight: -0.5, density: 0.6}}
dtype: float32
""",
    "ties-gradients-and-filters": """
merge_method: ties
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7, density: [1, 0.7, 0.1]}}
- {model: PARENTS/bf16/fmt, parameters: {weight: [0, 0.3, 0.7, 1], density: [{filter: mlp, value: 0.5}, {value: 0.3}]}}
parameters: {lambda: [{filter: norm, value: 1}, {value: 1.2}]}
dtype: bfloat16
""",
    "ties-rescaled": """
merge_method: ties
base_model: PARENTS/fp32/base
models:
- {model: PARENTS/fp32/cos, parameters: {weight: 0.7, density: 0.4}}
- {model: PARENTS/fp32/fmt, parameters: {weight: 0.3, density: 0.4}}
parameters: {rescale: true}
dtype: float32
""",
    "ties-int8-mask": """
merge_method: ties
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7, density: 0.5}}
- {model: PARENTS/bf16/fmt, parameters: {weight: 0.3, density: 0.5}}
parameters: {int8_mask: true}
dtype: bfloat16
""",
    "ties-mostly-zero-deltas": """
merge_method: ties
base_model: PARENTS/bf16/base
models:
- {model: PARENTS/bf16/sparse, parameters: {weight: 0.7, density: 0.5}}
- {model: PARENTS/bf16/cos, parameters: {weight: 0.3, density: 0.05}}
dtype: bfloat16
""",
    "ties-many-equal-magnitudes": """
merge_method: ties
base_model: PARENTS/lattice/base
models:
- {model: PARENTS/lattice/up, parameters: {weight: 0.5, density: 0.6}}
- {model: PARENTS/lattice/half, parameters: {weight: 0.25, density: 0.3}}
dtype: float32
""",
    "ties-zero-sums-elect-the-positive": """
merge_method: ties
base_model: PARENTS/lattice/base
models:
- {model: PARENTS/lattice/up, parameters: {weight: 0.5}}
- {model: PARENTS/lattice/down, parameters: {weight: 0.5}}
dtype: float32
""",
    "ties-sharded-untied": """
merge_method: ties
base_model: PARENTS/untied/base
models:
- {model: PARENTS/untied/cos, parameters: {weight: 0.7, density: 0.5}}
- {model: PARENTS/sharded/fmt, parameters: {weight: 0.3, density: 0.5}}
dtype: bfloat16
""",
}


def _dare(method: str, models: str, extra: str = "") -> str:
    return f"merge_method: {method}\ndtype: float32\n{models}\n{extra}"


def _one(density: str) -> str:
    return f"""
base_model: PARENTS/fp32/base
models:
- {{model: PARENTS/fp32/third, parameters: {{weight: 0.8, density: {density}}}}}"""


def _two(weight: float = 0.8, other: float = 0.5, density: str = "0.7", family: str = "crossed") -> str:
    one, two = {"crossed": ("one", "two"), "fp32": ("cos", "third")}[family]
    return f"""
base_model: PARENTS/{family}/base
models:
- {{model: PARENTS/{family}/{one}, parameters: {{weight: {weight}, density: {density}}}}}
- {{model: PARENTS/{family}/{two}, parameters: {{weight: {other}, density: {density}}}}}"""


DARE = {
    f"{method.replace('_', '-')}-one-{density}{'-unscaled' * unscaled}": _dare(
        method, _one(density), "parameters: {rescale: false}" * unscaled
    )
    for method in ("dare_linear", "dare_ties")
    for density in ("0.1", "0.5", "0.9")
    for unscaled in (False, True)
}
for _method in ("dare_linear", "dare_ties"):
    _name = _method.replace("_", "-")
    DARE |= {
        f"{_name}-two": _dare(_method, _two()),
        f"{_name}-two-normalized-lambda": _dare(_method, _two(), "parameters: {normalize: true, lambda: 1.2}"),
        f"{_name}-two-negative": _dare(_method, _two(other=-0.5)),
        f"{_name}-two-everywhere-unscaled": _dare(_method, _two(family="fp32"), "parameters: {rescale: false}"),
        f"{_name}-two-everywhere-unscaled-normalized": _dare(
            _method, _two(family="fp32"), "parameters: {rescale: false, normalize: true}"
        ),
        f"{_name}-weights-that-cancel": _dare(
            _method, _two(0.5, -0.5, family="fp32"), "parameters: {rescale: false, normalize: true}"
        ),
        f"{_name}-density-one": _dare(_method, _two(density="1")),
        f"{_name}-gradients-and-filters": _dare(
            _method, _one("[{filter: mlp, value: [0.2, 0.8]}, {filter: layernorm, value: 1}, {value: 0.6}]")
        ),
    }

CASES: dict[str, str] = {**LINEAR, **SLERP, **PASSTHROUGH, **TASK_ARITHMETIC, **TIES, **DARE, **FURTHER}
WITH_DICE = {**DARE, **DELLA}

REFUSED: dict[str, str] = {
    **FURTHER_REFUSED,
    "linear-without-a-weight": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/bf16/fmt}
dtype: bfloat16
""",
    "linear-a-filter-that-misses-tensors": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/bf16/fmt, parameters: {weight: [{filter: mlp, value: 0.3}]}}
dtype: bfloat16
""",
    "linear-the-same-parent-twice": """
merge_method: linear
models:
- {model: PARENTS/bf16/cos, parameters: {weight: 0.7}}
- {model: PARENTS/bf16/cos, parameters: {weight: 0.3}}
dtype: bfloat16
""",
    "slerp-without-t": """
merge_method: slerp
base_model: PARENTS/bf16/cos
models: [{model: PARENTS/bf16/cos}, {model: PARENTS/bf16/fmt}]
dtype: bfloat16
""",
    "slerp-of-three": """
merge_method: slerp
base_model: PARENTS/bf16/base
models: [{model: PARENTS/bf16/cos}, {model: PARENTS/bf16/fmt}]
parameters: {t: 0.5}
dtype: bfloat16
""",
    "slerp-without-a-base": """
merge_method: slerp
models: [{model: PARENTS/bf16/cos}, {model: PARENTS/bf16/fmt}]
parameters: {t: 0.5}
dtype: bfloat16
""",
    "ties-without-a-base": """
merge_method: ties
models: [{model: PARENTS/bf16/cos, parameters: {weight: 1, density: 0.5}}]
dtype: bfloat16
""",
    "passthrough-of-two": """
merge_method: passthrough
models: [{model: PARENTS/bf16/cos}, {model: PARENTS/bf16/fmt}]
dtype: bfloat16
""",
    "unknown-method": """
merge_method: slrp
models: [{model: PARENTS/bf16/cos}]
dtype: bfloat16
""",
    "unknown-dtype": """
merge_method: passthrough
models: [{model: PARENTS/bf16/cos}]
dtype: bfloat61
""",
    "missing-parent": """
merge_method: passthrough
models: [{model: PARENTS/bf16/nobody}]
dtype: bfloat16
""",
}

BFLOAT16 = "\ndtype: bfloat16\nout_dtype: bfloat16\n"
REFUSED_BY_NUMBERS = ("multislerp-three-that-cancel",)
"""Refused while merging, because the parents' numbers give the reason."""

# Compared bit by bit: `--numerics mergekit` against mergekit computing in bfloat16. Stored in it, too: mergekit 0.1.5
# stores float32 where arcee_fusion or ramplus_tl multiplies with a tensor of float32.
BIT_EXACT = {
    name: re.sub(r"\b(out_)?dtype: \w+\n", "", text.replace("PARENTS/fp32", "PARENTS/bf16")) + BFLOAT16
    for name, text in CASES.items()
    if "dtype:" in text and "PARENTS/crossed" not in text and "PARENTS/fp16" not in text
}


def parsed(document: str, parents: Path) -> dict[str, Any]:
    """The document with the parents' folder filled in."""
    return yaml.load(document.replace("PARENTS", str(parents)), yaml.CSafeLoader)


def of_each_method(documents: dict[str, str], every: int) -> list[str]:
    """The names of the first document of each method, and of every so-many-th after it."""
    seen: Counter[str] = Counter()
    chosen: list[str] = []
    for name, text in documents.items():
        method = METHOD.findall(text)[0]
        chosen += [name] if seen[method] % every == 0 else []
        seen[method] += 1
    return chosen


def ours(documents: dict[str, str]) -> dict[str, str]:
    """The documents of the methods that mergeyard has."""
    return {name: text for name, text in documents.items() if METHOD.findall(text)[0] in METHODS}


def parents_disagree(text: str) -> bool:
    """Whether the case mixes tied and untied parents, so that it must be said whose config.json holds."""
    return "PARENTS/untied/" in text and any(f"PARENTS/{tied}/" in text for tied in ("bf16", "sharded"))


def in_float32(document: dict[str, Any]) -> dict[str, Any]:
    """The same merge computed by mergekit in float32 and cast when it is saved. A document without dtype keeps its
    parents' types: cases use that only where mergekit computes in float32 by itself."""
    if not document.get("dtype"):
        return document
    return {**document, "dtype": "float32", "out_dtype": document.get("out_dtype") or document["dtype"]}
