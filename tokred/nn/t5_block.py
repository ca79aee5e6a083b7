"""A transformer block of T5 v1.1 (Raffel et al. 2020; ByT5) in the parts that sites lie between.

Attention is not scaled, norms have no mean, nothing has a bias. T5's dropout is left out.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from tokred.cache import LayerCache, Memory
from tokred.nn.block import Residual
from tokred.nn.mlp import GatedMlp
from tokred.nn.norm import RMSNorm
from tokred.ops import attention, cached_attention, cached_probs, position_mask
from tokred.tokens import Tokens


@dataclass(frozen=True)
class T5Shape:
    """All that shapes a block; static.

    hidden: of the gated MLP, whose activation is one of `mlp.ACTIVATIONS`. buckets, max_distance:
    see `RelativeBias`. causal: a query sees no later key. cross: a second attention looks at a
    memory. sink: every softmax has one more zero logit (softmax1).
    """

    width: int
    heads: int
    head_dim: int
    hidden: int
    activation: str = "gelu_tanh"
    buckets: int = 32
    max_distance: int = 128
    causal: bool = False
    cross: bool = False
    sink: bool = False
    norm_eps: float = 1e-6
    implementation: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32


def distance_buckets(buckets: int, max_distance: int, causal: bool) -> Int[np.ndarray, " R"]:
    """The bucket of a key that lies d places after its query, for all R = 2 max_distance + 1 values
    of d from -max_distance on.

    Half of the buckets are single distances, half grow logarithmically; what is further away shares
    the last. Not causal: half of all buckets for either direction.
    """
    distance = np.arange(-max_distance, max_distance + 1)
    side = buckets if causal else buckets // 2
    away = np.maximum(-distance, 0) if causal else np.abs(distance)
    exact = side // 2
    ratio = np.maximum(away, 1).astype(np.float32) / np.float32(exact)
    scale = np.float32(math.log(max_distance / exact))  # float32 like the published models
    far = exact + (np.log(ratio) / scale * np.float32(side - exact)).astype(np.int32)
    bucket = np.where(away < exact, away, np.minimum(far, side - 1))
    return bucket if causal else bucket + side * (distance > 0)


class RelativeBias(nnx.Module):
    """A learned number per head and bucket of distances, added to attention's logits."""

    def __init__(self, shape: T5Shape, *, rngs: nnx.Rngs):
        self.max_distance = shape.max_distance
        self.causal, self.buckets = shape.causal, shape.buckets
        init = nnx.initializers.normal(shape.width**-0.5)
        self.table = nnx.Param(init(rngs.params(), (shape.buckets, shape.heads), shape.param_dtype))

    def __call__(
        self, queries: Num[Array, "*B N"], keys: Num[Array, "*B M"]
    ) -> Float[Array, "*B H N M"]:
        """From the positions of queries and keys, in float32. Gradient: to the table."""
        return jnp.moveaxis(self._by_distance()[:, self._index(queries, keys)], 0, -3)

    def per_head(
        self, queries: Num[Array, "B 1 N"], keys: Num[Array, "B H M"]
    ) -> Float[Array, "B H N M"]:
        """The same where every head has keys of its own, as in a cache."""
        take = jax.vmap(lambda row, index: row[index], in_axes=(0, 1), out_axes=1)
        return take(self._by_distance(), self._index(queries, keys))

    def _by_distance(self) -> Float[Array, "H R"]:
        bucket = distance_buckets(self.buckets, self.max_distance, self.causal)
        return self.table[...].astype(jnp.float32)[bucket].T

    def _index(self, queries: Array, keys: Array) -> Array:
        far = self.max_distance
        distance = (keys[..., None, :] - queries[..., :, None]).astype(jnp.int32)
        return jnp.clip(distance, -far, far) + far


