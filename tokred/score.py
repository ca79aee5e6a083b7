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


def unit_rows(metric: Float[Array, "*B N E"]) -> Float[Array, "*B N E"]:
    """Rows of length 1 in float32, for cosine similarity; zero rows stay zero."""
    metric = metric.astype(jnp.float32)
    square = jnp.square(metric).sum(-1, keepdims=True)
    return metric / jnp.sqrt(jnp.where(square == 0, 1.0, square))


def cosine(a: Float[Array, "*B N E"], b: Float[Array, "*B M E"]) -> Float[Array, "*B N M"]:
    """Cosine similarity of every pair of rows, float32."""
    return jnp.einsum("...ne,...me->...nm", unit_rows(a), unit_rows(b))
