"""Adapters of connectors on a grid that are no resamplers, and of V2PE's positions."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tests.golden_adapters.case import Adapter, Case, Output, exact
from tests.golden_adapters.weights import fill
from tokred.methods.c_abstractor import CAbstractor
from tokred.methods.m3 import m3
from tokred.methods.pixel_shuffle import PixelShuffle
from tokred.methods.tokenflex import TokenFlex
from tokred.nn.locality import pool_regions
from tokred.plan import Layout, Reduction
from tokred.positions import v2pe_positions
from tokred.rotary import rotate
from tokred.tokens import Tokens

# Official name -> ours, in the C-Abstractor.
STAGES = {"0": "before", "2": "after"}
LAYERS = {
    "conv1.conv": "conv1",
    "conv1.bn": "norm1",
    "conv2.conv": "conv2",
    "conv2.bn": "norm2",
    "conv3.conv": "conv3",
    "conv3.bn": "norm3",
    "se.fc1": "squeeze",
    "se.fc2": "excite",
    "downsample.conv": "around",
    "downsample.bn": "norm_around",
}
FLEX = {"layernorm": "norm", "f1": "gate", "f2": "up", "g": "down"}


def reduced(reduction: Reduction, x: Array, module: Any = None) -> Array:
    tokens, _, _, _ = reduction(Tokens(x), {}, module=module)
    return tokens.x


def square(x: Array) -> tuple[int, int]:
    side = math.isqrt(x.shape[1])
    return side, side


def pooled(x: Array, scale: int) -> Array:
    n = x.shape[1]
    layout = Layout(1, n, 0, square(x), False, x.shape[2], 1)
    ((_, reduction),) = m3(layout, scale=scale, strict=False).steps
    return reduced(reduction, x)


def m3_pool(case: Case) -> dict[str, Any]:
    """Of both families: the scales stand in the outputs' names."""
    scales = {name: int(name.removeprefix("y_").removeprefix("scale")) for name in case.outputs}
    return {name: pooled(case.inputs["x"], scale) for name, scale in scales.items()}


def pixel_shuffle(case: Case) -> dict[str, Any]:
    x, factor = case.inputs["x"], round(1 / case.settings["scale"])
    batch, h, w, width = x.shape
    a, b = h // factor, w // factor
    how = {"grid": (h, w), "factor": factor, "project": False}
    shuffled = lambda **more: reduced(  # noqa: E731
        PixelShuffle(**how, **more), x.reshape(batch, h * w, width)
    )
    return {
        "v1": shuffled(columns_first=True).reshape(batch, b, a, -1),
        "v2": shuffled().reshape(batch, a, b, -1),
    }


def tokenflex(case: Case) -> dict[str, Any]:
    x, side = case.inputs["x"], math.isqrt(case.settings["num_image_token"])
    weights = {name.removeprefix("mlp."): value for name, value in case.params.items()}
    out, _ = weights["g.weight"].shape
    for theirs, ours in FLEX.items():
        weights |= {f"{ours}.{p}": weights.pop(f"{theirs}.{p}") for p in ("weight", "bias")}
    reduction = TokenFlex(grid=square(x), cells=(side, side), out=out)
    module = fill(lambda: reduction.build(x.shape[-1], 1, nnx.Rngs(0)), weights)
    return {"pooled": pool_regions(x, reduction.matrix), "y": reduced(reduction, x, module)}


def _abstractor_weights(params: Mapping[str, Any]) -> dict[str, Any]:
    weights = {}
    for name, value in params.items():
        name = name.replace("__", ".").replace("pos_emb", "position").replace("eos_tokens", "eos")
        if block := re.match(r"net\.(\d+)\.b(\d+)\.(\w+\.\w+)", name):
            stage, number, layer = STAGES[block[1]], int(block[2]) - 1, LAYERS[block[3]]
            name = f"{stage}.{number}.{layer}{name[block.end() :]}"
        if linear := re.match(r"readout\.(\d+)", name):
            name = f"readout.layers.{int(linear[1]) // 2}{name[linear.end() :]}"
        weights[name] = value
    return weights


def cabstractor(case: Case) -> dict[str, Any]:
    s, x, weights = case.settings, case.inputs["x"], _abstractor_weights(case.params)
    side = math.isqrt(s["queries"])
    last = max(name for name in weights if re.fullmatch(r"readout\.layers\.\d+\.weight", name))
    reduction = CAbstractor(
        grid=(s["grid"], s["grid"]),
        cells=(side, side),
        depth=s["depth"],
        mlp_depth=sum(name.startswith("readout") for name in weights) // 2,
        channels=weights["before.0.conv1.weight"].shape[0],
        eos=s["eos"],
        prenorm=bool(s["prenorm"]),
        out=weights[last].shape[0],
    )
    module = fill(lambda: reduction.build(x.shape[-1], 1, nnx.Rngs(0)), weights)
    return {"y": reduced(reduction, x, module)}


def v2pe_pos(case: Case) -> dict[str, Any]:
    vision, s = case.inputs["input_ids"] == 3, case.settings
    return {
        "pos": v2pe_positions(vision, s["stride"] / s["tokens_per_tile"]),
        "pos_default": v2pe_positions(vision, 1.0),
    }


def v2pe_rotary(case: Case) -> dict[str, Any]:
    """The table is what turning (1, 0) gives."""
    position, half = case.inputs["pos"], case.settings["dim"] // 2
    x = jnp.concatenate([jnp.ones(half), jnp.zeros(half)])
    x = jnp.broadcast_to(x, (len(position), 1, 2 * half))
    cos, sin = jnp.split(rotate(x, position, case.settings["base"])[:, 0], 2, axis=-1)
    return {"cos": jnp.concatenate([cos, cos], -1), "sin": jnp.concatenate([sin, sin], -1)}


CONNECTORS = {
    "core": {
        "m3__pool": Adapter(m3_pool),
        "tokenflex__projector": Adapter(tokenflex),
    },
    "connectors": {
        "m3_pool": Adapter(m3_pool),
        "pixel_shuffle": Adapter(pixel_shuffle, {"*": exact}),
        "cabstractor": Adapter(cabstractor, {"*": Output(1e-4, 5e-5)}),
        "v2pe_pos": Adapter(v2pe_pos),
        "v2pe_rotary": Adapter(v2pe_rotary),
    },
}
