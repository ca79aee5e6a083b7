"""Attention of queries to other tokens, with as few projections as a connector has, and the blocks
that connectors make of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.nn.chain import Chain, NormedGate, as_input
from tokred.ops import attention, attention_probs
from tokred.ops.attention import key_bias

PROJECTIONS = ("all", "bare", "pairs", "none")
SOFTMAX = ("keys", "slots")


class CrossAttention(nnx.Module):
    """Queries [*B K D] look at keys and values [*B N C].

    projections: 'all' of q, k, v and the output, with biases · 'bare' without · 'pairs' q and k
    alone, values are what they are · 'none'. inner: width of all heads together, default `width`.
    scale: None for E^-0.5. softmax: over 'keys', or over 'slots', the queries, after which each
    query takes the mean by its weights (slot attention). qk_norm: a LayerNorm over the channels of
    a head, shared by all heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        keys: int | None = None,
        inner: int | None = None,
        projections: str = "all",
        softmax: str = "keys",
        scale: float | None = None,
        qk_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        keys, inner = keys or width, inner or width
        if inner % heads:
            raise ValueError(
                f"CrossAttention: heads={heads} must divide the width {inner}; change heads."
            )
        self.heads, self.softmax, self.scale = heads, softmax, scale
        linear = lambda a, b: nnx.Linear(  # noqa: E731
            a, b, use_bias=projections != "bare", promote_dtype=as_input, rngs=rngs
        )
        pairs, all_ = projections != "none", projections in ("all", "bare")
        self.query = linear(width, inner) if pairs else None
        self.key = linear(keys, inner) if pairs else None
        self.value = linear(keys, inner) if all_ else None
        self.out = linear(inner, width) if all_ else None
        norm = lambda: nnx.LayerNorm(inner // heads, epsilon=1e-5, rngs=rngs)  # noqa: E731
        self.query_norm, self.key_norm = (norm(), norm()) if qk_norm else (None, None)

    def __call__(
        self,
        x: Float[Array, "*B K D"],
        keys: Float[Array, "*B N C"],
        values: Float[Array, "*B N C"] | None = None,
        *,
        valid: Bool[Array, "*B N"] | None = None,
        mask: Bool[Array, "*#B K N"] | None = None,
    ) -> Float[Array, "*B K D"]:
        """values: None for the keys. Gradient: to all of them."""
        v = self._split(self.value, keys if values is None else values)
        q, k = self._pair(x, keys)
        if self.softmax == "keys" and k.shape[-1] == v.shape[-1]:  # as fused kernels want it
            y = attention(q, k, v, valid=valid, mask=mask, scale=self.scale)
        else:
            y = jnp.einsum("...hkn,...nhe->...khe", self.weights(x, keys, valid, mask), v)
        y = y.reshape(*y.shape[:-2], -1).astype(x.dtype)
        return y if self.out is None else self.out(y)

    def weights(
        self,
        x: Float[Array, "*B K D"],
        keys: Float[Array, "*B N C"],
        valid: Bool[Array, "*B N"] | None = None,
        mask: Bool[Array, "*#B K N"] | None = None,
    ) -> Float[Array, "*B H K N"]:
        """What each query takes of each value, in float32."""
        q, k = self._pair(x, keys)
        if self.softmax == "keys":
            return attention_probs(q, k, valid=valid, mask=mask, scale=self.scale)
        logits = jnp.einsum("...khe,...nhe->...hkn", q, k, preferred_element_type=jnp.float32)
        logits = logits * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        share = jax.nn.softmax(logits, axis=-2)
        hidden = key_bias(None, valid)
        share = share if hidden is None else share * (hidden[..., None, None, :] == 0)
        return share / jnp.maximum(share.sum(-1, keepdims=True), 1e-8)

    def _pair(self, x: Array, keys: Array) -> tuple[Array, Array]:
        q, k = self._split(self.query, x), self._split(self.key, keys)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q).astype(q.dtype), self.key_norm(k).astype(k.dtype)
        return q, k

    def _split(self, linear: Any, x: Array) -> Array:
        y = x if linear is None else linear(x)
        return y.reshape(*y.shape[:-1], self.heads, -1)


