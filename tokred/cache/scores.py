"""What cache entries are worth by their keys, values and places alone: Float[*B T], higher = keep.

Keys and values are [*B T E] with a leading axis of key heads; everything is computed in float32.
Entries that must stay have +inf. valid: which slots hold an entry; the valid ones come first, in
their order. Empty slots have any finite score: selections take `valid` themselves. Facts are those
of NVIDIA/kvpress (Apache-2.0), whose presses bear the names in brackets.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokred.ops.gather import aligned
from tokred.score import cosine, score_by_norm, unit_rows

KEEP = jnp.inf


def _live(x: Array, valid: Array | None) -> Bool[Array, "*B T"]:
    return jnp.ones(x.shape[:-1], bool) if valid is None else valid


def _first(n: int, ndim: int, count: int) -> Array:
    return aligned(jnp.arange(n) < count, ndim, ndim - 1)


def score_by_key_norm(k: Float[Array, "*B T E"]) -> Float[Array, "*B T"]:
    """Short keys stay (Knorm; Devoto et al. 2024): they tend to be looked at most."""
    return -score_by_norm(k)


def score_by_key_difference(
    k: Float[Array, "*B T E"], *, valid: Bool[Array, "*B T"] | None = None
) -> Float[Array, "*B T"]:
    """Keys unlike the mean direction of all stay (KeyDiff; Park et al. 2025)."""
    live = _live(k, valid)[..., None]
    mean = (unit_rows(k) * live).sum(-2, keepdims=True) / jnp.maximum(
        live.sum(-2, keepdims=True), 1
    )
    return -cosine(k, mean)[..., 0]


def score_by_leverage(
    k: Float[Array, "*B T E"],
    v: Float[Array, "*B T E"],
    *,
    window: int = 16,
    sinks: int = 4,
    valid: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """|k|^2 |v|^2, both as shares of their window's sum (CUR; CurDKV 2025); the sinks stay.

    Static: window, in entries; sinks.
    """
    live = _live(k, valid)
    t = k.shape[-2]
    padding = [(0, 0)] * (k.ndim - 2) + [(0, -t % window)]

    def share(x: Array) -> Array:
        power = jnp.square(x.astype(jnp.float32)).sum(-1) * live
        cut = jnp.pad(power, padding).reshape(*power.shape[:-1], -1, window)
        cut = cut / jnp.maximum(cut.sum(-1, keepdims=True), 1e-30)
        return cut.reshape(*power.shape[:-1], -1)[..., :t]

    product = share(k) * share(v)
    scores = product / jnp.maximum(product.sum(-1, keepdims=True), 1e-30)
    return jnp.where(_first(t, scores.ndim, sinks), KEEP, scores)


def score_by_lag(
    k: Float[Array, "*B T E"],
    v: Float[Array, "*B T E"],
    *,
    lag: int = 128,
    sinks: int = 4,
    cross: bool = False,
    valid: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """How unlike its successors an entry is (LagKV; Liang et al. 2025).

    Behind the sinks, every `lag` entries are scaled per channel by the range of the next `lag`;
    the deviation over channels, as a softmax within the `lag`, mean over keys and values. cross:
    those numbers themselves, comparable between parts; else ranks within a part, divided by lag.
    Sinks stay, and so do entries without `lag` successors in full; where that is all of them, the
    latest. Static: lag, sinks, cross.
    """
    t = k.shape[-2]
    parts = max(0, (t - sinks) // lag - 1)
    valid = jnp.ones(k.shape[:-1], bool) if valid is None else valid
    count = valid.sum(-1, keepdims=True)
    behind = jnp.broadcast_to(jnp.arange(t) - sinks, valid.shape)
    late = jnp.where(behind < 0, KEEP, behind / jnp.maximum(count - sinks, 1))
    if not parts:
        return late
    body = (_deviation(k, parts, lag, sinks) + _deviation(v, parts, lag, sinks)) / 2
    if not cross:
        body = jnp.argsort(jnp.argsort(body, axis=-1), axis=-1).astype(jnp.float32) / lag
    body = body.reshape(*body.shape[:-2], parts * lag)
    last = sinks + lag * (2 + jnp.arange(parts * lag) // lag)
    body = jnp.where(aligned(last, body.ndim, body.ndim - 1) <= count, body, KEEP)
    scores = jnp.full(k.shape[:-1], KEEP).at[..., sinks : sinks + parts * lag].set(body)
    return jnp.where(count < sinks + 2 * lag, late, scores)


def _deviation(x: Array, parts: int, lag: int, sinks: int) -> Float[Array, "*B P lag"]:
    cut = x[..., sinks : sinks + (parts + 1) * lag, :].astype(jnp.float32)
    cut = cut.reshape(*x.shape[:-2], parts + 1, lag, x.shape[-1])
    low, high = cut.min(-2, keepdims=True)[..., 1:, :, :], cut.max(-2, keepdims=True)[..., 1:, :, :]
    span = jnp.where(high > low, high - low, 1.0)
    return jax.nn.softmax(((cut[..., :-1, :, :] - low) / span).std(-1, ddof=1), axis=-1)


def score_by_place(position: Float[Array, "*B T"], *, sinks: int = 4) -> Float[Array, "*B T"]:
    """The first `sinks` positions stay, then the latest (StreamingLLM; Xiao et al. 2023)."""
    return jnp.where((position >= 0) & (position < sinks), KEEP, position.astype(jnp.float32))
