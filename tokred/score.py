"""Scores: pure functions from tokens and evidence to Float[*B N], higher = keep.

Every score is float32 and NaN-safe; `mask_scores` gives invalid tokens -inf.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def mask_scores(
    scores: Float[Array, "*B N"], valid: Bool[Array, "*B N"] | None = None
) -> Float[Array, "*B N"]:
    """Float32, invalid tokens at -inf, NaN and valid -inf at the lowest finite number, before them.

    Gradient: none, a choice has none.
    """
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(jnp.isnan(scores), lowest, jnp.maximum(scores, lowest))
    return scores if valid is None else jnp.where(valid, scores, -jnp.inf)


def score_by_norm(x: Float[Array, "*B N D"]) -> Float[Array, "*B N"]:
    """The Euclidean norm of each token's features."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def score_by_chance(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "*B N"]:
    """Uniform draws, the random baseline. A row's draws do not depend on how many tokens follow."""
    *batch, n = shape
    rows = jax.random.split(key, math.prod(batch))
    return jax.vmap(lambda row: jax.random.uniform(row, (n,)))(rows).reshape(shape)


def score_by_class_value(
    rows: Float[Array, "*B N H"], values: Float[Array, "*B N H E"], *, joint: bool = True
) -> Float[Array, "*B N"]:
    """What a token gives the class token: its attention times the length of its value.

    rows: the class token's attention, of all heads. joint: attention summed over heads times the
    length of all heads' values as one vector; else the sum of each head's product. Static: joint.
    """
    square = jnp.square(values.astype(jnp.float32)).sum(-1)  # [*B N H]
    rows = rows.astype(jnp.float32)
    if joint:
        return rows.sum(-1) * jnp.sqrt(square.sum(-1))
    return (rows * jnp.sqrt(square)).sum(-1)


