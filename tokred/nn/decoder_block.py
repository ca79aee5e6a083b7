"""A causal transformer block (Llama, Qwen, Gemma, Mistral) in the parts that sites lie between."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Num

from tokred.cache import LayerCache
from tokred.nn.experts import Experts
from tokred.nn.mlp import GatedMlp
from tokred.nn.norm import RMSNorm
from tokred.ops import attention, cached_attention, cached_probs, position_mask
from tokred.rotary import rotary_rates, rotate, rotate_by
from tokred.tokens import Tokens


@dataclass(frozen=True)
class BlockShape:
    """All that shapes a block; static.

    hidden: of the gated MLP. activation: one of `mlp.ACTIVATIONS`. window: how many places back a
    query sees, None for all. attention_cap: see `ops.attention`. norm_offset: added to the norms'
    scales.
    post_norm: norms after the branches too (Gemma 2). experts: number of experts in place of one
    MLP, 0 for none, of which a token takes `experts_per_token`.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    activation: str = "silu"
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    window: int | None = None
    attention_cap: float | None = None
    experts: int = 0
    experts_per_token: int = 2
    implementation: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32


def _linear(shape: BlockShape, a: int, b: int, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    common = {"dtype": shape.dtype, "param_dtype": shape.param_dtype, "rngs": rngs}
    return nnx.Linear(a, b, use_bias=bias, **common)


class CausalAttention(nnx.Module):
    """Grouped-query attention with rotary positions; who sees whom comes from positions alone."""

    def __init__(self, shape: BlockShape, *, rngs: nnx.Rngs):
        s, inner, small = shape, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.shape = shape
        self.query = _linear(s, s.width, inner, s.qkv_bias, rngs)
        self.key = _linear(s, s.width, small, s.qkv_bias, rngs)
        self.value = _linear(s, s.width, small, s.qkv_bias, rngs)
        self.out = _linear(s, inner, s.width, False, rngs)
        self.query_norm = _norm(s, s.head_dim) if s.qk_norm else None
        self.key_norm = _norm(s, s.head_dim) if s.qk_norm else None

    def project(
        self, x: Float[Array, "*B N D"], position: Num[Array, "*B N C"]
    ) -> tuple[Array, Array, Array]:
        """q [*B N H E], k and v [*B N G E], rotated to their positions."""
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.shape.head_dim)  # noqa: E731
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        turn = lambda y: rotate(y, position[..., 0], self.shape.rope_theta)  # noqa: E731
        return turn(q), turn(k), v

    def mask(self, queries: Tokens, keys: Tokens) -> Bool[Array, "*B N M"]:
        """Which keys each query may see, validity aside."""
        return position_mask(queries.position, keys.position, self.shape.window)

    def attend(
        self, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens
    ) -> Float[Array, "*B N D"]:
        """The update of the queries; `keys` brings bias, validity and policy of k and v."""
        y = attention(
            q,
            k,
            v,
            bias=keys.key_bias(),
            valid=keys.valid,
            mask=self.mask(queries, keys),
            policy=keys.policy,
            policy_eps=keys.policy_eps,
            cap=self.shape.attention_cap,
            implementation=self.shape.implementation,
        )
        return self.out(y.reshape(*y.shape[:-2], -1))

    def attend_cached(self, q: Array, queries: Tokens, cache: LayerCache) -> Float[Array, "B N D"]:
        """The update of the queries from all slots of a cache that they may see."""
        how = self._cached(queries.position, cache)
        y = cached_attention(q, self._keys(q, cache), cache.v.astype(q.dtype), **how)
        return self.out(y.reshape(*y.shape[:-2], -1))

    def weigh(
        self, q: Array, position: Num[Array, "B N"], cache: LayerCache
    ) -> Float[Array, "B H N C"]:
        """That attention's probabilities, of queries at these positions."""
        return cached_probs(q, self._keys(q, cache), **self._cached(position[..., None], cache))

    def _cached(self, position: Num[Array, "B N P"], cache: LayerCache) -> dict[str, Any]:
        return {
            "mask": cache.mask(position, self.shape.window),
            "bias": cache.bias,
            "pair_bias": cache.apart(self.shape.heads, self.shape.kv_heads),
            "cap": self.shape.attention_cap,
        }

    def _keys(self, q: Array, cache: LayerCache) -> Float[Array, "B G C E"]:
        """Those of a cache at their positions."""
        return cache.placed(self.rates).k.astype(q.dtype)

    def unplace(
        self, k: Float[Array, "B N G E"], position: Num[Array, "B N"]
    ) -> Float[Array, "B N G E"]:
        """Keys as they were before `project` rotated them."""
        return rotate_by(k, -position[..., None], self.rates)

    @property
    def rates(self) -> Float[Array, " half"]:
        """Of the rotation."""
        return rotary_rates(self.shape.head_dim, self.shape.rope_theta)


