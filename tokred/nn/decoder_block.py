"""A transformer block of text models (Llama, Qwen, Gemma, Mistral, GPT-2, BERT) in the parts that
sites lie between."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Num

from tokred.cache import LayerCache
from tokred.nn.block import Residual
from tokred.nn.experts import Experts
from tokred.nn.mlp import GatedMlp, Mlp
from tokred.nn.norm import RMSNorm
from tokred.ops import attention, cached_attention, cached_probs, position_mask
from tokred.rotary import RopeScaling, rotary_rates, rotate_by
from tokred.tokens import Tokens


@dataclass(frozen=True)
class BlockShape:
    """All that shapes a block; static.

    hidden: of the MLP. activation: one of `mlp.ACTIVATIONS`. rotary: positions turn queries and
    keys, else they are left to the model. causal: a query sees no later key. window: how many
    places back it sees, None for all. attention_cap: see `ops.attention`.
    norm: 'rms' or 'layer'. norm_offset: added to RMSNorm's scales. norm_first: a norm before each
    branch, else behind its sum with the residual stream (BERT). post_norm: norms of the updates too
    (Gemma 2). gated: the MLP is. bias: of the output projection and the MLP. experts: number of
    experts in place of one MLP, 0 for none, of which a token takes `experts_per_token`.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    activation: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    norm: str = "rms"
    norm_offset: float = 0.0
    norm_first: bool = True
    rotary: bool = True
    causal: bool = True
    gated: bool = True
    bias: bool = False
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

    @property
    def rates(self) -> Float[Array, " half"]:
        """Of the rotation; zeros turn nothing."""
        rates = rotary_rates(self.head_dim, self.rope_theta, self.rope_scaling)
        return rates if self.rotary else jnp.zeros_like(rates)


def _linear(shape: BlockShape, a: int, b: int, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    common = {"dtype": shape.dtype, "param_dtype": shape.param_dtype, "rngs": rngs}
    return nnx.Linear(a, b, use_bias=bias, **common)


class GroupedAttention(nnx.Module):
    """Grouped-query attention, by default with rotary positions and causal: who sees whom comes
    from positions alone."""

    def __init__(self, shape: BlockShape, *, rngs: nnx.Rngs):
        s, inner, small = shape, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.shape = shape
        self.query = _linear(s, s.width, inner, s.qkv_bias, rngs)
        self.key = _linear(s, s.width, small, s.qkv_bias, rngs)
        self.value = _linear(s, s.width, small, s.qkv_bias, rngs)
        self.out = _linear(s, inner, s.width, s.bias, rngs)
        self.query_norm = make_norm(s, s.head_dim, rngs) if s.qk_norm else None
        self.key_norm = make_norm(s, s.head_dim, rngs) if s.qk_norm else None

    def project(
        self, x: Float[Array, "*B N D"], position: Num[Array, "*B N C"]
    ) -> tuple[Array, Array, Array]:
        """q [*B N H E], k and v [*B N G E], rotated to their positions."""
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.shape.head_dim)  # noqa: E731
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if not self.shape.rotary:
            return q, k, v
        turn = lambda y: rotate_by(y, position[..., :1], self.shape.rates)  # noqa: E731
        return turn(q), turn(k), v

    def mask(self, queries: Tokens, keys: Tokens) -> Bool[Array, "*B N M"] | None:
        """Which keys each query may see, validity aside; None for all. From positions alone."""
        if not self.shape.causal:
            return None
        return position_mask(queries.position, keys.position, self.shape.window)

    def attend(
        self, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens
    ) -> Float[Array, "*B N D"]:
        """The update of the queries; `keys` brings bias, validity and policy of k and v."""
        same = queries.position is keys.position and queries.ordered and keys.ordered
        causal = self.shape.causal and self.shape.window is None and same
        place = queries.position
        document = place[..., 1].astype(jnp.int32) if causal and place.shape[-1] > 1 else None
        y = attention(
            q,
            k,
            v,
            bias=keys.key_bias(),
            valid=keys.valid,
            mask=None if causal else self.mask(queries, keys),
            causal=causal,
            segments=document,
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
        """See `BlockShape.rates`."""
        return self.shape.rates


def make_norm(shape: Any, width: int, rngs: nnx.Rngs) -> Any:
    """RMSNorm or LayerNorm, as `norm` of a shape or config says."""
    kinds = {"dtype": shape.dtype, "param_dtype": shape.param_dtype}
    if shape.norm == "layer":
        return nnx.LayerNorm(width, epsilon=shape.norm_eps, rngs=rngs, **kinds)
    return RMSNorm(width, epsilon=shape.norm_eps, offset=shape.norm_offset, **kinds)


class DecoderBlock(Residual):
    """u = x + Attention(norm1 x), then u + Mlp(norm2 u); or, with norm_first=False,
    u = close1(x + Attention(x)), then close2(u + Mlp(u))."""

    def __init__(self, shape: BlockShape, *, rngs: nnx.Rngs):
        norm = lambda wanted: make_norm(shape, shape.width, rngs) if wanted else None  # noqa: E731
        self.norm1 = norm(shape.norm_first) or same
        self.attn = GroupedAttention(shape, rngs=rngs)
        self.norm2 = norm(shape.norm_first) or same
        self.mlp = _mlp(shape, rngs)
        self.post1, self.post2 = norm(shape.post_norm), norm(shape.post_norm)
        self.close1, self.close2 = norm(not shape.norm_first), norm(not shape.norm_first)

    def join(
        self, x: Float[Array, "*B N D"], update: Float[Array, "*B N D"], branch: int
    ) -> Float[Array, "*B N D"]:
        close = self.close2 if branch else self.close1
        return x + update if close is None else close(x + update)

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
        if not isinstance(self.mlp, Experts):
            return super().route(x)
        return self.mlp.router(self.norm2(x))


def same(x: Array) -> Array:
    """Where no norm stands."""
    return x


def _after(norm: Any, update: Array) -> Array:
    return update if norm is None else norm(update)


def _mlp(shape: BlockShape, rngs: nnx.Rngs) -> Any:
    kinds = {"dtype": shape.dtype, "param_dtype": shape.param_dtype, "rngs": rngs}
    if not shape.experts:
        how = {"activation": shape.activation, "bias": shape.bias, **kinds}
        return (GatedMlp if shape.gated else Mlp)(shape.width, shape.hidden, **how)
    top_k = shape.experts_per_token
    return Experts(shape.width, shape.hidden, shape.experts, top_k=top_k, **kinds)
