"""Adapters of vision methods whose counts depend on the image: ATS and its port, A-ViT."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden_adapters.case import Adapter, Case, Output, exact
from tests.golden_adapters.vit import block_of, images_of, vit_config_of
from tests.golden_adapters.weights import fill
from tokred.gates import PonderHalting
from tokred.methods.ats import ATS, quantiles_of
from tokred.methods.avit import AViT, depth_target, halting_profile, profile_loss
from tokred.models.vit import ViT
from tokred.nn import Block, Here, run_block
from tokred.plan import Plan, Site
from tokred.report import Call
from tokred.select import nearest_quantiles
from tokred.tokens import Tokens, make_tokens


def sampled(case: Case, reduction: ATS, tokens: Tokens) -> tuple[Tokens, Any]:
    """A block with the reduction inside its attention: (tokens, record)."""
    plan = Plan(((Site("inside", 0), reduction),), name="ats")
    here = Here({0: block_of(case)}, 0, plan, Call())
    ran = run_block(here, tokens)
    return ran.tokens, ran.records[0]


def ats_block(case: Case) -> dict[str, Any]:
    """The port's points are those of arange, whose end rounding moves."""
    k, n = case.settings["samples"], case.inputs["x"].shape[1]
    points = np.arange(1 / (2 * k), (2 * k - 1) / (2 * k), 2 / (2 * k))
    reduction = ATS(min(n - 1, len(points)), tuple(points.tolist()), "paper")
    tokens = make_tokens(case.inputs["x"], valid=case.inputs["mask"], prefix=1)
    tokens, record = sampled(case, reduction, tokens)
    alive, index = record.map.valid, record.map.index
    return {
        "x": jnp.where(alive[..., None], tokens.x, 0),
        "mask": alive,
        "ids": jnp.where(alive, index, 0),
    }


def ats_official(case: Case) -> dict[str, Any]:
    x, valid = case.inputs["x"], case.inputs["policy"][..., 0] > 0
    n, quantiles = x.shape[1], quantiles_of("official", case.settings["n_ref_tokens"] - 1)
    reduction = ATS(n - 1, quantiles, empty_counts=True)
    tokens = make_tokens(x, valid=valid, prefix=1)
    out, record = sampled(case, reduction, tokens)
    shares = reduction.shares(tokens, record.evidence)[:, 1:]
    order = jnp.argsort(jnp.where(valid[:, 1:], shares, -1.0), axis=-1)
    shares, alive = (jnp.take_along_axis(a, order, axis=-1) for a in (shares, valid[:, 1:]))
    picked = nearest_quantiles(shares, quantiles, valid=alive, stretch=True, empty_counts=True)
    unique = jax.vmap(lambda row: jnp.unique(row, size=len(quantiles), fill_value=n - 1))(picked)
    return {
        "x": jnp.where(out.valid[..., None], out.x, 0),
        "policy": out.valid[..., None],
        "sorted_scores": shares,
        "sorted_indices": jnp.where(alive, order, -1),
        "picked_ranks": picked,
        "unique_ranks": unique,
    }


def avit(case: Case) -> dict[str, Any]:
    """The profile's first image is left out, as by the official code."""
    s = case.settings
    config = vit_config_of(case, s["num_heads"])
    model = fill(lambda: ViT(config, rngs=nnx.Rngs(0)), case.params)
    depth, peak = config.depth, config.depth - 2
    gates = [
        PonderHalting(s["gate_scale"], s["gate_center"], s["eps"], last=i == depth - 1)
        for i in range(depth)
    ]
    steps = [(Site("after", i), AViT(i, depth, 1, gate)) for i, gate in enumerate(gates)]
    logits, report = model(images_of(case), plan=Plan(tuple(steps), "soft", "avit"))
    told = [report.aux[f"after_{i}"] for i in range(depth)]
    active = jnp.stack([a["active"] for a in told])
    chance = jnp.stack([a["chance"] for a in told])
    x, unread = model.tokens(images_of(case)).x, []
    for block, gate, alive in zip(model.blocks, gates, active, strict=True):
        x = masked_block(block, x, alive)
        unread.append(gate.update(x[..., 0])[2]["chance"])
    chance = jnp.where(active, chance, jnp.stack(unread))
    profile = halting_profile(jnp.moveaxis(chance, 0, -1)[1:])
    target, ponder = depth_target(depth, peak), report.tokens.extra["avit_ponder"]
    return {
        "logits": logits,
        "rho_token": ponder,
        "counter_token": active.sum(0),
        "halting": chance,
        "blocked_mask": ~active,
        "halting_layer": profile,
        "distr_target": target,
        "kl": profile_loss(profile, target),
        "ponder_mean": ponder.mean(),
    }


def masked_block(block: Block, x: jax.Array, alive: jax.Array) -> jax.Array:
    """The official block: what has halted is 0 before and behind each norm, and its chances, which
    the profile alone reads, are those of what comes out."""
    a = alive[..., None]
    x = x * a
    q, k, v = block.attn.project(block.norm1(x) * a)
    x = x + block.attn.attend(q, k, v, make_tokens(x, bias=-1000.0 * ~alive))
    return x + block.mlp(block.norm2(x * a) * a)


def as_wide(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The official arrays end with the fullest image of the batch: behind it all slots are 0."""
    more = [(0, 0)] * want.ndim
    more[1] = (0, got.shape[1] - want.shape[1])
    return np.pad(want, more), got


def where_told(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 0 and indices of -1 are slots whose contents no one reads."""
    want, got = as_wide(want, got)
    unread = got == -1 if got.ndim == 2 else (got == 0).all(-1, keepdims=True)
    return np.where(unread, got, want), got


HALTING = {
    "avit": Adapter(
        avit,
        {
            "blocked_mask": exact,
            "counter_token": exact,
            "*": Output(1e-4, 1e-4),
        },
    ),
    "ats_block": Adapter(
        ats_block,
        {
            "x": Output(1e-4, 1e-4, where_told),
            "mask": Output(0.0, 0.0, as_wide),
            "ids": Output(0.0, 0.0, as_wide),
        },
    ),
    "ats_official": Adapter(
        ats_official,
        {
            "x": Output(1e-4, 1e-4, as_wide),
            "policy": Output(0.0, 0.0, as_wide),
            "sorted_indices": Output(0.0, 0.0, where_told),
            "*": Output(1e-4, 1e-5),
        },
    ),
}