def _norm(shape: BlockShape, width: int) -> RMSNorm:
    kinds = {"dtype": shape.dtype, "param_dtype": shape.param_dtype}
    return RMSNorm(width, epsilon=shape.norm_eps, offset=shape.norm_offset, **kinds)


class DecoderBlock(nnx.Module):
    """u = x + Attention(norm1 x), then u + Mlp(norm2 u)."""

    def __init__(self, shape: BlockShape, *, rngs: nnx.Rngs):
        self.norm1 = _norm(shape, shape.width)
        self.attn = CausalAttention(shape, rngs=rngs)
        self.norm2 = _norm(shape, shape.width)
        self.mlp = _mlp(shape, rngs)
        self.post1 = _norm(shape, shape.width) if shape.post_norm else None
        self.post2 = _norm(shape, shape.width) if shape.post_norm else None

    def project(self, tokens: Tokens) -> tuple[Array, Array, Array]:
        """q [*B N H E], k and v [*B N G E] of the normalised tokens at their positions."""
        return self.attn.project(self.norm1(tokens.x), tokens.position)

    def evidence(self, tokens: Tokens) -> dict[str, Any]:
        """How this block's attention differs from a plain softmax, as fields of `Seen`."""
        return {"mask": self.attn.mask(tokens, tokens), "cap": self.attn.shape.attention_cap}

    def attend(
        self, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens
    ) -> Float[Array, "*B N D"]:
        """The attention branch's update of the queries' residual stream."""
        return _after(self.post1, self.attn.attend(q, k, v, queries, keys))

    def attend_cached(self, q: Array, queries: Tokens, cache: LayerCache) -> Array:
        """The same, from a cache."""
        return _after(self.post1, self.attn.attend_cached(q, queries, cache))

    def weigh(self, q: Array, position: Array, cache: LayerCache) -> Float[Array, "B H N C"]:
        """Attention over the slots of a cache."""
        return self.attn.weigh(q, position, cache)

    def unplace(self, k: Array, position: Array) -> Array:
        """Keys before their rotation."""
        return self.attn.unplace(k, position)

    @property
    def rates(self) -> Array:
        """Of rotary positions."""
        return self.attn.rates

    def feed(
        self, x: Float[Array, "*B N D"], experts: Float[Array, "*B N M"] | None = None
    ) -> Float[Array, "*B N D"]:
        """The MLP branch's update; experts: weights in place of the router's own."""
        y = self.norm2(x)
        return _after(self.post2, self.mlp(y) if experts is None else self.mlp(y, experts))

    def route(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N M"]:
        """The router's logits. Raises ValueError for an MLP that is no mixture of experts."""
        if not isinstance(self.mlp, Experts):
            raise ValueError(
                "Ask('experts'): this model has no mixture of experts; set DecoderConfig.experts."
            )
        return self.mlp.router(self.norm2(x))


def _after(norm: RMSNorm | None, update: Array) -> Array:
    return update if norm is None else norm(update)


def _mlp(shape: BlockShape, rngs: nnx.Rngs) -> Any:
    kinds = {"dtype": shape.dtype, "param_dtype": shape.param_dtype, "rngs": rngs}
    if not shape.experts:
        return GatedMlp(shape.width, shape.hidden, activation=shape.activation, **kinds)
    top_k = shape.experts_per_token
    return Experts(shape.width, shape.hidden, shape.experts, top_k=top_k, **kinds)
