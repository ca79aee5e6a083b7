"""ATP-LLaVA (Ye et al. 2024/25): each example finds, in a few layers, its own thresholds of
relevance and of spatial coverage; vision tokens below both leave.

No official code. The equations are those of a third-party implementation that follows the paper's
(medium confidence). Where it is silent, or where the two may differ, our choice: the soft mask is
an additive log gate on keys, as in MrT5, and gates of several modules multiply; the counts in both
losses are those of all gates so far (low confidence); the relevance may be standardised first;
nested grids share one score per token; causal attention averages over keys not after a token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.gates import LogSigmoid
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.predictors import Thresholds
from tokred.plan import Ask, Layout, Plan, Reduction, Site, require_module
from tokred.select import keep_where
from tokred.tokens import Tokens, move

QKV, CROSS = Ask("qkv"), Ask("rows", rows="text")
LAYERS = (4, 14, 24)  # of 32
RATES = (1 / 4, 1 / 9, 1 / 16, 1 / 36)
SPATIAL, GATE, MASS = "atp_spatial", "atp_gate", "atp_mass"  # in Tokens.extra


def spatial_scores(
    grid: tuple[int, int], rates: Sequence[float], *, slope: float = 3.0
) -> Float[np.ndarray, " P"]:
    """1 - slope * rate for the places of a uniform grid of every round(rate^-0.5)-th row and
    column, the largest where several meet, 0 elsewhere. Static arguments."""
    score = np.zeros(grid, np.float32)
    for rate in rates:
        step = round(rate**-0.5)
        score[::step, ::step] = np.maximum(score[::step, ::step], 1 - slope * rate)
    return score.reshape(-1)


def self_scores(
    qkv: Float[Array, "*B N 3 H E"], weight: Float[Array, "*B N"]
) -> Float[Array, "*B N"]:
    """The mean over keys up to a token, weighted by `weight`, of its logits before the softmax,
    mean over heads. Gradient: to both."""
    q, k, _ = jnp.moveaxis(qkv.astype(jnp.float32), -3, 0)
    axis = weight.ndim - 1
    total = jnp.maximum(jnp.cumsum(weight, axis), 1e-6)
    keys = jnp.cumsum(k * weight[..., None, None], axis) / total[..., None, None]
    return (q * keys).sum(-1).mean(-1) * q.shape[-1] ** -0.5


def _mean(score: Float[Array, "*B N"], weight: Float[Array, "*B N"]) -> Float[Array, "*B 1"]:
    total = (score * weight).sum(-1, keepdims=True)
    return total / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)


@dataclass(frozen=True)
class ATP(Reduction):
    """A vision token stays if its relevance exceeds the example's first threshold, or its spatial
    score the second; text stays. Positions stay.

    Relevance: the mean of what a token sees of vision (logits) and what text sees of it (attention)
    in this layer. It acts between attention and MLP, which for all that stays is the same as after
    the layer.
    soft (training): m = sigmoid(sharpness margin), the margin being that of the better score, is
    added as log m to the token's key in all later layers. packed: `after` static slots for vision
    tokens, of `before`, with `valid`; of more that stay the lowest margins leave (aux 'overflow').
    causal: masked, with room for all; for decoding. It agrees exactly with the packed form where
    nothing overflows, the soft one only where the gates saturate (a limit of large `sharpness`).

    Reads extra['vision'] and extra['text'], the text of the prompt, bool [*B N]: the queries of the
    attention received. Vision tokens are the raster of `grid`, again and again for several images.
    The prompt must come whole; a token decoded alone decides nothing, and brings False of both. A
    row with fewer than the plan's vision tokens may lose text, counted in 'overflow' too.
    layer, modules, last: this layer's number, how many modules there are, whether it is the last.
    share: of a row's vision tokens that the loss aims at. per_example: whether every example aims
    at it, or the mean of the batch (the formula does not say). standardise: relevance is put to
    mean 0 and variance 1 per example, then through a sigmoid. All fields are static.
    Gradient: in the soft twin to thresholds, and to queries and keys through the scores.
    """

    layer: int
    before: int
    after: int
    share: float = 0.25
    modules: int = 1
    last: bool = True
    grid: tuple[int, int] = (24, 24)
    rates: tuple[float, ...] = RATES
    sharpness: float = 10.0
    standardise: bool = False
    per_example: bool = True
    budget_weight: float = 0.05
    target_weight: float = 0.2
    asks: ClassVar[tuple[Ask, ...]] = (QKV, CROSS)
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def __post_init__(self) -> None:
        routing.check_share("atp", "share", self.share)
        for rate in self.rates:
            routing.check_share("atp", "rates", rate)
        if not 0 <= self.after <= self.before:
            raise ValueError(
                f"atp: {self.after} of {self.before} slots are no share of them; make targets 0 or "
                "more and shares fall from layer to layer."
            )

    def counts(self, n: int, prefix: int) -> int:
        k = n - (self.before - self.after)
        if k <= prefix:
            raise ValueError(
                f"atp: {self.before - self.after} vision tokens cannot leave a sequence of {n}; "
                "lower targets, or decode single tokens under plan.with_twin('causal')."
            )
        return k

    def idle(self, n: int, prefix: int) -> bool:
        return self.share == 1 and self.after == self.before

    def macs(self, n: int, layout: Layout) -> int:
        return n * layout.width

    def expected_count(
        self, n: Array | float, prefix: int, aux: Mapping[str, Any]
    ) -> Array | float:
        return n - aux["left"] if "left" in aux else n

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> Thresholds:
        return Thresholds(width, rngs=rngs)

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
        alone = twin == "causal" and tokens.n == 1
        if alone or self.idle(tokens.n, tokens.prefix):
            return tokens, None, state, {}
        vision = routing.require_extra("atp", tokens, "vision").astype(bool)
        vision = vision if tokens.valid is None else vision & tokens.valid
        tokens = self._begin(tokens, vision)
        margin, threshold = self._margins(tokens, vision, evidence, require_module(self, module))
        aux = {"threshold": threshold, "margin": margin}
        if twin == "soft":
            return self._soft(tokens, vision, margin, state, aux)
        stays, rank = ~vision | (margin > 0), jnp.where(vision, margin, jnp.inf)
        if twin == "causal":
            map_, overflow = routing.keep_decided(stays, tokens.valid), None
        else:
            k = self.counts(tokens.n, tokens.prefix)
            map_, overflow = keep_where(stays, k, scores=rank, valid=tokens.valid)
        aux["kept"] = (vision & routing.selected(map_)).sum(-1)
        aux |= {} if overflow is None else {"overflow": overflow}
        return move(tokens, map_), map_, state, aux

    def _begin(self, tokens: Tokens, vision: Bool[Array, "*B N"]) -> Tokens:
        """Every token's spatial score, known from the first module on, where all are there."""
        if SPATIAL in tokens.extra:
            return tokens
        places = math.prod(self.grid)
        raster = (jnp.cumsum(vision, axis=-1) - 1) % places
        score = jnp.asarray(spatial_scores(self.grid, self.rates))[raster]
        return tokens.replace(extra={**tokens.extra, SPATIAL: jnp.where(vision, score, 0.0)})

    def _margins(
        self,
        tokens: Tokens,
        vision: Bool[Array, "*B N"],
        evidence: Mapping[str, Array],
        module: Any,
    ) -> tuple[Float[Array, "*B N"], Float[Array, "*B 2"]]:
        """By how much the better score of every token exceeds its threshold, and thresholds."""
        gate = tokens.extra.get(GATE)
        weight = vision.astype(jnp.float32) if gate is None else vision * jnp.exp(gate)
        within, across = self_scores(evidence[QKV.name], weight), evidence[CROSS.name]
        means = jnp.concatenate([_mean(within, weight), _mean(across, weight)], axis=-1)
        threshold = module(means)
        relevance = (within + across) / 2
        if self.standardise:
            centred = relevance - _mean(relevance, weight)
            variance = _mean(jnp.square(centred), weight)
            relevance = jax.nn.sigmoid(centred * jax.lax.rsqrt(variance + 1e-6))
        margins = relevance - threshold[..., :1], tokens.extra[SPATIAL] - threshold[..., 1:]
        return jnp.maximum(*margins), threshold

    def _soft(
        self,
        tokens: Tokens,
        vision: Bool[Array, "*B N"],
        margin: Float[Array, "*B N"],
        state: Any,
        aux: dict[str, Array],
    ) -> tuple[Tokens, None, Any, dict[str, Array]]:
        log_gate, _, _ = LogSigmoid(self.sharpness).update(margin)
        log_gate = jnp.where(vision, log_gate, 0.0)
        before = tokens.extra.get(GATE, jnp.zeros_like(log_gate))
        bias = log_gate if tokens.bias is None else tokens.bias + log_gate
        mass = vision * jnp.exp(before + log_gate)
        masses = tokens.extra.get(MASS, jnp.zeros_like(mass)) + mass
        kept, total = mass.sum(-1), vision.sum(-1)
        aux |= {"kept": kept, "left": ((vision * jnp.exp(before)).sum(-1) - kept).mean()}
        aux |= self._losses(kept, masses.sum(-1), total)
        extra = {**tokens.extra, GATE: before + log_gate, MASS: masses}
        return tokens.replace(bias=bias, extra=extra), None, state, aux

    def _losses(
        self, kept: Float[Array, "*B"], masses: Float[Array, "*B"], total: Array
    ) -> dict[str, Array]:
        """Kept tokens cost the more the deeper; their mean over modules shall be the target."""
        share = kept / jnp.maximum(total, 1)
        losses = {"loss_budget": self.budget_weight * self.layer * share.mean()}
        if self.last:
            gap = masses / self.modules - self.share * total
            gap = jnp.abs(gap).mean() if self.per_example else jnp.abs(gap.mean())
            losses["loss_target"] = self.target_weight * gap
        return losses


