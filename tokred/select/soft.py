"""Soft assignment: every token takes part in several outputs, by weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokred.maps import Mix
from tokred.ops.attention import NEGATIVE

OVER = ("tokens", "groups", "both", "none")


def soften(
    logits: Float[Array, "*B K N"],
    *,
    over: str = "tokens",
    rounds: int = 1,
    valid: Bool[Array, "*B N"] | None = None,
    allowed: Bool[Array, "*#B K N"] | None = None,
) -> Float[Array, "*B K N"]:
    """How much of each token each output takes, in float32; 0 of invalid and forbidden ones.

    over: 'tokens' a softmax per output: means of tokens · 'groups' a softmax per token: shares of
    it · 'both' by turns, `rounds` times, ending with the groups: Sinkhorn, with every output and
    every token to the same total · 'none' a sigmoid. allowed: which pairs may meet.
    Static: over, rounds. Gradient: to logits.

    Raises:
      ValueError: an unknown `over`, or less than one round.
    """
    if over not in OVER:
        raise ValueError(f"soften: over={over!r} must be one of {OVER}; change over.")
    if rounds < 1:
        raise ValueError(f"soften: rounds={rounds} must be at least 1; raise rounds.")
    pairs = None if valid is None else valid[..., None, :]
    if allowed is not None:
        pairs = allowed if pairs is None else allowed & pairs
    hide = lambda z, value: z if pairs is None else jnp.where(pairs, z, value)  # noqa: E731
    z = hide(logits.astype(jnp.float32), NEGATIVE)
    if over == "none":
        return hide(jax.nn.sigmoid(z), 0.0)
    for axis in {"tokens": (-1,), "groups": (-2,), "both": (-1, -2) * rounds}[over]:
        z = hide(jax.nn.log_softmax(z, axis=axis), NEGATIVE)
    return hide(jnp.exp(z), 0.0)


def beside_prefix(prefix: int, matrix: Float[Array, "*B K N"], back: Float[Array, "*B N K"]) -> Mix:
    """The map of `matrix`, which restores by `back`, behind tokens that stay what they are."""
    return Mix(_stacked(prefix, matrix), back=_stacked(prefix, back))


def share_out(
    weights: Float[Array, "*B K N"],
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Mix:
    """For the books: every token spreads a total of 1 over the outputs in proportion to what they
    take of it, and gets back as much of what they become. weights, valid: behind the prefix.

    Gradient: none.
    """
    weights = jax.lax.stop_gradient(weights)
    total = weights.sum(-2, keepdims=True)
    share = weights / jnp.where(total == 0, 1.0, total)
    share = share if valid is None else share * valid[..., None, :]
    return beside_prefix(prefix, share, jnp.swapaxes(share, -1, -2))


def _stacked(prefix: int, matrix: Float[Array, "*B K N"]) -> Array:
    """[[1, 0], [0, matrix]]."""
    lead = [(0, 0)] * (matrix.ndim - 2)
    front = jnp.eye(prefix, prefix + matrix.shape[-1], dtype=matrix.dtype)
    front = jnp.broadcast_to(front[*(None,) * len(lead)], (*matrix.shape[:-2], *front.shape))
    return jnp.concatenate([front, jnp.pad(matrix, (*lead, (0, 0), (prefix, 0)))], axis=-2)