class Looked(NamedTuple):
    """Queries after a block, and what it took of each key [*B H K N]."""

    x: Array
    weights: Array


class PreBlock(nnx.Module):
    """x + attention(norm x, norm keys), then x + feed(norm x).

    with_queries: the keys are followed by the normalised queries (Perceiver). residual: 'raw', or
    'normed', which adds the update to the normalised queries (DocCompressor). feed: a `Chain`, or
    'gated' for a `NormedGate`. Other arguments: of `CrossAttention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        feed: str = "norm bare relu bare",
        with_queries: bool = False,
        residual: str = "raw",
        eps: float = 1e-5,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        self.with_queries, self.normed = with_queries, residual == "normed"
        keys = attention.get("keys") or width
        self.norm, self.norm_keys = (
            nnx.LayerNorm(n, epsilon=eps, rngs=rngs) for n in (width, keys)
        )
        self.attention = CrossAttention(width, heads, rngs=rngs, **attention)
        self.norm2 = nnx.LayerNorm(width, epsilon=eps, rngs=rngs) if feed == "gated" else None
        self.feed = (
            NormedGate(width, hidden, rngs=rngs)
            if feed == "gated"
            else Chain(feed, width, hidden=hidden, eps=eps, rngs=rngs)
        )

    def __call__(
        self, x: Array, keys: Array, values: Array, *, valid: Any = None, mask: Any = None
    ) -> Looked:
        """mask [*#B K K]: which other queries each sees, where it sees them."""
        normed = lambda norm, a: norm(a).astype(a.dtype)  # noqa: E731
        q, k = normed(self.norm, x), normed(self.norm_keys, keys)
        v = k if values is keys else normed(self.norm_keys, values)
        n = k.shape[-2]
        if self.with_queries:
            k, v = (jnp.concatenate([a, q], axis=-2) for a in (k, v))
            valid, mask = _with_queries(q, n, valid, mask)
        else:
            mask = None
        weights = self.attention.weights(q, k, valid, mask)[..., :n]
        x = (q if self.normed else x) + self.attention(q, k, v, valid=valid, mask=mask)
        fed = x if self.norm2 is None else normed(self.norm2, x)
        return Looked(x + self.feed(fed), weights)


def _with_queries(q: Array, n: int, valid: Any, mask: Any) -> tuple[Any, Any]:
    """Validity and mask of n keys followed by the queries."""
    k = q.shape[-2]
    if valid is not None:
        valid = jnp.concatenate([valid, jnp.ones((*valid.shape[:-1], k), bool)], axis=-1)
    if mask is not None:
        all_keys = jnp.ones((*mask.shape[:-1], n), bool)
        mask = jnp.concatenate([all_keys, mask], axis=-1)
    return valid, mask


class PostBlock(nnx.Module):
    """norm(x + self-attention), then where `looks` norm(x + attention to the keys), then
    norm(x + feed): a layer of BERT between queries (Q-Former)."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        looks: bool = True,
        eps: float = 1e-12,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        norm = lambda: nnx.LayerNorm(width, epsilon=eps, rngs=rngs)  # noqa: E731
        self.own, self.norm_own = CrossAttention(width, heads, rngs=rngs), norm()
        self.attention = CrossAttention(width, heads, rngs=rngs, **attention) if looks else None
        self.norm = norm() if looks else None
        self.feed, self.norm_feed = (
            Chain("linear gelu linear", width, hidden=hidden, rngs=rngs),
            norm(),
        )

    def __call__(
        self, x: Array, keys: Array, values: Array, *, valid: Any = None, mask: Any = None
    ) -> Looked:
        """mask [*#B K K]: which queries each query sees."""
        kind = x.dtype
        x = self.norm_own(x + self.own(x, x, mask=mask)).astype(kind)
        weights = jnp.zeros((*x.shape[:-2], 1, x.shape[-2], keys.shape[-2]), jnp.float32)
        if self.attention is not None and self.norm is not None:
            weights = self.attention.weights(x, keys, valid)
            x = self.norm(x + self.attention(x, keys, values, valid=valid)).astype(kind)
        return Looked(self.norm_feed(x + self.feed(x)).astype(kind), weights)
