"""DynamicViT (Rao et al. 2021): predictors that drop tokens, nested, in stages.

Official code: raoyongming/DynamicViT (MIT).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.gates import Gumbel
from tokred.methods.registry import register
from tokred.methods.topk import stage_counts
from tokred.nn.routers import KeepPredictor
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.select import keep_top_k
from tokred.tokens import Tokens, move


@dataclass(frozen=True)
class DynamicViT(Reduction):
    """Keeps `k` patch tokens by the predictor's log-probability.

    soft: all tokens stay; hard Gumbel decisions (in evaluation the top k), multiplied by those of
    earlier stages, become the policy of attention. packed: the top k are gathered, ordered by
    score. The twins agree exactly at eps=0.
    ratio: target share of kept tokens in the auxiliary ratio loss. ratio_weight: its weight.
    """

    k: int
    ratio: float = 0.7
    ratio_weight: float = 2.0 / 3.0
    eps: float = 1e-6
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.k

    def macs(self, n: int, layout: Layout) -> int:
        return (n - layout.prefix) * predictor_macs(layout.width)

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> KeepPredictor:
        return KeepPredictor(width, rngs=rngs)

    def expected_count(self, n: Any, prefix: int, aux: Mapping[str, Any]) -> Array:
        return aux["kept"] + prefix

    def __call__(
        self,
        tokens: Tokens,
        evidence: Mapping[str, Array],
        state: Any = None,
        *,
        module: Any = None,
        key: Any = None,
        train: bool = False,
        twin: str = "packed",
    ) -> tuple[Tokens, Any, Any, dict[str, Array]]:
        predictor = require_module(self, module)
        kept = tokens.sizes() > 0 if tokens.policy is None else tokens.policy
        kept = kept[..., tokens.prefix :].astype(jnp.float32)
        chances = predictor(tokens.x[..., tokens.prefix :, :], kept)  # [*B P 2]
        if twin == "soft":
            return self._soft(tokens, chances, kept, state, key, train)
        if self.idle(tokens.n, tokens.prefix):
            return tokens, None, state, {}
        scores = with_front(chances[..., 0], tokens.prefix, 0.0)
        map_ = keep_top_k(scores, self.k, prefix=tokens.prefix, valid=tokens.valid)
        return move(tokens, map_), map_, state, {}

    def _soft(
        self, tokens: Tokens, chances: Array, kept: Array, state: Any, key: Any, train: bool
    ) -> tuple[Tokens, None, Any, dict[str, Array]]:
        if train:
            decision = kept * Gumbel().update(chances, key=key, train=True)[0]
        else:
            scores = jnp.where(kept > 0, chances[..., 0], -jnp.inf)
            alive = None if tokens.valid is None else tokens.valid[..., tokens.prefix :]
            chosen = keep_top_k(scores, min(self.k, scores.shape[-1]), valid=alive)
            decision = kept * (chosen.source >= 0)
        policy = with_front(decision, tokens.prefix, 1.0)
        present = jnp.maximum((tokens.sizes()[..., tokens.prefix :] > 0).sum(-1), 1)
        share = decision.sum(-1) / present
        aux = {
            "decision": policy,
            "kept": decision.sum(-1).mean(),
            "loss_ratio": self.ratio_weight * ((share - self.ratio) ** 2).mean(),
        }
        return tokens.replace(policy=policy, policy_eps=self.eps), None, state, aux


def predictor_macs(width: int) -> int:
    """Of `KeepPredictor`, per token."""
    half, quarter = width // 2, width // 4
    return width * width + width * half + half * quarter + 2 * quarter


def with_front(body: Float[Array, "*B P"], prefix: int, value: float) -> Float[Array, "*B N"]:
    """`value` for the protected tokens, in front."""
    front = jnp.full((*body.shape[:-1], prefix), value, body.dtype)
    return jnp.concatenate([front, body], axis=-1)


@register(
    "dynamicvit",
    family="prune",
    site="before",
    learned=True,
    twins="exact",
    golden=("core/dynamicvit", "vit/dynamicvit"),
    paper="DynamicViT 2021",
)
def dynamicvit(
    layout: Layout,
    *,
    keep: float = 0.7,
    layers: Sequence[int] | None = None,
    eps: float = 1e-6,
    ratio_weight: float = 2.0,
) -> Plan:
    """Learned predictors drop tokens in stages; trained by Gumbel decisions and a ratio loss.

    keep: ratio per stage. ratio_weight: weight of the ratio loss, shared by the stages.
    """
    stages = stage_counts(layout, keep, layers)
    patches = layout.patches
    weight = ratio_weight / max(len(stages), 1)
    steps = [(Site("before", i), DynamicViT(k, k / patches, weight, eps)) for i, k in stages]
    return Plan(tuple(steps), name="dynamicvit")
