"""Adapters of methods that let tokens of a decoder skip layers: Router-Tuning."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.golden_adapters.case import Adapter, Case
from tests.golden_adapters.weights import fill
from tokred.methods.router_tuning import NORMED, RouterTuning
from tokred.nn.routers import TokenRouter
from tokred.tokens import make_tokens


def _tuned(case: Case, weight: Any) -> tuple[Any, Mapping[str, Any]]:
    """(features after the branch, aux) of the training form with these router weights."""
    s, x = case.settings, jnp.asarray(case.inputs["x"])
    per = "token" if case.outputs["mask"].shape[1] > 1 else "sequence"
    make = lambda: TokenRouter(x.shape[-1], rngs=nnx.Rngs(0))  # noqa: E731
    router = fill(make, {"score.weight": weight})
    method = RouterTuning(s["target"], per=per, scale=s["scale"], threshold=s["threshold"])
    tokens = make_tokens(jnp.asarray(case.inputs["residual"]))
    _, map_, _, aux = method(tokens, {NORMED.name: x}, module=router, train=True, twin="soft")
    after = tokens.x + case.inputs["update"]
    return aux["combine"].put_back(tokens.x, tokens.x, after, map_), aux


def routertuning(case: Case) -> dict[str, Any]:
    weight = jnp.asarray(case.params["weight"])
    y, aux = _tuned(case, weight)
    task = lambda w: (_tuned(case, w)[0] * case.inputs["cotangent"]).sum()  # noqa: E731
    loss = lambda w: _tuned(case, w)[1]["loss_capacity"]  # noqa: E731
    return {
        "y": y,
        "mask": aux["combine"].weight[:, : case.outputs["mask"].shape[1], None],
        "capacity": aux["share"],
        "capacity_loss": aux["loss_capacity"],
        "grad_weight_task": jax.grad(task)(weight),
        "grad_weight_loss": jax.grad(loss)(weight),
    }


DEPTH_TEXT = {"routertuning": Adapter(routertuning)}