def score_by_normalised_cut(
    features: Float[Array, "*B N E"],
    *,
    tau: float = 0.2,
    eps: float = 1e-5,
    weighted: bool = False,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Float[Array, "*B N"]:
    """TokenCut: the second smallest eigenvector v of (D - W) v = l D v, turned so that its largest
    entry by magnitude lies above the mean; v' D v = 1.

    W joins the valid tokens behind the prefix: 1 where their cosine exceeds `tau`, `eps`
    elsewhere; weighted: the cosine itself from `tau` on. D: its row sums. All others have 0.
    Costs O(N^3), in float32. Gradient: none, a choice has none.
    Source: Wang et al. 2022, YangtaoWANG95/TokenCut `ncut`.
    """
    free = jnp.broadcast_to(jnp.arange(features.shape[-2]) >= prefix, features.shape[:-1])
    free = free if valid is None else free & valid
    features = jnp.where(free[..., None], jax.lax.stop_gradient(features), 0)
    similar = cosine(features, features)
    if weighted:
        edge = jnp.where(similar < tau, eps, similar)
    else:
        edge = jnp.where(similar > tau, 1.0, eps)
    return _turned(_second_eigenvector(edge, free), free)


def _second_eigenvector(
    edge: Float[Array, "*B N N"], free: Bool[Array, "*B N"]
) -> Float[Array, "*B N"]:
    """Of the normalised cut of the free tokens, by the symmetric D^-1/2 W D^-1/2.

    Its first eigenvector, D^1/2 1, is known, and near the second one where the parts hardly touch:
    taken below the others, it cannot mix with it in float32. So is what is not free.
    """
    edge = jnp.where(free[..., :, None] & free[..., None, :], edge, 0.0)
    degree = edge.sum(-1)
    root = jnp.where(free, jax.lax.rsqrt(jnp.where(free, degree, 1.0)), 0.0)
    first = jnp.sqrt(degree / jnp.maximum(degree.sum(-1, keepdims=True), 1e-30))
    own = jnp.eye(edge.shape[-1]).reshape((1,) * (edge.ndim - 2) + edge.shape[-2:])
    below = first[..., :, None] * first[..., None, :] + own * ~free[..., None]
    normal = edge * root[..., :, None] * root[..., None, :] - 2.0 * below
    return root * jnp.linalg.eigh(normal)[1][..., -1]


def _turned(v: Float[Array, "*B N"], free: Bool[Array, "*B N"]) -> Float[Array, "*B N"]:
    """v or -v."""
    mean = (v * free).sum(-1, keepdims=True) / jnp.maximum(free.sum(-1, keepdims=True), 1)
    seed = jnp.argmax(jnp.where(free, jnp.abs(v), -1.0), axis=-1, keepdims=True)
    return jnp.where(jnp.take_along_axis(v, seed, axis=-1) > mean, v, -v)


def unit_rows(metric: Float[Array, "*B N E"]) -> Float[Array, "*B N E"]:
    """Rows of length 1 in float32, for cosine similarity; zero rows stay zero."""
    metric = metric.astype(jnp.float32)
    square = jnp.square(metric).sum(-1, keepdims=True)
    return metric / jnp.sqrt(jnp.where(square == 0, 1.0, square))


def cosine(a: Float[Array, "*B N E"], b: Float[Array, "*B M E"]) -> Float[Array, "*B N M"]:
    """Cosine similarity of every pair of rows, float32."""
    return jnp.einsum("...ne,...me->...nm", unit_rows(a), unit_rows(b))


def score_by_received(
    probs: Float[Array, "*B H N M"], valid: Bool[Array, "*B N"] | None = None
) -> Float[Array, "*B M"]:
    """Attention that each key receives: the mean over heads and valid queries."""
    probs = jax.lax.stop_gradient(probs)
    if valid is None:
        return probs.mean((-3, -2))
    weight = valid / jnp.maximum(valid.sum(-1, keepdims=True), 1)
    return jnp.einsum("...nm,...n->...m", probs.mean(-3), weight)


def score_by_energy(
    similar: Float[Array, "*B N N"],
    *,
    margin: float,
    alpha: float = 1.0,
    kernel: str = "elu",
    valid: Bool[Array, "*B N"] | None = None,
) -> Float[Array, "*B N"]:
    """Minus PiToMe's energy, the mean of a kernel of each token's cosine similarity to all: lowest
    for tokens in a large cluster.

    kernel: 'elu' of what exceeds `margin`, -`alpha` at least · 'gaussian' of 1 - similarity, with
    the width 1 - `margin`. Static: margin, alpha, kernel.
    """
    similar = jax.lax.stop_gradient(similar)
    if kernel == "gaussian":
        near = jnp.exp(-jnp.square((1 - similar) / (1 - margin)) / 2)
    else:
        near = jax.nn.elu(similar - margin, alpha)
    if valid is None:
        return -near.mean(-1)
    near = jnp.where(valid[..., None, :], near, 0.0)
    return -near.sum(-1) / jnp.maximum(valid.sum(-1, keepdims=True), 1)


def score_by_pagerank(
    probs: Float[Array, "*B H N N"],
    iterations: int,
    valid: Bool[Array, "*B N"] | None = None,
) -> Float[Array, "*B H N"]:
    """Weighted PageRank of each head's attention graph: in every iteration tokens hand all they
    have to those that they attend to. It starts equal and always sums to 1. Static: iterations.
    """
    probs = jax.lax.stop_gradient(probs)
    alive = jnp.ones((*probs.shape[:-3], probs.shape[-1]), bool) if valid is None else valid
    start = alive / jnp.maximum(alive.sum(-1, keepdims=True), 1)
    start = jnp.broadcast_to(start[..., None, :].astype(probs.dtype), probs.shape[:-1])
    hand_on = lambda _, rank: jnp.einsum("...nm,...n->...m", probs, rank)  # noqa: E731
    return jax.lax.fori_loop(0, iterations, hand_on, start)


def rms_of_telling_heads(
    ranks: Float[Array, "*B H N"],
    low: float,
    high: float,
    valid: Bool[Array, "*B N"] | None = None,
) -> Float[Array, "*B N"]:
    """The root mean square of `ranks` over the heads that tell tokens apart, but not a few alone:
    their variance over the valid tokens, at a mean of 1, lies in [low, high]. Over all heads if
    none does."""
    alive = jnp.ones((*ranks.shape[:-2], ranks.shape[-1]), bool) if valid is None else valid
    alive = alive[..., None, :]
    count = jnp.maximum(alive.sum(-1, keepdims=True), 1)
    variance = jnp.where(alive, jnp.square(ranks * count - 1), 0.0).sum(-1) / count[..., 0]
    kept = (variance >= low) & (variance <= high)
    kept = kept | ~kept.any(-1, keepdims=True)
    square = jnp.where(kept[..., None], jnp.square(ranks), 0.0).sum(-2)
    return jnp.sqrt(square / kept.sum(-1, keepdims=True))
