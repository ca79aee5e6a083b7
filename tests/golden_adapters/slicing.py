"""Adapters of slicing plans and of SliME's router."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tests.golden_adapters.case import Adapter, Case, exact
from tests.golden_adapters.resamplers import renamed
from tests.golden_adapters.weights import fill
from tokred.data.slicing import END_OF_ROW, SlicePlan, plan_slices
from tokred.methods.slime_router import WORDS, SlimeRouter, score_by_text
from tokred.nn.text_router import TextRouter
from tokred.tokens import Tokens

ROUTER = {
    "cross_attn": "look",
    "ln_q": "norm",
    "ln_kv": "norm_text",
    "ln_post": "head.layers.0",
    r"prob_proj\.0": "head.layers.1",
    r"prob_proj\.2": "head.layers.2",
}


def _row(plan: SlicePlan) -> list[int]:
    """As the cases have them: width before height, and a grid of one where nothing is cut."""
    grid = plan.grid if plan.count else (1, 1)
    ends = plan.separators.count(END_OF_ROW)
    return [*grid[::-1], *plan.overview[::-1], *plan.slice[::-1], plan.count, ends]


def uhd_slicing(case: Case) -> dict[str, Any]:
    s = case.settings
    how = {"base": s["scale_resolution"], "patch": s["patch"], "limit": s["max_slices"]}
    sizes = [(int(height), int(width)) for width, height in case.inputs["wh"]]
    return {"plan": np.asarray([_row(plan_slices(size, **how)) for size in sizes])}


def _routed(reduction: SlimeRouter, x: Array, words: Tokens, module: Any = None) -> Any:
    return reduction(Tokens(x), {WORDS.name: words}, module=module)


def slime_router(case: Case) -> dict[str, Any]:
    s, inputs = case.settings, {k: jnp.asarray(v)[None] for k, v in case.inputs.items()}
    x, text, mask = inputs["x"], inputs["text"], inputs["text_mask"] > 0
    tokens, _, _, _ = _routed(SlimeRouter(s["topp"], s["temp"]), x, Tokens(text, valid=mask))
    indices = np.flatnonzero(np.asarray(tokens.sources())[0] >= 0)
    return {
        "scores": score_by_text(x, text, mask)[0],
        "scores_nomask": score_by_text(x, text)[0],
        "y": tokens.x[0, : len(indices)],
        "indices": indices,
    }


def slime_router_attn(case: Case) -> dict[str, Any]:
    """The case has the sequence first, and its softmax over the batch."""
    s, inputs = case.settings, case.inputs
    x, text = (jnp.swapaxes(inputs[name], 0, 1) for name in ("x", "text"))
    params, heads = renamed(case.params, ROUTER), s["num_heads"]
    module = fill(lambda: TextRouter(x.shape[-1], heads, rngs=nnx.Rngs(0)), params)
    reduction = SlimeRouter(temperature=s["temp"], scorer="attention", official=True)
    *_, aux = _routed(reduction, x, Tokens(text, valid=inputs["text_mask"] > 0), module)
    return {"y": aux["score"].T}


SLICING = {
    "connectors": {
        "uhd_slicing": Adapter(uhd_slicing, {"*": exact}, jit=False),
        "slime_router": Adapter(slime_router, jit=False),
        "slime_router_attn": Adapter(slime_router_attn),
    },
}
