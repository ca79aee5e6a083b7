"""Adapters of clustering and of soft assignment."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tests.golden_adapters.case import Adapter, Case, Output
from tests.golden_adapters.weights import fill
from tokred.maps import Assign
from tokred.methods.dpc_knn import shares
from tokred.methods.expedit import Expedit
from tokred.methods.patchmerger import PatchMerger
from tokred.methods.sinkhorn import Sinkhorn
from tokred.methods.sit import Recover, Slim
from tokred.select import cluster_by_density, cluster_medoids, nearest_of
from tokred.tokens import make_tokens
from tokred.train.distill import match_layers, match_logits
from tokred.train.losses import cross_entropy


def dpcknn(case: Case) -> dict[str, Any]:
    """Empty tokens are officially of the first cluster, and count there."""
    x, s, inputs = case.inputs["x"], case.settings, case.inputs
    valid = inputs["token_mask"] > 0 if "token_mask" in inputs else None
    draws = inputs.get("noise")
    map_ = cluster_by_density(x, s["clusters"], neighbours=s["k"], valid=valid, draws=draws)
    target = map_.target if valid is None else jnp.where(valid, map_.target, 0)
    weight = inputs["token_weight"][..., 0] if "token_weight" in inputs else jnp.ones(x.shape[:2])
    groups = Assign(target, map_.k, index=map_.index)
    share = shares(groups, weight)
    return {
        "assign": target,
        "idx_token": target,
        "centers": map_.index,
        "merged": groups.apply(x, "weighted_sum", weight=share),
        "agg_weight": share[..., None],
    }


def kmedoids(case: Case) -> dict[str, Any]:
    x, s = case.inputs["x"], case.settings
    weight = case.inputs["token_weight"][..., 0] if "token_weight" in case.inputs else None
    map_ = cluster_medoids(x, s["clusters"], weight, iterations=s["iterations"])
    return {
        "centers": map_.apply(x, "keep"),
        "center_idx": map_.index,
        "assign": map_.target,
    }


def expedit_cr(case: Case) -> dict[str, Any]:
    s, x, refined = case.settings, case.inputs["x"], case.inputs["refined"]
    grid, cells = x.shape[1:3], tuple(s["grid"])
    tokens = make_tokens(x.reshape(x.shape[0], -1, x.shape[-1]))
    step = Expedit(
        grid, cells, s["iters"], s["window"], s["temperature"], s["topk"],
        norm="l2" if s.get("normalize", True) else "sum",
    )  # fmt: skip
    clusters, _, _, aux = step(tokens, {})
    label = nearest_of(tokens.x, clusters.x)
    return {
        "clusters": clusters.x.reshape(x.shape[0], *cells, -1),
        "hard_labels": label,
        "reconstructed": aux["combine"].restore.restore(refined),
        "naive_unpool": Assign(label, clusters.n).restore(refined),
    }


def pooled(reduction: Any, case: Case, params: Mapping[str, Any]) -> tuple[Any, Any]:
    """(tokens, weights) of a soft assignment."""
    x = case.inputs["x"]
    module = fill(lambda: reduction.build(x.shape[-1], 1, nnx.Rngs(0)), params)
    return reduction.pool(x, None, module)


def patchmerger(case: Case) -> dict[str, Any]:
    y, weights = pooled(
        PatchMerger(case.settings["keep"], bool(case.settings["scaled"])), case, case.params
    )
    return {"x": y, "attn": weights}


def sinkhorn(case: Case) -> dict[str, Any]:
    v = case.params["v"]
    reduction = Sinkhorn(v.shape[0], case.settings["eps"], case.settings["iters"])
    y, weights = pooled(reduction, case, {"centres": v})
    return {"x": y, "weights": weights}


TSM = {"weight.0.": "norm.", "weight.1.": "fc1.", "weight.3.": "fc2.", "scale": "scale"}


def sit_tsm_rtsm(case: Case) -> dict[str, Any]:
    params, s = case.params, case.settings
    tsm = {
        name.removeprefix("tsm.").replace(official, ours): value
        for name, value in params.items()
        for official, ours in TSM.items()
        if name.startswith(f"tsm.{official}")
    }
    slim, _ = pooled(Slim(s["keep"]), case, tsm)
    reverse = Recover(s["keep"], s["recover"])
    module = fill(lambda: reverse.build(slim.shape[-1], 1, nnx.Rngs(0)), params, "rtsm.")
    recovered = reverse(make_tokens(slim), {}, module=module)[3]["recovered"]
    return {"slim": slim, "recover": recovered}


def sit_frd_loss(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs
    fit = cross_entropy(x["student_logits"], x["target"])
    tokens = s["lambda_token"] * match_layers(list(x["student_tokens"]), list(x["teacher_tokens"]))
    logits = s["lambda_logits"] * match_logits(
        x["student_logits"], x["teacher_logits"], temperature=s["tau"]
    )
    return {"total": fit + tokens + logits, "cls": fit, "token": tokens, "logits": logits}


CLOSE = {"*": Output(1e-5, 1e-5)}
WIDE = {"*": Output(1e-4, 1e-4)}
CLUSTERS = {
    "dpcknn": Adapter(dpcknn, CLOSE),
    "kmedoids": Adapter(kmedoids, {"*": Output(1e-6, 1e-6)}),
    "expedit_cr": Adapter(expedit_cr, WIDE),
    "patchmerger": Adapter(patchmerger, CLOSE),
    "sinkhorn": Adapter(sinkhorn, WIDE),
    "sit_tsm_rtsm": Adapter(sit_tsm_rtsm, CLOSE),
    "sit_frd_loss": Adapter(sit_frd_loss, CLOSE),
}