class T5Attention(nnx.Module):
    """Query, key, value and output projections; logits are not scaled."""

    def __init__(self, shape: T5Shape, *, rngs: nnx.Rngs):
        s, inner = shape, shape.heads * shape.head_dim
        self.shape = shape
        small = nnx.initializers.normal((s.width * s.head_dim) ** -0.5)
        self.query = _linear(s, s.width, inner, rngs, kernel_init=small)
        self.key = _linear(s, s.width, inner, rngs)
        self.value = _linear(s, s.width, inner, rngs)
        self.out = _linear(s, inner, s.width, rngs)

    def ask(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N H E"]:
        """Queries."""
        return self._split(self.query(x))

    def offer(self, x: Float[Array, "*B N D"]) -> tuple[Array, Array]:
        """Keys and values [*B N H E]."""
        return self._split(self.key(x)), self._split(self.value(x))

    def attend(
        self, q: Array, k: Array, v: Array, keys: Tokens, *, mask: Any = None, pair_bias: Any = None
    ) -> Float[Array, "*B N D"]:
        """The update of the queries; `keys` brings bias, validity and policy of k and v."""
        y = attention(
            q,
            k,
            v,
            bias=keys.key_bias(),
            valid=keys.valid,
            mask=mask,
            policy=keys.policy,
            policy_eps=keys.policy_eps,
            pair_bias=pair_bias,
            sink=self.shape.sink,
            scale=1.0,
            implementation=self.shape.implementation,
        )
        return self.join(y)

    def join(self, y: Float[Array, "*B N H E"]) -> Float[Array, "*B N D"]:
        """The output projection of all heads."""
        return self.out(y.reshape(*y.shape[:-2], -1))

    def _split(self, y: Array) -> Float[Array, "*B N H E"]:
        return y.reshape(*y.shape[:-1], self.shape.heads, -1)


def _linear(shape: T5Shape, a: int, b: int, rngs: nnx.Rngs, **init: Any) -> nnx.Linear:
    common = {"dtype": shape.dtype, "param_dtype": shape.param_dtype, "rngs": rngs}
    return nnx.Linear(a, b, use_bias=False, **common, **init)


def t5_norm(shape: T5Shape) -> RMSNorm:
    """The norm of blocks and stacks."""
    kinds = {"dtype": shape.dtype, "param_dtype": shape.param_dtype}
    return RMSNorm(shape.width, epsilon=shape.norm_eps, **kinds)


class T5Block(Residual):
    """u = x + Attention(norm1 x), then u + Cross(norm_cross u), then u + Mlp(norm2 u).

    relative: one module, shared by all blocks of a stack.
    """

    def __init__(self, shape: T5Shape, relative: RelativeBias, *, rngs: nnx.Rngs):
        self.relative = relative
        self.norm1 = t5_norm(shape)
        self.attn = T5Attention(shape, rngs=rngs)
        self.norm_cross = t5_norm(shape) if shape.cross else None
        self.cross = T5Attention(shape, rngs=rngs) if shape.cross else None
        self.norm2 = t5_norm(shape)
        kinds = {"dtype": shape.dtype, "param_dtype": shape.param_dtype, "rngs": rngs}
        self.mlp = GatedMlp(shape.width, shape.hidden, activation=shape.activation, **kinds)

    def project(self, tokens: Tokens) -> tuple[Array, Array, Array]:
        """q, k, v [*B N H E] of the normalised tokens."""
        x = self.norm1(tokens.x)
        return self.attn.ask(x), *self.attn.offer(x)

    def evidence(self, tokens: Tokens) -> dict[str, Any]:
        """How this block's attention differs from a plain softmax, as fields of `Seen`."""
        bias = self.relative(tokens.position[..., 0], tokens.position[..., 0])
        how = {"scale": 1.0, "sink": self.attn.shape.sink, "mask": self.mask(tokens, tokens)}
        return {**how, "pair_bias": jnp.broadcast_to(bias, (*tokens.batch, *bias.shape[-3:]))}

    def mask(self, queries: Tokens, keys: Tokens) -> Bool[Array, "*#B N M"] | None:
        """Which keys each query may see, validity aside; None for all."""
        if not self.attn.shape.causal:
            return None
        return position_mask(queries.position, keys.position)

    def attend(
        self, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens
    ) -> Float[Array, "*B N D"]:
        """The self-attention's update of the queries' residual stream."""
        bias = self.relative(queries.position[..., 0], keys.position[..., 0])
        return self.attn.attend(q, k, v, keys, mask=self.mask(queries, keys), pair_bias=bias)

    def attend_cached(self, q: Array, queries: Tokens, cache: LayerCache) -> Float[Array, "B N D"]:
        """The same, from all slots of a cache that the queries may see."""
        how = self._cached(queries.position[..., 0], cache)
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        return self.attn.join(cached_attention(q, k, v, **how))

    def weigh(
        self, q: Array, position: Num[Array, "B N"], cache: LayerCache
    ) -> Float[Array, "B H N C"]:
        """That attention's probabilities, of queries at these positions."""
        return cached_probs(q, cache.k.astype(q.dtype), **self._cached(position, cache))

    def _cached(self, position: Array, cache: LayerCache) -> dict[str, Any]:
        return {
            "mask": cache.mask(position[..., None]),
            "bias": cache.bias,
            "pair_bias": self.relative.per_head(position[:, None], cache.position),
            "sink": self.attn.shape.sink,
            "scale": 1.0,
        }

    rates: ClassVar[None] = None  # no rotary positions

    def remember(self, tokens: Tokens) -> Memory:
        """What the cross-attention looks at, projected once."""
        return Memory(tokens, *self._cross()[1].offer(tokens.x))

    def look(self, x: Float[Array, "*B N D"], memory: Memory) -> Float[Array, "*B N D"]:
        """The cross-attention's update; the memory's gates act as they did among its tokens."""
        norm, cross = self._cross()
        k, v = (memory.k, memory.v) if memory.projected else cross.offer(memory.tokens.x)
        return cross.attend(cross.ask(norm(x)), k, v, memory.tokens)

    def _cross(self) -> tuple[RMSNorm, T5Attention]:
        if self.norm_cross is None or self.cross is None:
            raise ValueError("T5Block: this block has no cross-attention; set T5Shape.cross.")
        return self.norm_cross, self.cross

    def feed(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N D"]:
        """The MLP branch's update."""
        return self.mlp(self.norm2(x))
