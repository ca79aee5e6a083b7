"""How parameters move: AdamW with its schedule, layer-wise rates, and a moving average.

Parameters are flat dicts of arrays by path, such as 'blocks/0/attn/query/kernel'.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tokred.nn.skeleton import Arrays

LAST = ("norm", "head", "reductions")  # behind all blocks


SCHEDULES = ("cosine", "linear", "constant")


def make_optimizer(
    *,
    lr: float,
    steps: int,
    warmup: float = 0.1,
    schedule: str = "cosine",
    end: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    layer_decay: float = 1.0,
    scales: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm; the rate warms up from 0, then falls or stays.

    All static. warmup: share of `steps`. schedule: 'cosine' | 'linear' | 'constant'. end: the final
    rate as a share of `lr`, where it falls. clip: 0 for none. layer_decay: see `scale_by_layer`, 1
    for none. scales: see `scale_by_name`.

    Raises:
      ValueError: a field out of its range.
    """
    _check("lr", lr, lr > 0, "positive")
    _check("steps", steps, steps >= 1, "at least 1")
    _check("warmup", warmup, 0 <= warmup < 1, "in [0, 1)")
    _check("b1", b1, 0 <= b1 < 1, "in [0, 1)")
    _check("b2", b2, 0 <= b2 < 1, "in [0, 1)")
    _check("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
    _check("clip", clip, clip >= 0, "positive, or 0 for no clipping")
    _check("layer_decay", layer_decay, 0 < layer_decay <= 1, "in (0, 1]")
    rate = make_schedule(lr, steps, round(warmup * steps), schedule, end)
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    chain.append(optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays))
    if layer_decay < 1:
        chain.append(scale_by_layer(layer_decay))
    if scales:
        chain.append(scale_by_name(scales))
    return optax.chain(*chain)


def _check(field: str, value: Any, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"config.optimizer.{field}={value!r} must be {wanted}; change it.")


def make_schedule(
    lr: float, steps: int, warmup: int, schedule: str, end: float = 0.0
) -> optax.Schedule:
    """Learning rate by step.

    warmup: steps from 0 to `lr`; at least one step is left to fall. end: final share of `lr`.

    Raises:
      ValueError: an unknown schedule, or an `end` that it cannot reach.
    """
    _check("schedule", schedule, schedule in SCHEDULES, f"one of {SCHEDULES}")
    _check("end", end, 0 <= end <= 1, "a share of lr in [0, 1]")
    start, rises = 0.0 if warmup else lr, min(warmup, steps - 1)
    if schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(start, lr, rises, steps, end * lr)
    if schedule == "linear":
        fall = optax.linear_schedule(lr, end * lr, steps - rises)
        return optax.join_schedules(
            [optax.linear_schedule(start, lr, max(rises, 1)), fall], [rises]
        )
    _check("end", end, end == 0, "0 with schedule='constant', which never falls")
    return optax.linear_schedule(start, lr, max(warmup, 1))


def decays(params: Mapping[str, Any]) -> dict[str, bool]:
    """Whether weight decay acts: on kernels only, not on positions, tokens, norms or rates."""
    return {name: name.endswith("kernel") and p.ndim >= 2 for name, p in params.items()}


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Updates times decay^(D - depth) as in BEiT and MAE; D is the number of blocks + 1.

    Depth is 0 for what stands before the blocks, i + 1 for 'blocks/i/', D for `LAST`. Blocks are
    counted in the paths of the updates, so up to the last block that trains. No state.
    """

    def scale(updates: Any, params: Any) -> Arrays:
        return {name: updates[name] * decay**far for name, far in _distances(updates).items()}

    return optax.stateless(scale)


def scale_by_name(scales: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Updates times the factor of the first regular expression that is found in their path.

    Adam moves every number by about the rate, whatever its size: few but large ones, such as T5's
    relative biases, need a larger rate. No state.
    """

    def factor(name: str) -> float:
        return next((by for pattern, by in scales if re.search(pattern, name)), 1.0)

    def scale(updates: Any, params: Any) -> Arrays:
        return {name: update * factor(name) for name, update in updates.items()}

    return optax.stateless(scale)


def _distances(names: Iterable[str]) -> dict[str, int]:
    """By path, how many layers stand between it and the head."""
    depths = {name: _depth(name.split("/")) for name in names}
    last = 1 + max((depth for depth in depths.values() if depth is not None), default=0)
    return {name: 0 if depth is None else last - depth for name, depth in depths.items()}


def _depth(path: list[str]) -> int | None:
    """0 before the blocks, i + 1 in block i, None behind them."""
    if path[0] == "blocks":
        return int(path[1]) + 1
    return None if path[0] in LAST else 0


def ema_decay(decay: float, step: Any) -> Float[Array, ""]:
    """The average's decay at a step, which may be traced: min(decay, (1 + step) / (10 + step)).

    Early on, when the average still holds the initial weights, it forgets them fast.
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1 + step) / (10 + step))


def update_ema(ema: Arrays, params: Mapping[str, Array], decay: Any) -> Arrays:
    """decay * ema + (1 - decay) * params for the paths of `ema`; parameters at rest stay exact.

    Computed in float32, returned in the dtype of `ema`: keep it in float32, for in bfloat16 steps
    of a slow average round to nothing. decay: a number or a Float[Array, ""].
    """

    def blend(old: Array, new: Array) -> Array:
        wide = old.astype(jnp.float32)
        return (wide + (1 - decay) * (new.astype(jnp.float32) - wide)).astype(old.dtype)

    return {name: blend(old, params[name]) for name, old in ema.items()}
