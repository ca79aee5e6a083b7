"""Modules of methods whose gates delete tokens or let them exit."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.maps import Keep
from tokred.nn.attention import Attention
from tokred.nn.mlp import Mlp, activate
from tokred.nn.routers import KeepPredictor
from tokred.ops.attention import NEGATIVE


class ExitRouter(nnx.Module):
    """DyVTE: two logits (stay, exit) from what the text of an example says, in float32.

    Source: DoubtedSteam/DyVTE `Router`.
    """

    def __init__(self, features: int, hidden: int = 2048, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(features, hidden, use_bias=False, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, 2, use_bias=False, rngs=rngs)

    def __call__(self, feature: Float[Array, "*B F"]) -> Float[Array, "*B 2"]:
        return self.fc2(activate(self.fc1(feature.astype(jnp.float32)), "gelu"))


class Thresholds(nnx.Module):
    """ATP: two thresholds in (0, 1) from two mean scores of an example; 0.5 at the start."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.embed = nnx.Linear(2, width, rngs=rngs)
        self.relevance = nnx.Linear(width, 1, kernel_init=zeros, rngs=rngs)
        self.spatial = nnx.Linear(width, 1, kernel_init=zeros, rngs=rngs)

    def __call__(self, means: Float[Array, "*B 2"]) -> Float[Array, "*B 2"]:
        """(of relevance, of the spatial score)."""
        z = self.embed(means.astype(jnp.float32))
        return jax.nn.sigmoid(jnp.concatenate([self.relevance(z), self.spatial(z)], axis=-1))


def policy_probs(
    logits: Float[Array, "*B H N M"],
    policy: Float[Array, "*B N M"],
    valid: Bool[Array, "*B M"],
    *,
    eps: float = 1e-6,
) -> Float[Array, "*B H N M"]:
    """(exp(logit - max) policy + eps / M) / (sum + eps), the maximum over all valid keys.

    Where a query's policy is 0 throughout, all valid keys weigh alike (0 with eps=0). Invalid keys
    count for nothing. Static: eps. Gradient: to logits and policy.
    Source: jy0205/LaVIT `softmax_with_policy`.
    """
    seen = valid[..., None, None, :]
    logits = jnp.where(seen, logits, NEGATIVE)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weight = jnp.exp(logits - top) * policy[..., None, :, :] * seen
    share = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    total = weight.sum(-1, keepdims=True) + eps
    return (weight + eps * share) / jnp.where(total == 0, 1.0, total)


class PolicyAttention(Attention):
    """Attention to any tokens, under a policy per query and key."""

    def __call__(
        self,
        x: Float[Array, "*B N D"],
        among: Float[Array, "*B M D"],
        policy: Float[Array, "*B N M"],
        valid: Bool[Array, "*B M"],
        *,
        eps: float,
    ) -> Float[Array, "*B N D"]:
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)  # noqa: E731
        q, k, v = split(self.query(x)), split(self.key(among)), split(self.value(among))
        logits = jnp.einsum("...nhe,...mhe->...hnm", q, k, preferred_element_type=jnp.float32)
        probs = policy_probs(logits * q.shape[-1] ** -0.5, policy, valid, eps=eps)
        y = jnp.einsum("...hnm,...mhe->...nhe", probs.astype(v.dtype), v)
        return self.out(y.reshape(*y.shape[:-2], -1))


class MergerBlock(nnx.Module):
    """Causal self-attention among kept tokens, attention to the dropped ones, MLP; all pre-norm."""

    def __init__(
        self, width: int, heads: int, *, mlp_ratio: float, norm_eps: float, rngs: nnx.Rngs
    ):
        norm = lambda: nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)  # noqa: E731
        kinds = {"param_dtype": jnp.float32, "rngs": rngs}
        self.norm0, self.norm1, self.norm2 = norm(), norm(), norm()
        self.attn = PolicyAttention(width, heads, **kinds)
        self.cross = PolicyAttention(width, heads, **kinds)
        self.mlp = Mlp(width, int(width * mlp_ratio), **kinds)

    def __call__(
        self,
        x: Float[Array, "*B K D"],
        among: Float[Array, "*B N D"],
        kept: tuple[Float[Array, "*B K K"], Bool[Array, "*B K"]],
        dropped: tuple[Float[Array, "*B K N"], Bool[Array, "*B N"]],
        *,
        eps: float,
    ) -> Float[Array, "*B K D"]:
        """kept, dropped: policy and validity of the two attentions."""
        y = self.norm0(x)
        x = x + self.attn(y, y, *kept, eps=eps)
        x = x + self.cross(self.norm1(x), among, *dropped, eps=eps)
        return x + self.mlp(self.norm2(x))


class TokenMerger(nnx.Module):
    """LaVIT: kept tokens take in what the dropped ones held.

    Source: jy0205/LaVIT `TokenMerger`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        depth: int = 12,
        mlp_ratio: float = 4.3637,
        norm_eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        shape = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "rngs": rngs}
        self.blocks = nnx.List(MergerBlock(width, heads, **shape) for _ in range(depth))
        self.ln_vision = nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*B N D"],
        kept: Float[Array, "*B N"],
        *,
        map_: Keep | None = None,
        valid: Bool[Array, "*B N"] | None = None,
        eps: float = 1e-6,
    ) -> Float[Array, "*B K D"]:
        """The features after merging, of all tokens, or of those that `map_` keeps, in its slots.

        kept: 1 or 0 per token. A token sees itself and kept ones before it; it takes in the dropped
        ones. With eps=0 both forms agree on kept tokens; else by the order of eps, as the released
        self-attention spreads eps over dropped tokens too. Static: eps. Gradient: to x and kept.
        """
        every = jnp.ones(kept.shape, bool) if valid is None else valid
        kept = kept * every
        among = self.ln_vision(x)
        here, alive = kept, every
        if map_ is not None:
            alive = jnp.ones(map_.index.shape, bool) if map_.valid is None else map_.valid
            x, here = map_.apply(x), alive.astype(kept.dtype)
        k = x.shape[-2]
        own, past = jnp.eye(k, dtype=kept.dtype), jnp.tril(jnp.ones((k, k), kept.dtype))
        own, past = (a.reshape((1,) * (kept.ndim - 1) + a.shape) for a in (own, past))
        here = here[..., None, :]
        inside = (here + (1 - here) * own) * past
        outside = jnp.broadcast_to((1 - kept)[..., None, :], (*kept.shape[:-1], k, kept.shape[-1]))
        for block in self.blocks:
            x = block(x, among, (inside, alive), (outside, every), eps=eps)
        return self.norm(x)


class SelectAndMerge(nnx.Module):
    """LaVIT's selector, which is DynamicViT's predictor, and its merger."""

    def __init__(self, width: int, heads: int, *, depth: int, mlp_ratio: float, rngs: nnx.Rngs):
        self.selector = KeepPredictor(width, rngs=rngs)
        self.merger = TokenMerger(width, heads, depth=depth, mlp_ratio=mlp_ratio, rngs=rngs)
