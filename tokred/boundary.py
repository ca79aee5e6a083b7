"""Segments of a sequence: where they begin, which tokens they hold, and the way back to all.

A mask `starts` [*B N] says which tokens begin one; a segment lasts to the next start. Of each token
these functions look at what lies before it alone, so that what is built on them can be causal. A
second coordinate of positions is the document, see `ops.position_mask`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Keep
from tokred.ops import gather
from tokred.ops.gather import aligned
from tokred.score import unit_rows
from tokred.tokens import Tokens


def previous_slots(
    shape: tuple[int, ...], valid: Bool[Array, "*B N"] | None = None
) -> Int[Array, "*B N"]:
    """The slot of the valid token before each, in arrays of `shape` [*B N]; -1 = there is none."""
    ones = jnp.ones(shape, bool) if valid is None else valid
    return jnp.concatenate([jnp.full((*shape[:-1], 1), -1), latest(ones)[..., :-1]], axis=-1)


def at_previous(x: Array, previous: Int[Array, "*B N"]) -> Array:
    """What `x` [*B N ...] is at the tokens `previous`, 0 where there is none."""
    axis = previous.ndim - 1
    before = gather(x, jnp.maximum(previous, 0), axis=axis)
    return jnp.where(aligned(previous, x.ndim, axis) >= 0, before, jnp.zeros_like(before))


def latest(starts: Bool[Array, "*B N"]) -> Int[Array, "*B N"]:
    """The slot of the last start up to each token; -1 = there is none."""
    axis = starts.ndim - 1
    slots = jax.lax.broadcasted_iota(jnp.int32, starts.shape, axis)
    return jax.lax.cummax(jnp.where(starts, slots, -1), axis=axis)


def find_first(tokens: Tokens, previous: Int[Array, "*B N"]) -> Bool[Array, "*B N"]:
    """Which tokens begin a sequence, or a document in it."""
    first = previous < 0
    if tokens.position is not None and tokens.position.shape[-1] > 1:
        document = tokens.position[..., 1:]
        document = jnp.broadcast_to(document, (*first.shape, document.shape[-1]))
        before = gather(document, jnp.maximum(previous, 0), axis=first.ndim - 1)
        first |= (document != before).any(-1)
    return first if tokens.valid is None else first & tokens.valid


def places(
    first: Bool[Array, "*B N"], valid: Bool[Array, "*B N"] | None = None
) -> Int[Array, "*B N"]:
    """How many valid tokens of its sequence, or document, lie before each."""
    ones = jnp.ones(first.shape, jnp.int32) if valid is None else valid.astype(jnp.int32)
    rank = jnp.cumsum(ones, axis=-1) - 1
    return rank - jax.lax.cummax(jnp.where(first, rank, 0), axis=rank.ndim - 1)


def segments(starts: Bool[Array, "*B N"]) -> Int[Array, "*B N"]:
    """The number of each token's segment, from 0; -1 before the first start."""
    return jnp.cumsum(starts.astype(jnp.int32), axis=-1) - 1


def limit_starts(
    starts: Bool[Array, "*B N"], k: Int[Array, "*B"] | int
) -> tuple[Bool[Array, "*B N"], Int[Array, "*B"]]:
    """(the first `k` starts, how many are too many): the last segment grows instead."""
    k = jnp.broadcast_to(k, starts.shape[:-1])
    overflow = jnp.maximum(starts.sum(-1) - k, 0)
    return starts & (segments(starts) < k[..., None]), overflow


def start_slots(starts: Bool[Array, "*B N"], k: int) -> Int[Array, "*B k"]:
    """The slots of the first `k` starts in order, then N. Static: k."""
    n = starts.shape[-1]
    slots = jax.lax.broadcasted_iota(jnp.int32, starts.shape, starts.ndim - 1)
    found = jnp.sort(jnp.where(starts, slots, n), axis=-1)[..., :k]
    more = max(k - n, 0)
    return jnp.pad(found, [(0, 0)] * (found.ndim - 1) + [(0, more)], constant_values=n)


def keep_starts(starts: Bool[Array, "*B N"], k: int) -> Keep:
    """The tokens that begin the first `k` segments, in order. Static: k."""
    n, slots = starts.shape[-1], start_slots(starts, k)
    return Keep(jnp.minimum(slots, n - 1), n, slots < n)


def boundary_chance(
    query: Float[Array, "*B N D"],
    key: Float[Array, "*B N D"],
    previous: Int[Array, "*B N"],
    first: Bool[Array, "*B N"],
) -> Float[Array, "*B N"]:
    """How unlike each token's key is to the query of the one before it: (1 - cosine) / 2, and 1 for
    the first. Float32. Gradient: to query and key."""
    before = at_previous(unit_rows(query), previous)
    chance = (1.0 - (before * unit_rows(key)).sum(-1)) / 2.0
    return jnp.where(first, 1.0, jnp.clip(chance, 0.0, 1.0))


def ratio_loss(
    starts: Bool[Array, "*B N"],
    chance: Float[Array, "*B N"],
    length: float,
    valid: Bool[Array, "*B N"] | None = None,
) -> Float[Array, ""]:
    """1 where a `length`-th of the tokens begin a segment, and are as likely to, more elsewhere.

    length / (length - 1) * ((length - 1) F G + (1 - F) (1 - G)) with F the share of starts and G
    their mean chance, over all valid tokens. Gradient: to chance.

    Raises:
      ValueError: a length of 1 or less.
    """
    if length <= 1:
        raise ValueError(f"ratio_loss: length={length} must be above 1; raise length.")
    ones = jnp.ones(chance.shape) if valid is None else valid.astype(jnp.float32)
    mean = lambda a: (a * ones).sum() / jnp.maximum(ones.sum(), 1.0)  # noqa: E731
    began, likely = jax.lax.stop_gradient(mean(starts.astype(jnp.float32))), mean(chance)
    total = (length - 1) * began * likely + (1 - began) * (1 - likely)
    return length / (length - 1) * total


def moving_average(
    x: Float[Array, "*B K D"],
    weight: Float[Array, "*B K"],
    fresh: Bool[Array, "*B K"] | None = None,
) -> Float[Array, "*B K D"]:
    """y_k = w_k x_k + (1 - w_k) y_(k-1) from y_(-1) = 0, in float32, by an associative scan.

    fresh: where what came before counts for nothing. Gradient: to x and weight.
    """
    weight = weight.astype(jnp.float32)[..., None]
    decay = 1.0 - weight
    if fresh is not None:
        decay = jnp.where(fresh[..., None], 0.0, decay)

    def chain(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] * b[0], a[1] * b[0] + b[1]

    pair = decay, weight * x.astype(jnp.float32)
    return jax.lax.associative_scan(chain, pair, axis=x.ndim - 2)[1]
