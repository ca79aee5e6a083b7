"""Adapters of learned gates that delete tokens or let them exit: DyVTE, LaVIT."""

from typing import Any

from flax import nnx

from tests.golden_adapters.case import Adapter, Case
from tests.golden_adapters.vit import predictor_of
from tests.golden_adapters.weights import fill
from tokred.nn.predictors import ExitRouter, TokenMerger

OURS = {"token_causal_attn": "attn", "token_cross_attn": "cross"}


def dyvte_router(case: Case) -> dict[str, Any]:
    hidden, features = case.params["w1.weight"].shape
    weights = {f"fc{i}.weight": case.params[f"w{i}.weight"] for i in (1, 2)}
    router = fill(lambda: ExitRouter(features, hidden, rngs=nnx.Rngs(0)), weights)
    return {"logits": router(case.inputs["feature"])}


def merger_of(case: Case) -> TokenMerger:
    params = {}
    for name, value in case.params.items():
        for official, ours in OURS.items():
            name = name.replace(official, ours)
        params[name] = value
    depth = len({name.split(".")[2] for name in params if name.startswith("merger.blocks.")})
    hidden, width = params["merger.blocks.0.mlp.fc1.weight"].shape
    return fill(
        lambda: TokenMerger(
            width,
            case.settings["heads"],
            depth=depth,
            mlp_ratio=hidden / width,
            norm_eps=case.settings["ln_eps"],
            rngs=nnx.Rngs(0),
        ),
        params,
        "merger.",
    )


def lavit_merger(case: Case) -> dict[str, Any]:
    x, kept = case.inputs["x"], case.inputs["decisions"]
    merged = merger_of(case)(x, kept, eps=case.settings["policy_eps"])
    score = predictor_of(case.params, case.settings["ln_eps"])(x, 0 * kept + 1)
    return {"merged": merged, "score": score}


GATES = {"dyvte__router": Adapter(dyvte_router), "lavit__merger": Adapter(lavit_merger)}
