"""A document of mergekit-moe, strictly read: a mixture of experts from dense models of one architecture."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from jobs.errors import BadInput
from jobs.kinds_of_files import check_kind
from jobs.recipe import DTYPES
from jobs.sources import Reader, filled, model_name
from jobs.yaml_nodes import Node, load_document

KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
GATE_MODES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
DRAWN = ("random", "uniform_random")
"""Gate modes that read no prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """A model whose MLPs become one expert of every layer."""

    source_model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: float | None = None
    residual_scale: float | None = None
    place: str = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """One document. `shared` is the expert that every token goes through, if there is one.

    `ignored` has a sentence for each key without effect.
    """

    base_model: str
    experts: tuple[Expert, ...]
    shared: Expert | None
    gate_mode: str
    dtype: str | None
    experts_per_token: int
    architecture: str | None
    place: str = field(compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)

    def models(self) -> tuple[str, ...]:
        """The base and every expert, once each."""
        shared = () if self.shared is None else (self.shared,)
        return tuple(dict.fromkeys([self.base_model, *(expert.source_model for expert in (*self.experts, *shared))]))


def load_mixture(text: str, name: str, *, all_same: bool) -> Mixture:
    """The mixture in a YAML file; `all_same` allows experts that are one model. `BadInput` with the line."""
    node, reader = load_document(text, name), Reader(foreign=True)
    check_kind(node, "experts")
    keys = filled(reader.keys(node, KEYS, ("base_model", "experts")))
    gate_mode = keys["gate_mode"].choice(GATE_MODES) if "gate_mode" in keys else "hidden"
    experts = tuple(_expert(entry, reader, gate_mode) for entry in keys["experts"].sequence())
    listed = keys["shared_experts"].sequence() if "shared_experts" in keys else ()
    shared = [_expert(entry, reader, gate_mode) for entry in listed]
    if len(shared) > 1:
        raise BadInput(f"{shared[1].place}: `shared_experts` takes one model")
    mixture = Mixture(
        base_model=model_name(keys["base_model"]).string(),
        experts=experts,
        shared=shared[0] if shared else None,
        gate_mode=gate_mode,
        dtype=_dtype(keys["dtype"]) if "dtype" in keys else None,
        experts_per_token=keys["experts_per_token"].integer(minimum=1) if "experts_per_token" in keys else 2,
        architecture=keys["architecture"].string() if "architecture" in keys else None,
        place=node.place,
        ignored=tuple(reader.ignored),
    )
    _check(mixture, all_same=all_same)
    return mixture


def _check(mixture: Mixture, *, all_same: bool) -> None:
    """Refuses what mergekit refuses: a router needs experts to choose from, and prompts that tell them apart."""
    experts = mixture.experts
    if len(experts) < mixture.experts_per_token:
        raise BadInput(
            f"{mixture.place}: {len(experts)} experts and `experts_per_token: {mixture.experts_per_token}`;"
            f" list more experts, or set it to {len(experts)} or less"
        )
    if mixture.gate_mode not in DRAWN:
        for expert in experts:
            if not expert.positive_prompts:
                raise BadInput(
                    f"{expert.place}: `gate_mode: {mixture.gate_mode}` needs `positive_prompts:` for each expert;"
                    " add them, or write `gate_mode: random`"
                )
        prompts = {(expert.positive_prompts, expert.negative_prompts) for expert in experts}
        if len(experts) > 1 and len(prompts) == 1:
            raise BadInput(f"{experts[0].place}: all experts have equal prompts; give each prompts of its own")
    if len(experts) > 1 and len({expert.source_model for expert in experts}) == 1 and not all_same:
        raise BadInput(
            f"{experts[0].place}: all experts are one model, so that routing changes nothing; to train it afterwards,"
            " add --i-understand-this-is-not-useful-without-training"
        )


def _dtype(node: Node) -> str:
    """A dtype, which mergekit also takes as `torch.bfloat16`."""
    return replace(node, value=node.string().removeprefix("torch.")).choice(DTYPES)


def _expert(node: Node, reader: Reader, gate_mode: str) -> Expert:
    keys = filled(reader.keys(node, EXPERT_KEYS, ("source_model",)))

    def prompts(key: str) -> tuple[str, ...]:
        given = keys[key].sequence() if key in keys else ()
        return tuple(entry.string() for entry in given if entry.value or gate_mode not in DRAWN)

    def scale(key: str) -> Any:
        return float(keys[key].number()) if key in keys else None

    return Expert(
        source_model=model_name(keys["source_model"]).string(),
        positive_prompts=prompts("positive_prompts"),
        negative_prompts=prompts("negative_prompts"),
        noise_scale=scale("noise_scale"),
        residual_scale=scale("residual_scale"),
        place=node.place,
    )