def default_layers(depth: int) -> tuple[int, ...]:
    """Layers 4, 14, 24 of 32, and the like of other depths."""
    return tuple(sorted({min(depth - 1, round(depth * layer / 32)) for layer in LAYERS}))


@register(
    "atp",
    family="prune",
    site="mid",
    learned=True,
    needs=("vision", "text"),
    count="data-dependent",
    twins="different",
    paper="ATP-LLaVA 2024",
)
def atp(
    layout: Layout,
    *,
    keep: float = 0.25,
    room: float = 2.0,
    targets: int = 0,
    layers: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
    grid: tuple[int, int] = (24, 24),
    rates: Sequence[float] = RATES,
    sharpness: float = 10.0,
    standardise: bool = False,
    per_example: bool = True,
    budget_weight: float = 0.05,
    target_weight: float = 0.2,
) -> Plan:
    """Vision tokens leave that are below an example's own thresholds of relevance and coverage.

    keep: share of vision tokens that the loss aims at; 1 removes nothing. targets: vision tokens
    that every row holds at least. shares: slots behind each module as shares of `targets`, default
    room * keep for all. layers: of the modules, default 4, 14, 24 of 32. Other options: see `ATP`.
    """
    chosen = routing.layers_or(layers, default_layers(layout.depth))
    shares = (min(1.0, room * keep),) * len(chosen) if shares is None else tuple(shares)
    if len(shares) != len(chosen):
        raise ValueError(
            f"atp: {len(shares)} shares for {len(chosen)} layers; give shares one entry per layer."
        )
    after = [math.ceil(round(share * targets, 6)) for share in shares]
    before = [targets, *after[:-1]]
    options = (grid, tuple(rates), sharpness, standardise, per_example)
    weights = (budget_weight, target_weight)
    steps = [
        (Site("mid", i), ATP(i, b, a, keep, len(chosen), i == chosen[-1], *options, *weights))
        for i, b, a in zip(chosen, before, after, strict=True)
    ]
    return Plan(tuple(steps), name="atp")
