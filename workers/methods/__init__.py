"""The merge methods, by the names mergekit gave them. A method's keyword-only arguments are its parameter schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from workers.methods.arcee_fusion import arcee_fusion, arcee_fusion_pass
from workers.methods.breadcrumbs import breadcrumbs, breadcrumbs_pass, breadcrumbs_ties, breadcrumbs_ties_pass
from workers.methods.consensus_ta import consensus_ta, consensus_ta_pass
from workers.methods.dare import dare_linear, dare_linear_pass, dare_ties, dare_ties_pass
from workers.methods.della import della, della_linear, della_linear_pass, della_pass
from workers.methods.fisher import fisher, fisher_pass
from workers.methods.karcher import karcher, karcher_pass
from workers.methods.linear import linear, linear_pass
from workers.methods.model_stock import model_stock, model_stock_collapse, model_stock_pass
from workers.methods.multislerp import multislerp, multislerp_pass
from workers.methods.nearswap import nearswap, nearswap_pass
from workers.methods.nuslerp import nuslerp, nuslerp_pass
from workers.methods.passes import Pass
from workers.methods.passthrough import passthrough, passthrough_pass
from workers.methods.ram import ram, ram_pass, ramplus_tl, ramplus_tl_pass
from workers.methods.regmean import regmean, regmean_pass
from workers.methods.sce import sce, sce_collapse, sce_pass
from workers.methods.slerp import slerp, slerp_pass
from workers.methods.task_arithmetic import task_arithmetic, task_arithmetic_pass
from workers.methods.ties import ties, ties_pass

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METHODS", "Method", "Parameter"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method: whether each model has its own, its kind, and its default (None: must be given)."""

    name: str
    per_model: bool
    kind: Literal["number", "integer", "boolean"]
    default: float | bool | None


@dataclass(frozen=True)
class Method:
    """A merge method: its formula, its rule for `base_model`, and the number of models it takes.

    `base` is "required" (a model to subtract, not one to merge), "optional" (the same if it is given), "one of the
    models", or "unused". `fused` gives the formula as one pass over memory, from settings that `simplified` has made.
    `whole_rows`: the method asks for whole rows of its tensors, `Tile.around`. `random`: its draws depend on the seed.
    `collapse` says in words, from the facts of a tensor, that its merge is not one. `given` is the key of a recipe that
    names the method's statistics. `by_torch`: on a GPU the formula merges, the pass has no loop there. `revision`
    counts the changes of its bits since `NUMERICS`.
    """

    merge: Callable[..., Tensor]
    fused: Callable[..., Pass] | None = None
    whole_rows: bool = False
    random: bool = False
    collapse: Callable[..., str | None] | None = None
    given: Literal["grams", "fisher"] | None = None
    by_torch: bool = False
    revision: int = 0
    base: Literal["required", "optional", "one of the models", "unused"] = "unused"
    fewest: int = 1
    most: int | None = None

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The schema, read from the signature: `PerModel` arguments per model, the others for the whole merge."""
        return {
            parameter.name.rstrip("_"): _parameter(parameter)
            for parameter in inspect.signature(self.merge).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }


_KINDS: Mapping[str, Literal["integer", "boolean"]] = {"int": "integer", "bool": "boolean"}


def _parameter(parameter: inspect.Parameter) -> Parameter:
    per_model = parameter.annotation == "PerModel"
    default = None if parameter.default is inspect.Parameter.empty else parameter.default
    return Parameter(
        name=parameter.name.rstrip("_"),
        per_model=per_model,
        kind=_KINDS.get(parameter.annotation, "number"),
        default=default[0] if per_model and default is not None else default,
    )


METHODS: Mapping[str, Method] = {
    "linear": Method(linear, linear_pass),
    "slerp": Method(slerp, slerp_pass, base="one of the models", fewest=2, most=2),
    "task_arithmetic": Method(task_arithmetic, task_arithmetic_pass, base="required"),
    "ties": Method(ties, ties_pass, base="required"),
    "dare_linear": Method(dare_linear, dare_linear_pass, random=True, base="required"),
    "dare_ties": Method(dare_ties, dare_ties_pass, random=True, base="required"),
    "breadcrumbs": Method(breadcrumbs, breadcrumbs_pass, base="required"),
    "breadcrumbs_ties": Method(breadcrumbs_ties, breadcrumbs_ties_pass, base="required"),
    "della": Method(della, della_pass, whole_rows=True, random=True, base="required"),
    "della_linear": Method(della_linear, della_linear_pass, whole_rows=True, random=True, base="required"),
    "sce": Method(sce, sce_pass, base="required", collapse=sce_collapse),
    "ram": Method(ram, ram_pass, base="required"),
    "ramplus_tl": Method(ramplus_tl, ramplus_tl_pass, base="required"),
    "nuslerp": Method(nuslerp, nuslerp_pass, base="optional", fewest=2, most=2),
    "multislerp": Method(multislerp, multislerp_pass, base="optional"),
    "karcher": Method(karcher, karcher_pass),
    "model_stock": Method(model_stock, model_stock_pass, base="required", fewest=2, collapse=model_stock_collapse),
    "consensus_ta": Method(consensus_ta, consensus_ta_pass, base="required"),
    "regmean": Method(regmean, regmean_pass, whole_rows=True, given="grams", by_torch=True),
    "fisher": Method(fisher, fisher_pass, given="fisher", by_torch=True),
    "arcee_fusion": Method(arcee_fusion, arcee_fusion_pass, whole_rows=True, revision=1, base="required", most=1),
    "nearswap": Method(nearswap, nearswap_pass, base="required", most=1),
    "passthrough": Method(passthrough, passthrough_pass, most=1),
}
