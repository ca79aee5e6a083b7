"""The arrays that scores ask for, made from what a layer has at hand."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tokred.ops import attention_column_mean, attention_probs, attention_rows, gather
from tokred.ops.attention import per_query_head
from tokred.plan import Ask
from tokred.tokens import Tokens


@dataclass(frozen=True)
class Seen:
    """What evidence is made of: a layer's q, k, v [*B N H E], its input, its tokens, and where
    attention is masked, biased or capped, how."""

    q: Any
    k: Any
    v: Any
    input: Any
    tokens: Tokens
    scale: float | None = None
    mask: Any = None
    cap: float | None = None
    pair_bias: Any = None
    sink: bool = False

    def softmax_arguments(self) -> dict[str, Any]:
        """What the layer's attention is told, for `ops.attention_probs`."""
        tokens = self.tokens
        return {
            "mask": self.mask,
            "cap": self.cap,
            "pair_bias": self.pair_bias,
            "sink": self.sink,
            "bias": tokens.key_bias(),
            "valid": tokens.valid,
            "policy": tokens.policy,
            "policy_eps": tokens.policy_eps,
            "scale": self.scale,
        }


def provide(ask: Ask, seen: Seen) -> Array:
    """The evidence of `ask`, for the tokens of `seen`.

    Shapes: 'rows', 'column_mean' [*B N] (heads='all': [*B N H], rows only) · 'keys', 'values'
    [*B N E] or [*B N H E] · 'qkv' [*B N 3 H E] · 'input' [*B N D] · 'probs' [*B H N N].
    Gradient: flows; selections stop it.

    Raises:
      ValueError: rows that are not there, or single heads of a mean over queries.
    """
    makers = {
        "rows": _rows,
        "column_mean": _column_mean,
        "probs": lambda _, s: attention_probs(s.q, s.k, **s.softmax_arguments()),
        "keys": lambda a, s: _heads(s.k, a),
        "values": lambda a, s: _heads(s.v, a),
        "qkv": lambda _, s: _qkv(s),
        "input": lambda _, s: s.input,
        "hidden": lambda _, s: s.tokens.x,
    }
    return makers[ask.kind](ask, seen)


def _qkv(seen: Seen) -> Array:
    k, v = (per_query_head(x, seen.q, axis=-2) for x in (seen.k, seen.v))
    return jnp.stack([seen.q, k, v], axis=-3)


def _heads(x: Array, ask: Ask) -> Array:
    return x.mean(axis=-2) if ask.heads == "mean" else x


def _rows(ask: Ask, seen: Seen) -> Array:
    if ask.rows in seen.tokens.extra:
        return _mean_over(seen.tokens.extra[ask.rows] > 0, ask, seen)
    if ask.rows not in ("cls", "last"):
        raise ValueError(
            f"Ask: rows={ask.rows!r} must be 'cls', 'last' or the name of a mask in Tokens.extra "
            f"(present: {sorted(seen.tokens.extra)})."
        )
    n, batch = seen.tokens.n, seen.tokens.batch
    if ask.rows == "cls":
        row, own = jnp.zeros((*batch, 1), jnp.int32), jnp.zeros((1,), jnp.int32)
    else:
        row, own = seen.tokens.last_slot(), jnp.full((1,), n - 1)
        if seen.tokens.policy is not None:
            raise ValueError("Ask: rows='last' and a policy do not go together; use rows='cls'.")
    how, axis = seen.softmax_arguments(), len(batch)
    if seen.mask is not None:
        how["mask"] = gather(seen.mask, row, axis=axis)
    if seen.pair_bias is not None:
        how["pair_bias"] = jnp.take_along_axis(seen.pair_bias, row[..., None, :, None], axis=-2)
    rows = attention_rows(gather(seen.q, row, axis=axis), seen.k, own=own, **how)  # [*B H 1 N]
    rows = rows.reshape(*batch, rows.shape[-3], n)
    return rows.mean(axis=-2) if ask.heads == "mean" else jnp.swapaxes(rows, -1, -2)


def _column_mean(ask: Ask, seen: Seen) -> Array:
    return _mean_over(None, ask, seen)


def _mean_over(mask: Array | None, ask: Ask, seen: Seen) -> Array:
    """Attention received from the valid queries of `mask`."""
    if ask.heads != "mean":
        raise ValueError(
            f"Ask: heads={ask.heads!r} of {ask.name!r}, a mean over queries, is not kept; "
            "use heads='mean'."
        )
    valid = seen.tokens.valid
    chosen = mask if valid is None else valid if mask is None else mask & valid
    return attention_column_mean(seen.q, seen.k, query_valid=chosen, **seen.softmax_arguments())
