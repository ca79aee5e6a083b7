"""Positions that are no count of tokens: visual tokens that take smaller steps than text.

V2PE (Ge et al. 2024, OpenGVLab/V2PE). Positions are float32 throughout: bfloat16 has no whole
number between 256 and 258, and loses steps of 1/256 from 1 on.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from tokred.ops import gather

ROUNDING = 2.0**-22  # a few float32 roundings: 10 steps of 0.1 end at 1, not behind it


def check_positions(**named: Array | float) -> None:
    """Raises TypeError for positions or steps, named as their argument, in bfloat16 or float16."""
    for name, value in named.items():
        kind = jnp.result_type(value)
        if kind in (jnp.bfloat16, jnp.float16):
            raise TypeError(
                f"positions: {name} is {kind.name}, which cannot tell neighbouring positions "
                "apart; keep it in float32."
            )


def v2pe_positions(
    vision: Bool[Array, "*B N"],
    step: float | Float[Array, ""] | Float[Array, "*#B #N"],
    *,
    valid: Bool[Array, "*B N"] | None = None,
    image: Int[Array, "*B N"] | None = None,
) -> Float32[Array, "*B N"]:
    """Text takes a step of 1 and visual tokens one of `step`; a run of visual tokens ends on a
    whole number, the next above its last token.

    Counted from -1: text in front begins at 0, an image in front at step - 1. Decoding goes on by
    ones. step: in (0, 1], the same throughout a run; the paper draws 1, 1/2, .. 1/256 per image in
    training. valid: the others are at -1 and move nothing. image: the number of each token's image,
    -1 for text; it tells apart images without text between them, which are one run without it.
    Steps of 1/256 can be told apart up to position 65536.

    Raises:
      TypeError: `step` in bfloat16 or float16.
    """
    check_positions(step=step)
    axis = vision.ndim - 1
    valid = jnp.ones(vision.shape, bool) if valid is None else valid
    vision = vision & valid
    group = jnp.where(vision, 0 if image is None else image, -1)
    before = _valid_before(valid)
    previous = jnp.where(before < 0, -1, gather(group, jnp.maximum(before, 0), axis=axis))
    starts = vision & (group != previous)
    seen = jnp.cumsum(vision, axis)
    first = jax.lax.cummax(jnp.where(starts, seen - 1, 0), axis)
    inside = jnp.where(vision, (seen - first).astype(jnp.float32) * step, 0.0)
    ended = gather(jnp.ceil(inside * (1 - ROUNDING)), jnp.maximum(before, 0), axis=axis)
    closes = valid & (previous >= 0) & (group != previous)
    whole = jnp.where(closes, ended, 0.0) + (valid & ~vision)
    position = jnp.cumsum(whole, axis) - 1 + inside
    return jnp.where(valid, position, -1.0).astype(jnp.float32)


def _valid_before(valid: Bool[Array, "*B N"]) -> Int[Array, "*B N"]:
    """The place of the last valid token before each one; -1 where there is none."""
    axis = valid.ndim - 1
    places = jnp.broadcast_to(jnp.arange(valid.shape[-1], dtype=jnp.int32), valid.shape)
    last = jax.lax.cummax(jnp.where(valid, places, -1), axis)
    return jnp.concatenate([jnp.full_like(last[..., :1], -1), last[..., :-1]], axis)
