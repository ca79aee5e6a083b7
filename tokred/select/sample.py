"""Adaptive sampling: a distribution over tokens, and those that its quantiles fall on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Keep
from tokred.ops import gather, top_k
from tokred.select.keep import keep_where
from tokred.select.rows import check_range, leading_row


def as_shares(
    scores: Float[Array, "*B N"],
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
    eps: float = 0.0,
) -> Float[Array, "*B N"]:
    """Scores over their sum plus `eps`, in float32, of the valid tokens behind the prefix; 0 for
    all others, and for scores that are negative or NaN. Gradient: none, a choice has none."""
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    counts = _behind(prefix, scores, valid) & (scores > 0)
    scores = jnp.where(counts, scores, 0.0)
    total = scores.sum(-1, keepdims=True) + eps
    return scores / jnp.where(total == 0, 1.0, total)


def nearest_quantiles(
    shares: Float[Array, "*B N"],
    quantiles: tuple[float, ...],
    *,
    valid: Bool[Array, "*B N"] | None = None,
    stretch: bool = False,
    empty_counts: bool = False,
) -> Int[Array, "*B Q"]:
    """The valid token whose cumulated share, in the order given, is nearest to each quantile.

    stretch: cumulated shares are brought to [0, 1] from the lowest to the highest, and quantiles to
    [lowest that is not 0, 1], so that the first token is never met. empty_counts: then the lowest
    is that of all slots; behind an invalid one, whose share is 0, no token is at 0. Static:
    quantiles, stretch, empty_counts.
    """
    reached = jnp.cumsum(shares, axis=-1)
    here = jnp.ones(shares.shape, bool) if valid is None else valid
    at = leading_row(jnp.asarray(quantiles, jnp.float32), shares.ndim)
    if stretch:
        low = jnp.where(here | empty_counts, reached, jnp.inf).min(-1, keepdims=True)
        span = reached.max(-1, keepdims=True) - low
        reached = (reached - low) / jnp.where(span > 0, span, 1.0)
        start = jnp.where(here & (reached > 0), reached, 1.0).min(-1, keepdims=True)
        at = start + at * (1.0 - start)
    gap = jnp.abs(at[..., :, None] - reached[..., None, :])
    return jnp.argmin(jnp.where(here[..., None, :], gap, jnp.inf), axis=-1).astype(jnp.int32)


def keep_quantiles(
    shares: Float[Array, "*B N"],
    quantiles: tuple[float, ...],
    k: int,
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
    ascending: bool = True,
    empty_counts: bool = False,
) -> tuple[Keep, Int[Array, "*B"]]:
    """The prefix and the tokens that `quantiles` fall on, each once, in k slots: (map, overflow
    [*B]).

    ascending: tokens are ordered by share, the lowest first, and cumulated shares stretched, see
    `nearest_quantiles`; else they keep their order and cumulated shares are what they are. The
    tokens kept come in that order. Of more than k the highest shares fit; overflow counts the
    others.
    """
    n = shares.shape[-1]
    check_range("keep_quantiles", "k", k, 1, n - prefix)
    alive = jnp.ones(shares.shape, bool) if valid is None else valid
    order = Keep(_order(shares, alive, prefix, ascending), n)
    shares, alive = order.apply((shares, alive))
    how = {"stretch": ascending, "empty_counts": empty_counts}
    met = nearest_quantiles(shares[..., prefix:], quantiles, valid=alive[..., prefix:], **how)
    slot = leading_row(jnp.arange(prefix, n), met.ndim + 1)
    chosen = (met[..., None] + prefix == slot).any(-2)
    front = jnp.ones((*chosen.shape[:-1], prefix), bool)
    chosen = jnp.concatenate([front, chosen], axis=-1)
    rank = jnp.where(_behind(prefix, shares, None), shares, jnp.inf)
    kept, overflow = keep_where(chosen, prefix + k, scores=rank, valid=alive)
    return Keep(gather(order.index, kept.index, axis=met.ndim - 1), n, kept.valid), overflow


def _behind(prefix: int, like: Array, valid: Array | None) -> Bool[Array, "*B N"]:
    """Which tokens are valid and not protected."""
    free = jnp.broadcast_to(jnp.arange(like.shape[-1]) >= prefix, like.shape)
    return free if valid is None else free & valid


def _order(shares: Array, alive: Array, prefix: int, ascending: bool) -> Int[Array, "*B N"]:
    """The prefix; then, ascending, what is invalid and tokens from the lowest share on."""
    if not ascending:
        return jnp.broadcast_to(jnp.arange(shares.shape[-1], dtype=jnp.int32), shares.shape)
    low = jnp.where(_behind(prefix, shares, None), jnp.where(alive, shares, -1.0), -2.0)
    return top_k(-low, low.shape[-1])[1]
