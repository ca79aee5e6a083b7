"""MC-MoE's online dynamic pruning (Huang et al. 2024): fewer experts for tokens that matter less.

Official code: Aaronhuang-778/MC-MoE (no licence file). It acts inside a mixture of experts: route,
prune, and hand the weights to the layer's `Experts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokred.methods.registry import register
from tokred.methods.routing import layers_or, mean_over
from tokred.nn.experts import per_expert, renormalise, route
from tokred.ops import top_k
from tokred.plan import EXPERT_WEIGHT, Ask, Layout, Plan, Reduction, Site
from tokred.tokens import Tokens

LOGITS, NORMED, RECEIVED = Ask("experts"), Ask("normed"), Ask("column_mean")
KINDS = ("official", "column_mean")
# Mixtral 8x7B as released: the calibrated median of (second / first weight) of every layer, and
# the ten layers that lose least by pruning, which alone are pruned.
MIXTRAL_BETA = (
    0.402, 0.494, 0.463, 0.484, 0.478, 0.491, 0.523, 0.521, 0.544, 0.570, 0.574, 0.489, 0.503,
    0.618, 0.568, 0.535, 0.559, 0.519, 0.537, 0.487, 0.469, 0.461, 0.461, 0.469, 0.458, 0.418,
    0.433, 0.418, 0.406, 0.433, 0.447, 0.535,
)  # fmt: skip
MIXTRAL_LAYERS = (11, 13, 14, 22, 23, 24, 25, 26, 27, 28)


def token_importance(
    x: Float[Array, "*B N D"],
    received: Float[Array, "*B N"] | None = None,
    *,
    kind: str = "official",
    valid: Bool[Array, "*B N"] | None = None,
) -> Float[Array, "*B N"]:
    """s_j = a_j |x_j|_1 under causal attention, float32; higher = keep more experts.

    kind: 'official' a_j = 1 / (number of queries that see j): the released code sums each query's
    attention over its keys, which is always 1, so that attention does not enter · 'column_mean',
    what is meant: the mean attention that j receives from the queries that see it.
    received: for 'column_mean', the mean over all valid queries and heads, Ask('column_mean').
    x: the MLP's input, normalised.

    Raises:
      ValueError: an unknown kind, or 'column_mean' without received.
    """
    if kind not in KINDS:
        raise ValueError(f"token_importance: kind={kind!r} must be one of {KINDS}; change kind.")
    if kind == "column_mean" and received is None:
        raise ValueError("token_importance: kind='column_mean' reads attention; pass received=.")
    norm = jnp.abs(x.astype(jnp.float32)).sum(-1)
    there = jnp.ones(norm.shape) if valid is None else valid.astype(jnp.float32)
    seen_by = jnp.maximum(jnp.cumsum(there[..., ::-1], axis=-1)[..., ::-1], 1.0)
    if kind == "official" or received is None:
        return norm / seen_by
    return norm * received * there.sum(-1, keepdims=True) / seen_by


def prune_experts(
    weight: Float[Array, "*B N k"],
    importance: Float[Array, "*B N"] | None = None,
    *,
    beta: float,
    tau_low: float = 0.0,
    tau_high: float = 0.02,
    valid: Bool[Array, "*B N"] | None = None,
) -> Float[Array, "*B N k"]:
    """A token's routing weights after pruning, which add up to 1, or are all 0.

    The second expert leaves where weight_2 < beta * weight_1. Of each example's tokens the
    floor(tau_low N) least important ones lose all experts, the floor(tau_high N) most important
    ones keep all (and win where both fit). importance: None (decoding, N = 1) is the first rule
    alone. weight: descending, as `route` gives it.

    Raises:
      ValueError: weights of fewer than two experts.
    """
    if weight.shape[-1] < 2:
        raise ValueError(
            f"prune_experts: weight {weight.shape} must hold at least 2 experts per token; "
            "raise the router's top_k."
        )
    keeps = jnp.ones(weight.shape, bool)
    keeps = keeps.at[..., 1].set(weight[..., 1] >= beta * weight[..., 0])
    if importance is not None:
        none = _extreme(-importance, tau_low, valid)
        all_ = _extreme(importance, tau_high, valid)
        keeps = (keeps & ~none[..., None]) | all_[..., None]
    return renormalise(jnp.where(keeps, weight, 0.0))


def _extreme(scores: Array, share: float, valid: Any) -> Bool[Array, "*B N"]:
    """The floor(share N) highest of each example's N valid tokens."""
    n = scores.shape[-1]
    if valid is not None:
        scores = jnp.where(valid, scores, -jnp.inf)
    rank = jnp.argsort(top_k(scores, n)[1], axis=-1)
    floor = np.array([int(share * count) for count in range(n + 1)])
    if valid is None:
        return rank < floor[n]
    return rank < jnp.asarray(floor)[valid.sum(-1, keepdims=True)]


@dataclass(frozen=True)
class MCMoE(Reduction):
    """Between attention and a mixture of experts: no token leaves, some take fewer experts.

    beta, tau_low, tau_high: see `prune_experts`; kind: see `token_importance`, which counts only
    among the tokens of a prompt; causal: decisions by beta alone. Training-free; all experts run,
    so that nothing is saved until they are packed. top_k: experts per token of the model.
    """

    beta: float
    tau_low: float = 0.0
    tau_high: float = 0.02
    kind: str = "official"
    top_k: int = 2
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    @property
    def asks(self) -> tuple[Ask, ...]:  # type: ignore[override]
        more = (RECEIVED,) if self.kind == "column_mean" else ()
        return (LOGITS, NORMED, *more)

    def counts(self, n: int, prefix: int) -> int:
        return n

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
    ) -> tuple[Tokens, None, Any, dict[str, Array]]:
        weight, expert = route(evidence[LOGITS.name], self.top_k)
        x, received = evidence[NORMED.name], evidence.get(RECEIVED.name)
        importance = None
        if tokens.n > 1 and twin != "causal":
            importance = token_importance(x, received, kind=self.kind, valid=tokens.valid)
        limits = {"beta": self.beta, "tau_low": self.tau_low, "tau_high": self.tau_high}
        weight = prune_experts(weight, importance, valid=tokens.valid, **limits)
        used = (weight > 0).sum(-1).astype(jnp.float32)
        every = per_expert(weight, expert, evidence[LOGITS.name].shape[-1])
        tokens = tokens.replace(extra={**tokens.extra, EXPERT_WEIGHT: every})
        return tokens, None, state, {"experts": mean_over(used, tokens.valid)}


@register(
    "mcmoe",
    family="skip",
    site="mid",
    needs=("experts",),
    golden=("core/mcmoe__odp",),
    paper="MC-MoE 2024",
)
def mcmoe(
    layout: Layout,
    *,
    keep: float = 1.0,
    beta: float | Sequence[float] = 0.5,
    tau_low: float | None = None,
    tau_high: float = 0.02,
    layers: Sequence[int] | None = None,
    kind: str = "official",
    top_k: int = 2,
) -> Plan:
    """Tokens that matter less take fewer experts of a mixture.

    keep: 1 - tau_low where tau_low is not given; 1 prunes nothing but by beta. beta: of every
    layer, or one each (Mixtral's are in MIXTRAL_BETA). layers: default all.
    """
    chosen = layers_or(layers, range(layout.depth))
    each = [beta] * layout.depth if isinstance(beta, int | float) else list(beta)
    low = 1 - keep if tau_low is None else tau_low
    steps = [(Site("mid", i), MCMoE(each[i], low, tau_high, kind, top_k)) for i in chosen]
    return Plan(tuple(steps), name="mcmoe")
