"""Adapters of the family `vit`: MCTF and PiToMe."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from tests.golden_adapters.case import Adapter, Case, Output
from tests.golden_adapters.vit import CLOSE, block_of
from tokred.methods.mctf import MCTF
from tokred.methods.pitome import PiToMe, merged_share
from tokred.methods.tome import KEYS
from tokred.nn import Here
from tokred.nn.run import run_block
from tokred.plan import ATTENTION, Plan, Site
from tokred.report import Call
from tokred.select import keep_static
from tokred.tokens import Tokens, make_tokens

POOLINGS = ("size", "attention", "max", "mean")


def mctf_reduction(case: Case) -> MCTF:
    s = case.settings
    return MCTF(
        s["r"],
        s["one_step_ahead"],
        bool(s["bidirectional"]),
        POOLINGS[s["pooling_type"]],
        s["tau_sim"],
        s["tau_info"],
        s["tau_size"],
    )


def mctf_tokens(case: Case, **fields: Any) -> Tokens:
    size = case.inputs.get("size")
    size = None if size is None else size[..., 0]
    return make_tokens(case.inputs["x"], size=size, prefix=case.settings["num_protected"], **fields)


def mctf(case: Case) -> dict[str, Any]:
    tokens, attn = mctf_tokens(case), case.inputs["attn"]
    reduction = mctf_reduction(case)
    # Attention of the fused tokens is an output in both modes that look ahead.
    reduction = dataclasses.replace(reduction, ahead=min(reduction.ahead, 1))
    whole, mean = reduction.ahead == 1, attn.mean((1, 2))
    evidence = {ask.name: attn if whole else mean for ask in reduction.asks}
    moved, map_, _, _ = reduction(tokens, evidence)
    if map_ is None:
        map_ = keep_static(range(tokens.n), tokens.n, tokens.batch)
    outputs = {"x": moved.x, "size": moved.sizes()[..., None], "source": map_.dense()}
    if ATTENTION in moved.extra:
        outputs["attn"] = jnp.swapaxes(moved.extra[ATTENTION], 1, 2)
    return outputs


def mctf_block(case: Case) -> dict[str, Any]:
    """Without looking ahead, tokens fuse behind the block, before one that would follow."""
    block, reduction = block_of(case), mctf_reduction(case)
    site = Site("before", 0 if reduction.ahead else 1)
    proportional = bool(case.settings.get("prop_attn", 1))
    plan = Plan(((site, dataclasses.replace(reduction, proportional=proportional)),), name="mctf")
    tokens = mctf_tokens(case, proportional=proportional)
    ran = run_block(Here({0: block, 1: block}, 0, plan, Call()), tokens)
    tokens, records = ran.tokens, ran.records
    if not reduction.ahead:
        tokens, records = Here({0: block, 1: block}, 1, plan, Call()).reduce("before", tokens)
    map_ = records[0].map
    if map_ is None:
        map_ = keep_static(range(tokens.n), tokens.n, tokens.batch)
    return {"x": tokens.x, "size": tokens.sizes()[..., None], "source": map_.dense()}


def pitome(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs["x"]
    prefix = int(s["class_token"])
    split = "closest" if s["use_bsm_pitome"] else "alternate"
    r = merged_share(x.shape[1] - prefix, s["ratio"])
    reduction = PiToMe(r, margin=s["margin"], alpha=s.get("alpha", 1.0), split=split)
    _, map_, _, _ = reduction(make_tokens(x, prefix=prefix), {KEYS.name: case.inputs["metric"]})
    if map_ is None:
        return {"mean": x, "sum": x}
    return {"mean": map_.apply(x, "mean"), "sum": map_.apply(x, "sum")}


FUSION = {
    "mctf": Adapter(mctf, {"source": Output(0, 0), **CLOSE}),
    "mctf_block": Adapter(mctf_block, {"source": Output(0, 0), "*": Output(1e-4, 1e-4)}),
    "pitome": Adapter(pitome, CLOSE),
}
