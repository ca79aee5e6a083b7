"""Adapters of methods that route vision tokens around layers: p-MoD, gamma-MoD."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden_adapters.case import Adapter, Case, Output
from tests.golden_adapters.weights import fill
from tokred.methods.gammamod import GammaMoD, arank, head_ranks
from tokred.methods.pmod import PMoD, router_weights
from tokred.nn import Here, run_block
from tokred.nn.decoder_block import BlockShape, DecoderBlock
from tokred.nn.routers import PairRouter, VisionRouter
from tokred.plan import Plan, Reduction, Site
from tokred.report import Call
from tokred.schedule import decaying_ratios, shifted_decay
from tokred.tokens import Tokens, make_tokens

LLAMA = {
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.o_proj": "attn.out",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
}


def llama_block(case: Case, prefix: str = "") -> DecoderBlock:
    """A Llama layer; heads, theta and eps from the settings, the rest from the weights."""
    s = case.settings
    params = {
        f"{ours}.weight": case.params[f"{prefix}{name}.weight"] for name, ours in LLAMA.items()
    }
    inner, width = params["attn.query.weight"].shape
    head_dim = inner // s["heads"]
    shape = BlockShape(
        width,
        heads=s["heads"],
        kv_heads=params["attn.key.weight"].shape[0] // head_dim,
        head_dim=head_dim,
        hidden=params["mlp.gate.weight"].shape[0],
        norm_eps=s["rms_eps"],
        rope_theta=s.get("rope_theta", 10000.0),
    )
    return fill(lambda: DecoderBlock(shape, rngs=nnx.Rngs(0)), params)


def run_around(
    reduction: Reduction, module: Any, block: DecoderBlock, tokens: Tokens, twin: str = "packed"
) -> tuple[Any, Mapping[str, Any]]:
    """(features, aux) of one layer under the reduction."""
    site = Site("around", 0)
    call = Call(modules={reduction.module_name(site): module})
    ran = run_block(Here({0: block}, 0, Plan(((site, reduction),), twin), call), tokens)
    return ran.tokens.x, ran.records[0].aux


def tokens_of(case: Case, valid: Any = None, **extra: Any) -> Tokens:
    """The case's hidden states, padding left as it is."""
    x = case.inputs["hidden"]
    places = case.inputs.get("position_ids", jnp.arange(x.shape[1])[None])
    places = jnp.broadcast_to(places, x.shape[:2])[..., None].astype(jnp.float32)
    return make_tokens(x, valid=valid, position=places, extra=extra).replace(x=x)


def pmod_schedule(kind: str, highest: float, lowest: float) -> Callable[[Case], dict[str, Any]]:
    """The case does not hold how its ratios decay; its name does."""

    def make(case: Case) -> dict[str, Any]:
        depth, average = case.settings["num_layers"], case.settings["average_ratio"]
        ratios = decaying_ratios(depth, average, kind=kind, highest=highest, lowest=lowest)
        layers = case.inputs["layer_index"]
        return {
            "keep_ratio": np.array(ratios)[layers],
            "is_mod_layer": np.array(ratios)[layers] < 1,
            "raw_decay": np.array(shifted_decay(depth, average, kind))[layers],
        }

    return make


def pmod_layer(case: Case) -> dict[str, Any]:
    s, vision, valid = case.settings, case.inputs["target_mask"], case.inputs["attention_mask"]
    fewest = int((vision & valid).sum(-1).min())
    vision, valid = jnp.asarray(vision), jnp.asarray(valid)
    reduction = PMoD(s["ratio"], fewest, scale=s["norm_scale"], bias=s["norm_bias"])

    def run(inputs: Any, params: Any) -> dict[str, Any]:
        now = Case(s, inputs, params, {})
        weights = {"score.weight": params["router.router.weight"]}
        weights["score.bias"] = params.get("router.router.bias", jnp.zeros(1))
        width = inputs["hidden"].shape[-1]
        module = fill(lambda: VisionRouter(width, rngs=nnx.Rngs(0)), weights)
        block = llama_block(now, "decoder_layer.")
        x, _ = run_around(reduction, module, block, tokens_of(now, valid, vision=vision))
        weight = router_weights(
            module(inputs["hidden"]), vision, scale=s["norm_scale"], bias=s["norm_bias"]
        )
        return {"hidden": x, "router_weight": weight}

    return jax.jit(run)(case.inputs, case.params)


def gamma_layer(
    case: Case, reduction: GammaMoD, twin: str = "packed", **extra: Any
) -> tuple[Any, Mapping[str, Any]]:
    width = case.inputs["hidden"].shape[-1]
    weights = {"score.weight": case.params["router.weight"]}
    router = fill(lambda: PairRouter(width, rngs=nnx.Rngs(0)), weights)
    return run_around(reduction, router, llama_block(case), tokens_of(case, **extra), twin)


def gammamod_train(case: Case) -> dict[str, Any]:
    routable, shape = case.settings["fixed_prefix"], case.inputs["hidden"].shape[:2]
    protected = jnp.broadcast_to(jnp.arange(shape[1]) >= routable, shape)
    x, aux = gamma_layer(case, GammaMoD(0.5, routable, aux_weight=1.0), protected=protected)
    return {"hidden": x, "aux_loss": aux["loss_router"], "route_prob": aux["score"]}


def gammamod_infer(case: Case) -> dict[str, Any]:
    reduction = GammaMoD(0.5, prefill=1.0, threshold=case.settings["threshold"])
    decoding = case.inputs["hidden"].shape[1] == 1
    x, aux = gamma_layer(case, reduction, "causal" if decoding else "packed")
    return {"hidden": x, "route_prob": aux["score"]}


def gammamod_arank(case: Case) -> dict[str, Any]:
    first, second = case.inputs["attn"], case.inputs["attn2"]
    return {
        "head_rank": head_ranks(first),
        "avg_rank": arank(first),
        "head_rank2": head_ranks(second),
        "avg_rank2": arank(second),
    }


def schedule_adapter(kind: str, highest: float, lowest: float) -> Adapter:
    make = pmod_schedule(kind, highest, lowest)
    group = lambda case: "core/pmod__schedule"  # noqa: E731
    return Adapter(make, {"*": Output(0.0, 1e-12)}, jit=False, group=group)


DEPTH_VISION = {
    "pmod__schedule": schedule_adapter("cosine", 0.85, 0.15),
    "pmod__schedule_linear": schedule_adapter("linear", 0.75, 0.25),
    "pmod__schedule_interleave": schedule_adapter("interleave", 0.85, 0.15),
    "pmod__layer": Adapter(pmod_layer, jit=False),
    # Singular values of its first maps decay smoothly through the threshold.
    "gammamod__arank": Adapter(
        gammamod_arank, {"head_rank": Output(0.0, 1.0), "avg_rank": Output(0.0, 0.5)}
    ),
    "gammamod__train": Adapter(gammamod_train),
    "gammamod__infer": Adapter(gammamod_infer),
}
