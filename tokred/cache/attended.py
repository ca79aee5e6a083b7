"""What cache entries are worth by the attention that they get: Float[*B G T], higher = keep.

Probabilities [*B H Q T] are those of some queries, all heads; the heads of a group, which share a
key head, lie side by side and are averaged. Entries that must stay have +inf.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from tokred.cache.scores import KEEP
from tokred.ops.gather import aligned
from tokred.rotary import turn
from tokred.score import score_by_norm

POOLS = ("mean", "max")


def group_heads(scores: Float[Array, "*B H T"], groups: int) -> Float[Array, "*B G T"]:
    """The mean over the query heads of each of `groups` key heads."""
    *batch, heads, t = scores.shape
    return scores.reshape(*batch, groups, heads // groups, t).mean(-2)


def pool_scores(
    scores: Float[Array, "*B T"], width: int, how: str = "mean"
) -> Float[Array, "*B T"]:
    """Each score with its neighbours: mean or max over `width` (odd, static) entries; those beyond
    the ends count as 0.

    Raises ValueError for an even width or an unknown `how`.
    """
    if width % 2 == 0 or how not in POOLS:
        raise ValueError(
            f"pool_scores: width={width} must be odd and how={how!r} one of {POOLS}; change them."
        )
    reach = width // 2
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(reach, reach)])
    near = jnp.stack([padded[..., i : i + scores.shape[-1]] for i in range(width)])
    return near.mean(0) if how == "mean" else near.max(0)


def score_by_window(
    probs: Float[Array, "*B H W T"],
    groups: int,
    protected: Bool[Array, "*B T"],
    *,
    kernel: int = 5,
    pool: str = "mean",
) -> Float[Array, "*B G T"]:
    """SnapKV (Li et al. 2024): attention of the last queries, smoothed over neighbours.

    protected: the entries of those queries, which stay and lend their neighbours nothing. Static:
    groups, kernel, pool. Source: NVIDIA/kvpress; the authors' code sums where this takes means, and
    has a cache of its own for each query head, which groups = H reproduces.
    """
    received = jnp.where(protected[..., None, :], 0.0, probs.astype(jnp.float32).mean(-2))
    scores = group_heads(pool_scores(received, kernel, pool), groups)
    return jnp.where(protected[..., None, :], KEEP, scores)


def score_by_last(
    probs: Float[Array, "*B H T"], groups: int, newest: Bool[Array, "*B T"] | None = None
) -> Float[Array, "*B G T"]:
    """TOVA (Oren et al. 2024): attention of the last query, mean over all heads, for every key head
    the same. newest: the last entry, to protect it as NVIDIA/kvpress does and the authors do not.
    """
    scores = jnp.repeat(group_heads(probs.astype(jnp.float32), 1), groups, axis=-2)
    return scores if newest is None else jnp.where(newest[..., None, :], KEEP, scores)


def score_by_received(
    total: Float[Array, "*B H T"], viewers: Num[Array, "*#B T"], groups: int
) -> Float[Array, "*B G T"]:
    """Attention received from all queries, as a mean over those that can see the entry
    (kvpress's observed attention, an H2O whose early entries have no advantage).

    total: column sums; viewers: how many queries saw each entry.
    """
    return group_heads(total.astype(jnp.float32), groups) / jnp.maximum(viewers, 1)[..., None, :]


def query_statistics(
    q: Float[Array, "*B N H E"], weight: Float[Array, "*B N"]
) -> tuple[Float[Array, "*B H E"], Float[Array, "*B H E E"]]:
    """(mean, covariance) of the queries that have weight 1, before their rotation."""
    share = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1)
    q = q.astype(jnp.float32)
    mean = jnp.einsum("...nhe,...n->...he", q, share)
    centred = q - mean[..., None, :, :]
    return mean, jnp.einsum("...nhe,...nhf,...n->...hef", centred, centred, share)


def expect_queries(
    mean: Float[Array, "*B H E"],
    covariance: Float[Array, "*B H E E"],
    start: Num[Array, "*B"],
    rates: Float[Array, " half"],
    *,
    future: int = 512,
) -> tuple[Float[Array, "*B H E"], Float[Array, "*B H E E"]]:
    """The same of queries at the next `future` (static) positions from `start` on: turned by the
    mean of their rotations, which is no rotation itself and shrinks quick channels."""
    angle = (start[..., None] + aligned(jnp.arange(future), start.ndim + 1, start.ndim))[..., None]
    angle = angle * aligned(rates, angle.ndim, angle.ndim - 1)
    cos, sin = jnp.cos(angle).mean(-2), jnp.sin(angle).mean(-2)  # [*B half]
    ahead = lambda x: turn(x, cos[..., None, None, :], sin[..., None, None, :])  # noqa: E731
    turned = ahead(jnp.swapaxes(ahead(covariance), -1, -2))
    return turn(mean, cos[..., None, :], sin[..., None, :]), jnp.swapaxes(turned, -1, -2)


def score_by_expectation(
    k: Float[Array, "*B G T E"],
    v: Float[Array, "*B G T E"],
    mean: Float[Array, "*B H E"],
    covariance: Float[Array, "*B H E E"] | None,
    *,
    protected: Bool[Array, "*B T"],
    valid: Bool[Array, "*B T"] | None = None,
    norms: bool = True,
    epsilon: float = 0.0,
) -> Float[Array, "*B G T"]:
    """ExpectedAttention (Devoto et al. 2025): the attention that queries of a Gaussian will give.

    exp(k.mean / sqrt(E) + k'Ck / 2E) as a share of the unprotected entries, mean over the group,
    times the value's norm (norms). mean, covariance (None: without): of `expect_queries`.
    protected: the sinks. Source: NVIDIA/kvpress.
    """
    groups, width = k.shape[-3], k.shape[-1]
    split = lambda x: x.reshape(*x.shape[: k.ndim - 3], groups, -1, *x.shape[k.ndim - 2 :])  # noqa: E731
    k = k.astype(jnp.float32)
    logits = jnp.einsum("...gte,...gre->...grt", k, split(mean)) * width**-0.5
    if covariance is not None:
        spread = jnp.einsum("...gte,...gref,...gtf->...grt", k, split(covariance), k)
        logits = logits + spread / (2 * width)
    open_ = ~protected if valid is None else valid & ~protected
    open_ = open_[..., None, None, :]
    scores = jax.nn.softmax(jnp.where(open_, logits, -jnp.inf), axis=-1).mean(-2)
    if norms:
        scores = (scores + epsilon) * score_by_norm(v)
    return jnp.where(protected[..., None, :], KEEP, scores)
