"""The cases of the methods whose facts are norms and angles, variances, ranks and divergences."""

from __future__ import annotations

from tests.conformance.case_builder import document, weighted

TWO, THREE = weighted(cos=0.7, fmt=0.3), weighted(cos=0.5, fmt=0.3, third=0.4)
FAR = weighted(cos=0.6, far=0.4)
GRADIENT = weighted(cos=[0.2, 1.0, 0.6], far=[{"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}])

NUSLERP = {
    "nuslerp-siblings": document("nuslerp", TWO),
    "nuslerp-strangers-float32": document("nuslerp", FAR, family="fp32"),
    "nuslerp-of-task-vectors": document("nuslerp", TWO, "base"),
    "nuslerp-of-task-vectors-base-in-models": document("nuslerp", {**weighted(cos=2, third=1), "base": {}}, "base"),
    "nuslerp-vectors-of-the-last-axis": document("nuslerp", TWO, "base", nuslerp_flatten=False, dtype="float32"),
    "nuslerp-vectors-of-the-first-axis": document(
        "nuslerp", FAR, family="fp32", nuslerp_flatten=False, nuslerp_row_wise=True
    ),
    "nuslerp-flatten-wins": document("nuslerp", FAR, nuslerp_row_wise=True),
    "nuslerp-weights-that-cancel": document("nuslerp", weighted(cos=0.5, far=-0.5)),
    "nuslerp-beyond-the-ends": document("nuslerp", weighted(cos=1.5, far=-0.5), family="fp32"),
    "nuslerp-opposites-of-one-line": document("nuslerp", weighted(up=0.7, down=0.3), "base", family="lattice"),
    "nuslerp-sparse-rows": document("nuslerp", weighted(sparse=0.4, cos=0.6), "base", nuslerp_flatten=False),
    "nuslerp-gradients-and-filters": document(
        "nuslerp", GRADIENT, nuslerp_flatten=[{"filter": "attn", "value": False}, {"value": True}]
    ),
    "nuslerp-float16": document("nuslerp", FAR, family="fp16"),
}

MULTISLERP = {
    "multislerp-siblings": document("multislerp", THREE),
    "multislerp-strangers-float32": document("multislerp", weighted(cos=0.6, far=0.4, third=1.1), family="fp32"),
    "multislerp-of-task-vectors": document("multislerp", THREE, "base"),
    "multislerp-of-one-is-that-one": document("multislerp", weighted(cos=0.3)),
    "multislerp-of-one-with-a-base": document("multislerp", weighted(cos=0.3), "base"),
    "multislerp-weights-as-they-are": document("multislerp", THREE, "base", normalize_weights=False, dtype="float32"),
    "multislerp-negative": document("multislerp", weighted(cos=1.2, far=-0.4), family="fp32"),
    "multislerp-wide-eps": document("multislerp", FAR, eps=0.05),
    "multislerp-opposites-fall-back-to-the-line": document(
        "multislerp", weighted(up=0.5, down=0.5), "base", family="lattice"
    ),
    "multislerp-gradients-and-filters": document("multislerp", GRADIENT, normalize_weights=[True, False]),
    "multislerp-base-in-models": document("multislerp", {**TWO, "base": {}}, "base", family="fp16"),
}

KARCHER = {
    "karcher-siblings": document("karcher", "cos fmt third"),
    "karcher-two-strangers-float32": document("karcher", "cos far", family="fp32"),
    "karcher-three-strangers": document("karcher", "cos far opposite"),
    "karcher-three-strangers-float32": document("karcher", "cos far third", family="fp32"),
    "karcher-one-step": document("karcher", "cos far opposite", family="fp32", max_iter=1),
    "karcher-no-step": document("karcher", "cos far third", family="fp32", max_iter=0),
    "karcher-wide-tolerance": document("karcher", "cos far third", family="fp32", tol=0.3),
    "karcher-of-one": document("karcher", "cos"),
    "karcher-base-joins-the-mean": document("karcher", "cos far", "base", family="fp32"),
    "karcher-base-in-models": document("karcher", "cos base far", "base"),
    "karcher-gradients": document("karcher", "cos far third", max_iter=[0, 10], family="fp32"),
}

MODEL_STOCK = {
    "model-stock-two": document("model_stock", "cos fmt", "base"),
    "model-stock-three-float32": document("model_stock", "cos fmt third", "base", family="fp32"),
    "model-stock-kin": document("model_stock", "one two", "base", family="crossed"),
    "model-stock-same-direction": document("model_stock", "up half", "base", family="lattice"),
    "model-stock-opposites-are-the-base": document("model_stock", "up down", "base", family="lattice"),
    "model-stock-rows": document("model_stock", "cos fmt third", "base", filter_wise=True, dtype="float32"),
    "model-stock-rows-kin": document("model_stock", "one two", "base", family="crossed", filter_wise=True),
    "model-stock-tiny-deltas": document("model_stock", "cos fmt", "opposite", family="fp32"),
    "model-stock-filters": document(
        "model_stock", "cos far base", "base", filter_wise=[{"filter": "mlp", "value": True}, {"value": False}]
    ),
}

NEARSWAP = {
    "nearswap": document("nearswap", "cos", "base", t=0.0005),
    "nearswap-float32": document("nearswap", "third", "base", family="fp32", t=0.001),
    "nearswap-base-in-models": document("nearswap", "base far", "base", t=0.01),
    "nearswap-nothing": document("nearswap", "far", "base", family="fp32", t=0),
    "nearswap-negative": document("nearswap", "far", "base", family="fp32", t=-0.5),
    "nearswap-everything": document("nearswap", "cos", "base", t=1),
    "nearswap-equal-elements": document("nearswap", "sparse", "base", t=1e-7, dtype="float32"),
    "nearswap-gradient": document("nearswap", "cos", "base", t=[0.0001, 0.002]),
}

ARCEE_FUSION = {
    "arcee-fusion": document("arcee_fusion", "far", "base", dtype="float32", out_dtype="bfloat16"),
    "arcee-fusion-float32": document("arcee_fusion", "far", "base", family="fp32"),
    "arcee-fusion-siblings": document("arcee_fusion", "third", "base", family="fp32"),
    "arcee-fusion-base-in-models": document("arcee_fusion", "far cos", "cos", family="fp16", dtype="float32"),
    "arcee-fusion-equal-parents": document("arcee_fusion", "sparse", "base", dtype="float32"),
}

SCE = {
    "sce": document("sce", "cos fmt third", "base"),
    "sce-float32": document("sce", "cos fmt third", "base", family="fp32", select_topk=0.4),
    "sce-weights-by-variance": document("sce", "cos far", "base", family="fp32", select_topk=0.7),
    "sce-kin": document("sce", "one two", "base", family="crossed", select_topk=0.3),
    "sce-equal-variances": document("sce", "up half", "base", family="lattice", select_topk=0.5),
    "sce-zero-sums": document("sce", "up down", "base", family="lattice"),
    "sce-of-one": document("sce", "third", "base", family="fp32"),
    "sce-of-one-selects-nothing": document("sce", "third", "base", family="fp32", select_topk=0.5),
    "sce-too-few-to-select": document("sce", "cos fmt", "base", select_topk=0.0001),
    "sce-int8-mask-base-in-models": document("sce", "cos base fmt", "base", select_topk=0.9, int8_mask=True),
    "sce-gradients": document("sce", "cos far", "base", select_topk=[0.2, 1.0], dtype="float32"),
}

RAM = {
    "ram": document("ram", "sparse cos", "base", dtype="float32"),
    "ram-sparse-of-three": document("ram", "sparse third cos", "base", epsilon=0.002),
    "ram-float32": document("ram", "one two", "base", family="crossed"),
    "ram-of-one": document("ram", "third", "base", family="fp32", epsilon=0.001),
    "ram-gradient-base-in-models": document("ram", "cos base fmt", "base", epsilon=[0.0001, 0.002]),
    "ramplus-tl": document("ramplus_tl", "sparse cos", "base"),
    "ramplus-tl-float32": document("ramplus_tl", "one two", "base", family="crossed", r=0.5, alpha=2),
    "ramplus-tl-of-three": document("ramplus_tl", "cos fmt third", "base", epsilon=0.001, r=0.3, alpha=0.4),
    "ramplus-tl-own-alone": document("ramplus_tl", "third", "base", family="fp32", epsilon=0.001),
    "ramplus-tl-filters": document(
        "ramplus_tl", "sparse cos", "base", r=[{"filter": "mlp", "value": [0, 0.4]}, {"value": 0.1}], dtype="float32"
    ),
}


def _trimmed(density: object, **more: object) -> dict[str, dict[str, object]]:
    weights = {"cos": 0.7, "fmt": 0.4}
    return {name: {"weight": weight, "density": density, **more} for name, weight in weights.items()}


BREADCRUMBS = {
    f"{method.replace('_', '-')}-{name}": text
    for method in ("breadcrumbs", "breadcrumbs_ties")
    for name, text in {
        "default-density": document(method, TWO, "base"),
        "half": document(method, _trimmed(0.5), "base"),
        "half-float32": document(method, _trimmed(0.5, gamma=0.03), "base", family="fp32"),
        "gamma-zero": document(method, _trimmed(0.4, gamma=0), "base", family="fp32"),
        "gamma-beyond-density": document(method, _trimmed(0.9, gamma=0.4), "base", family="fp32"),
        "keeps-nothing-of-few": document(method, _trimmed(0.02), "base", family="fp32"),
        "rescaled-normalized-lambda": document(
            method, _trimmed(0.3), "base", family="fp32", rescale=True, normalize=True, lambda_=1.4
        ),
        "equal-magnitudes": document(
            method,
            {"up": {"weight": 0.5, "density": 0.6, "gamma": 0.2}, "half": {"weight": 0.3, "density": 0.3}},
            "base",
            family="lattice",
        ),
        "negative-base-in-models": document(
            method, {"cos": {"weight": -0.5, "density": 0.7}, "base": {}, "third": {"weight": 1, "gamma": 0.1}}, "base"
        ),
        "gradients-and-filters": document(
            method,
            _trimmed([0.2, 0.9], gamma=[{"filter": "mlp", "value": 0.1}, {"value": 0.02}]),
            "base",
            dtype="float32",
            lambda_=[0.5, 1.5],
        ),
    }.items()
}

DELLA = {
    f"{method.replace('_', '-')}-{name}": text
    for method in ("della", "della_linear")
    for name, text in {
        "one": document(method, {"third": {"weight": 0.8, "density": 0.5}}, "base", family="fp32"),
        "one-unscaled": document(
            method, {"third": {"weight": 0.8, "density": 0.5, "epsilon": 0.4}}, "base", family="fp32", rescale=False
        ),
        "one-narrow": document(
            method, {"third": {"weight": 0.8, "density": 0.1, "epsilon": 0.05}}, "base", family="fp32"
        ),
        "one-gradients-and-filters": document(
            method,
            {"third": {"weight": 0.8, "density": [{"filter": "mlp", "value": [0.3, 0.7]}, {"value": 0.6}]}},
            "base",
            family="fp32",
            epsilon=[0.05, 0.25],
        ),
        "two": document(
            method,
            {"one": {"weight": 0.8, "density": 0.7}, "two": {"weight": 0.5, "density": 0.4, "epsilon": 0.3}},
            "base",
            family="crossed",
        ),
        "two-negative-lambda": document(
            method,
            {"one": {"weight": 0.8, "density": 0.7}, "two": {"weight": -0.5, "density": 0.7}},
            "base",
            family="crossed",
            normalize=False,
            lambda_=1.2,
        ),
        "two-everywhere-unscaled": document(
            method,
            {"cos": {"weight": 0.8, "density": 0.7}, "third": {"weight": 0.5, "density": 0.7}},
            "base",
            family="fp32",
            rescale=False,
        ),
        "density-one": document(method, _trimmed(1), "base"),
    }.items()
}

FURTHER = {
    **NUSLERP,
    **MULTISLERP,
    **KARCHER,
    **MODEL_STOCK,
    **NEARSWAP,
    **ARCEE_FUSION,
    **SCE,
    **RAM,
    **BREADCRUMBS,
    **DELLA,
}

FURTHER_REFUSED = {
    "nuslerp-of-three": document("nuslerp", THREE),
    "nuslerp-of-one-and-the-base": document("nuslerp", weighted(cos=1), "base"),
    "nuslerp-without-weights": document("nuslerp", "cos fmt"),
    "multislerp-without-weights": document("multislerp", "cos fmt"),
    "multislerp-three-that-cancel": document(
        "multislerp", weighted(up=0.5, down=0.3, half=-0.2), "base", family="lattice", normalize_weights=False
    ),
    "model-stock-of-one": document("model_stock", "cos", "base"),
    "model-stock-without-a-base": document("model_stock", "cos fmt third"),
    "nearswap-without-t": document("nearswap", "cos", "base"),
    "nearswap-of-three": document("nearswap", "cos fmt", "base", t=0.1),
    "arcee-fusion-of-three": document("arcee_fusion", "cos fmt", "base"),
    "sce-without-a-base": document("sce", "cos fmt"),
    "ram-without-a-base": document("ram", "cos fmt"),
    "breadcrumbs-without-a-base": document("breadcrumbs", TWO),
    "della-epsilon-reaches-one": document("della", _trimmed(0.9), "base"),
    "della-epsilon-reaches-zero": document("della_linear", _trimmed(0.1, epsilon=0.1), "base"),
}
