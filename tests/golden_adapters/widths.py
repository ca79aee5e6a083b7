"""Adapters of methods that vary how much of an MLP a token takes: ACM, MC-MoE."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tests.golden_adapters.case import Adapter, Case
from tests.golden_adapters.weights import fill
from tokred.methods.mcmoe import prune_experts, token_importance
from tokred.nn.experts import Experts, per_expert, route
from tokred.nn.learners import Learners

BIAS = {(True, True): "all", (True, False): "hidden", (False, True): "output"}


def learners_of(case: Case) -> Learners:
    s, params = case.settings, case.params
    make = lambda: Learners(  # noqa: E731
        params["w1"].shape[0],
        s["blocks"],
        s["block_dim"],
        activation=s.get("activation", "gelu"),
        bias=BIAS.get(("b1" in params, "b2" in params), "none"),
        rngs=nnx.Rngs(0),
    )
    return fill(make, params)


def acm(case: Case) -> dict[str, Any]:
    x, count = case.inputs["x"], case.inputs["choice"]
    learners = learners_of(case)
    room = [x.shape[1]] * learners.learners
    gated, _ = learners.packed(x, count, room, rule="official")
    return {"all": learners.all(x), "gated_official": gated}


def experts_of(params: Mapping[str, Any], top_k: int) -> Experts:
    experts, width = params["gate.weight"].shape
    stack = lambda name: jnp.stack(  # noqa: E731
        [params[f"experts.{m}.{name}.weight"].T for m in range(experts)]
    )
    weights = {"gate": stack("w1"), "up": stack("w3"), "down": stack("w2")}
    hidden = weights["gate"].shape[-1]
    make = lambda: Experts(width, hidden, experts, top_k=top_k, rngs=nnx.Rngs(0))  # noqa: E731
    return fill(make, {**weights, "router.weight": params["gate.weight"]})


def _importance(x: Any, attn: Any) -> Any:
    """One head alone is squeezed away officially, so that its queries are averaged."""
    return token_importance(x) if attn.shape[1] > 1 else jnp.abs(x).sum(-1) * attn[:, 0].mean(1)


def mcmoe_odp(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs["hidden"]
    experts = experts_of(case.params, s["top_k"])
    logits = experts.router(x)
    weight, expert = route(logits, experts.top_k)
    importance = _importance(x, case.inputs["attn"]) if x.shape[-2] > 1 else None
    weight = prune_experts(
        weight, importance, beta=s["beta"], tau_low=s["tau_low"], tau_high=s["tau_high"]
    )
    y = experts.masked(x, per_expert(weight, expert, experts.experts))
    return {"y": y, "router_logits": logits.reshape(-1, experts.experts)}


WIDTHS = {"acm": Adapter(acm), "mcmoe__odp": Adapter(mcmoe_odp)}
