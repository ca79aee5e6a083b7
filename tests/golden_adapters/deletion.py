"""Adapters of MrT5: attention with a gate, the gate, the encoder in both forms, the controller."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden_adapters.case import Adapter, Case, Output
from tests.golden_adapters.weights import fill
from tokred.gates import RateController
from tokred.methods.mrt5 import MrT5
from tokred.models.encoder_decoder import Stack
from tokred.models.encoder_decoder_config import EncoderDecoderConfig
from tokred.nn import Layers
from tokred.nn.routers import DeleteGate
from tokred.nn.t5_block import RelativeBias, T5Attention, T5Shape
from tokred.ops import attention_probs, gather, softmax
from tokred.plan import Layout, Plan, Site
from tokred.report import Call
from tokred.tokens import Tokens

T5 = {
    "layer.0.SelfAttention.q": "attn.query",
    "layer.0.SelfAttention.k": "attn.key",
    "layer.0.SelfAttention.v": "attn.value",
    "layer.0.SelfAttention.o": "attn.out",
    "layer.0.layer_norm": "norm1",
    "layer.1.DenseReluDense.wi_0": "mlp.gate",
    "layer.1.DenseReluDense.wi_1": "mlp.up",
    "layer.1.DenseReluDense.wo": "mlp.down",
    "layer.1.layer_norm": "norm2",
}
TABLE = "relative_attention_bias.weight"
CLOSED = float(np.finfo(np.float32).min)


def gate_of(params: Mapping[str, Any], prefix: str = "", eps: float = 1e-6) -> DeleteGate:
    ours = {"norm.scale": "layer_norm.weight", "score.bias": "feed_forward.bias"}
    weights = {name: params[f"{prefix}{theirs}"] for name, theirs in ours.items()}
    kernel = params[f"{prefix}feed_forward.weight"]
    make = lambda: DeleteGate(kernel.shape[1], norm_eps=eps, rngs=nnx.Rngs(0))  # noqa: E731
    return fill(make, {**weights, "score.weight": kernel})


def mrt5_softmax1(case: Case) -> dict[str, Any]:
    return {"probs": softmax(case.inputs["logits"], sink=True)}


def mrt5_gate(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs["hidden"]
    tokens = Tokens(x, valid=case.inputs["input_ids"] != 0)
    module = gate_of(case.params, eps=s["ln_eps"])
    reduction = MrT5(scale=s["scale"])
    _, _, _, aux = reduction(tokens, {}, module=module, twin="soft")
    return {"gate": aux["gate"][..., None], "logits": aux["score"][..., None]}


def mrt5_soft_attention(case: Case) -> dict[str, Any]:
    s, x = case.settings, case.inputs["hidden"]
    shape = T5Shape(
        x.shape[-1], s["heads"], s["d_kv"], 8, buckets=s["buckets"],
        max_distance=s["max_distance"], sink=bool(s["softmax1"]),
    )  # fmt: skip
    names = {"q": "query", "k": "key", "v": "value", "o": "out"}
    weights = {f"{ours}.weight": case.params[f"{name}.weight"] for name, ours in names.items()}
    attn = fill(lambda: T5Attention(shape, rngs=nnx.Rngs(0)), weights)
    relative = fill(lambda: RelativeBias(shape, rngs=nnx.Rngs(0)), {"table": case.params[TABLE]})
    valid, place = case.inputs["attention_mask"] > 0, jnp.arange(x.shape[1])[None]
    keys = Tokens(x, valid=valid, bias=case.inputs["gate"][..., 0])
    bias, q, (k, v) = relative(place, place), attn.ask(x), attn.offer(x)
    masked = jnp.where(valid[:, None, None, :], bias, CLOSED)
    how = {"bias": keys.bias, "valid": valid, "pair_bias": bias, "sink": shape.sink, "scale": 1.0}
    return {
        "attn": attn.attend(q, k, v, keys, pair_bias=bias),
        "position_bias_plus_mask": masked,
        "weights": attention_probs(q, k, **how),
    }


def encoder_of(case: Case) -> tuple[EncoderDecoderConfig, Stack]:
    s, params = case.settings, case.params
    vocab, width = params["embed_tokens.weight"].shape
    config = EncoderDecoderConfig(
        vocab=vocab, width=width, depth=s["layers"], heads=s["heads"], head_dim=s["d_kv"],
        hidden=s["d_ff"], buckets=s["buckets"], max_distance=s["max_distance"],
        sink=bool(s["softmax1"]),
    )  # fmt: skip
    weights = {"norm.weight": params["final_layer_norm.weight"]}
    weights["blocks.0.relative.table"] = params[f"block.0.layer.0.SelfAttention.{TABLE}"]
    for i in range(config.depth):
        weights |= {
            f"blocks.{i}.{ours}.weight": params[f"block.{i}.{name}.weight"]
            for name, ours in T5.items()
        }
    make = lambda: Stack(config.shape("encoder"), config.depth, scan=False, rngs=nnx.Rngs(0))  # noqa: E731
    return config, fill(make, weights)


def mrt5_encoder(case: Case) -> dict[str, Any]:
    site = Site("before", case.settings["gate_layer"])
    how = {"scale": case.settings["scale"], "threshold": case.settings["threshold"]}
    # Before the first layer the official code counts distances after deletion.
    places = "renumber" if site.layer == 0 else "keep"

    def run(reduction: MrT5, twin: str) -> Any:
        def encode(inputs: Any, params: Any) -> Any:
            config, encoder = encoder_of(dataclasses.replace(case, params=params))
            gate = gate_of(params, f"block.{site.layer}.delete_gate.")
            ids, valid = inputs["input_ids"], inputs["attention_mask"] > 0
            place = jnp.arange(ids.shape[1], dtype=jnp.float32)[None, :, None]
            # Padding is embedded as it is, so that its rows too are those of the official code.
            tokens = Tokens(params["embed_tokens.weight"][ids], valid=valid, position=place)
            call, layout = Call(modules={site.name: gate}), config.layout_of(ids.shape[1])
            plan = Plan(((site, reduction),), twin)
            ran = encoder(tokens, plan, call, layout)
            return ran.tokens, ran.records[0], _below(encoder, tokens, site.layers.start, layout)

        return jax.jit(encode)(case.inputs, case.params)

    soft, record, before = run(MrT5(**how), "soft")
    kept = np.asarray(record.aux["entered"])
    most = int(kept.sum(-1).max())
    hard, packed, _ = run(MrT5(capacity=most / kept.shape[1], positions=places, **how), "packed")
    empty = ~np.asarray(packed.map.valid)[..., None]
    mask = jnp.asarray(case.inputs["attention_mask"])
    moved = gather(mask, packed.map.index, axis=1)
    return {
        "soft_pre_gate": before,
        "soft_last": soft.x,
        "gate": record.aux["gate"][..., None],
        "logits": record.aux["score"][..., None],
        # What stands on empty slots is nobody's: there the case's own numbers are taken.
        "hard_last": np.where(empty, case.outputs["hard_last"], hard.x),
        "hard_new_mask": np.where(empty[..., 0], mask[:, :1], moved),
        "hard_gate_mask": np.where(empty, -1e9, 0.0),
    }


def _below(encoder: Stack, tokens: Tokens, layer: int, layout: Layout) -> Any:
    """What enters a layer of the dense encoder."""
    layout = dataclasses.replace(layout, depth=layer)
    return Layers(encoder.blocks[:layer])(tokens, Plan(), Call(), Plan().counts(layout)).tokens.x


def mrt5_pi_controller(case: Case) -> dict[str, Any]:
    s = case.settings
    controller = RateController(s["target"], s["kp"], s["ki"])
    with jax.enable_x64():
        start = jax.tree.map(lambda a: a.astype(jnp.float64), controller.init())

        def step(state: Any, rate: Any) -> Any:
            state = controller.update(rate, state)
            return state, state["coefficient"]

        final, alpha = jax.lax.scan(step, start, jnp.asarray(case.inputs["rate"]))
        return {
            "alpha": np.asarray(alpha),
            "final_state": np.stack([np.asarray(final["p"]), np.asarray(final["i"])]),
        }


DELETION = {
    "mrt5__softmax1": Adapter(mrt5_softmax1),
    "mrt5__gate": Adapter(mrt5_gate),
    "mrt5__soft_attention": Adapter(mrt5_soft_attention),
    "mrt5__encoder": Adapter(mrt5_encoder, jit=False),
    "mrt5__pi_controller": Adapter(mrt5_pi_controller, {"*": Output(0.0, 1e-12)}, jit=False),
}
