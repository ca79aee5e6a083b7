"""Adapters of vision methods around a whole encoder: CLCA's cache, TokenCut's object."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden_adapters.case import Adapter, Case, Output, exact
from tests.golden_adapters.vit import images_of, vit_config_of
from tests.golden_adapters.weights import fill
from tokred.methods.clca import class_states, with_cache
from tokred.methods.evit import EViT
from tokred.methods.tokencut import find_object
from tokred.models.vit import ViT
from tokred.nn.cross_layer import StatesHead
from tokred.plan import Plan, Site
from tokred.score import score_by_normalised_cut


def clca_evit(case: Case) -> dict[str, Any]:
    """The own tokens' places are the last of the position table; before the head over states there
    is no final norm."""
    s = case.settings
    params = {name: a for name, a in case.params.items() if not name.startswith("ifa_head")}
    config = vit_config_of(case, s["num_heads"])
    if "norm.bias" not in params:
        params |= {"norm.weight": jnp.ones(config.width), "norm.bias": jnp.zeros(config.width)}
    steps = tuple((Site("mid", i), EViT(s["keep_rate"])) for i in s["reduction_loc"])
    how = {"own": s["num_clr"], "mean": s["include_gap"], "last": s["recover_at_last"]}
    plan = with_cache(Plan(steps), config.layout, **how)
    if s["num_clr"]:
        places, rows = params["pos_embed"][0], config.layout.tokens
        params["pos_embed"] = places[:rows]
        params["reductions.input.table"] = params["clr"][0] + places[rows:]
    model = fill(lambda: ViT(config, plan=plan, rngs=nnx.Rngs(0)), params)
    logits, report = model(images_of(case), plan=plan)
    if s["ifa_head"]:
        logits = states_head(case.params)(class_states(report))
    return {"logits": logits}


def states_head(params: Any) -> StatesHead:
    """Of a sequence of batch norm (0), grouped convolution (1), batch norm (2), linear (4)."""
    of = lambda i, name: params[f"ifa_head.0.{i}.{name}"]  # noqa: E731
    filters, _, states = of(1, "weight").shape
    classes, width = of(4, "weight").shape[0], of(0, "weight").shape[0]
    shape = (width, filters // width)
    ours = {
        "mix": of(1, "weight").reshape(*shape, states),
        "bias": of(1, "bias").reshape(shape),
        "out.weight": of(4, "weight")[..., 0],
        "out.bias": of(4, "bias"),
    }
    for name, i in (("norm1", 0), ("norm2", 2)):
        stats = {"mean": of(i, "running_mean"), "var": of(i, "running_var")}
        both = {"weight": of(i, "weight"), "bias": of(i, "bias"), **stats}
        ours |= {f"{name}.{what}": value for what, value in both.items()}
    make = lambda: StatesHead(width, states, classes, kernels=shape[1], rngs=nnx.Rngs(0))  # noqa: E731
    return fill(make, ours)


def tokencut(case: Case) -> dict[str, Any]:
    s = case.settings
    grid = tuple(s["dims"])
    score = score_by_normalised_cut(
        case.inputs["feats"][:, 1:],
        tau=s["tau"],
        eps=s["eps"],
        weighted=bool(s["no_binary_graph"]),
    )
    found = jax.tree.map(lambda a: a[0], find_object(score, grid))
    top, left, bottom, right = found.box
    pixels = jnp.stack([left, top, right, bottom]) * s["patch"]
    return {
        "eigvec": score.reshape(grid),
        "seed": found.seed,
        "mask": found.mask,
        "box_feat": found.parts,
        "box_xyxy": pixels,
    }


def unit(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return want / np.linalg.norm(want), got / np.linalg.norm(got)


CACHING = {
    "clca_evit": Adapter(clca_evit, {"*": Output(1e-4, 1e-4)}),
    "tokencut": Adapter(
        tokencut,
        {"eigvec": Output(1e-3, 1e-3, unit), **dict.fromkeys(("seed", "mask", "box*"), exact)},
    ),
}
