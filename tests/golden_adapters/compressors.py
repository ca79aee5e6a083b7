"""Adapters of compressors within a decoder: LLaVolta."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tests.golden_adapters.case import Adapter, Case
from tokred.methods.llavolta import VisualPool
from tokred.tokens import Tokens, make_tokens


def pooled(reduction: VisualPool, x: Array, position: Array, frame: Array) -> Tokens:
    """frame [B N]: the number of each token's image, -1 for text."""
    extra = {"vision": frame >= 0, "frame": frame}
    tokens = make_tokens(x, position=position[..., None].astype(jnp.float32), extra=extra)
    return reduction(tokens, {})[0]


def llavolta_pool(case: Case) -> dict[str, Any]:
    """One image and nothing else; officially positions are averaged in half precision."""
    x, position = jnp.swapaxes(case.inputs["x_bcn"], 1, 2), case.inputs["position_ids"]
    frame, how = jnp.zeros(position.shape, int), (case.settings["stride"], (1, x.shape[1]))
    half = lambda a: a.astype(jnp.float16).astype(jnp.float32)  # noqa: E731
    official = pooled(VisualPool(*how, "official"), x, position, frame)
    mean = pooled(VisualPool(*how), x, half(position), frame).position[..., 0]
    return {
        "x": official.x,
        "position_ids": official.position[..., 0],
        "position_float": half(mean),
    }


def llavolta(case: Case) -> dict[str, Any]:
    """Images of a known length from their starts on."""
    x, starts, s = case.inputs["x"], case.inputs["image_starts"], case.settings
    each, count = s["visual_length"], starts.shape[1]
    place = jnp.arange(x.shape[1])[None, :, None] - starts[:, None, :]  # within each image
    inside = (place >= 0) & (place < each)
    frame = jnp.where(inside, jnp.arange(count)[None, None], -1).max(-1)
    position = jnp.broadcast_to(case.inputs["pos"], x.shape[:2])
    tokens = pooled(VisualPool(s["stride"], (count, each), "official"), x, position, frame)
    return {"y": tokens.x, "pos": tokens.position[..., 0]}


COMPRESSORS = {
    "core": {"llavolta__pool": Adapter(llavolta_pool)},
    "connectors": {"llavolta": Adapter(llavolta)},
}
