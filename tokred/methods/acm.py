"""Adaptive Computation Modules (Wojcik et al. 2023): every token chooses how wide its MLP is.

Official code: bartwojcik/adaptive_computation_modules (MIT). Distillation: `tokred.train.acm`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tokred.combine import Combine
from tokred.gates import GumbelChoice
from tokred.maps import Keep
from tokred.methods.registry import register
from tokred.nn.learners import CountGate, GatedLearners, Learners, gate_sizes, learner_width
from tokred.plan import Ask, Layout, Plan, Reduction, Site, require_module
from tokred.tokens import Tokens, move

NORMED = Ask("normed")


@dataclass(frozen=True)
class ACM(Reduction):
    """In place of the MLP branch: learners, one for each of `shares`, as many as a gate chooses
    for a token.

    No token enters the MLP; the whole branch, a LayerScale included, is what the learners give.
    soft: all learners run; hard Gumbel choices in training, the likeliest count otherwise.
    packed: learner j takes the ceil(shares[j] N) tokens of each example with the largest counts,
    the others go without it (aux 'overflow'). The twins agree exactly where nothing overflows and
    rule='exact'. causal: as soft, since tokens choose alone.

    hidden: width of a learner. target: share of the cost of all learners. rule: see
    `Learners.packed`. aux: 'choice' the counts [*B N], 'cost' [*B] the mean count over the number
    of learners, and in the soft twin three losses: of the budget, of the entropy of counts (to
    use them all), of the diversity of examples. Officially the budget is met, and examples differ,
    over all sites together; one site sees itself alone, so `loss_budget` and `loss_diversity` are
    that site's. `joint_losses` forms the official ones; then build the plan with budget=0,
    diversity=0.
    """

    hidden: int
    shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    target: float = 0.6
    budget: float = 0.1
    entropy: float = 0.05
    diversity: float = 0.05
    temperature: float = 0.8
    gate_hidden: int = 16
    gate_depth: int = 3
    activation: str = "gelu"
    bias: str = "hidden"
    rule: str = "exact"
    asks: ClassVar[tuple[Ask, ...]] = (NORMED,)
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    @property
    def learners(self) -> int:
        return len(self.shares)

    def counts(self, n: int, prefix: int) -> int:
        return 0

    def slots(self, n: int, prefix: int, twin: str) -> int:
        return 0

    def capacities(self, n: int) -> tuple[int, ...]:
        """Tokens of an example that each learner has room for; static."""
        return tuple(max(1, math.ceil(round(share * n, 6))) for share in self.shares)

    def macs(self, n: int, layout: Layout) -> int:
        sizes = gate_sizes(
            layout.width, self.learners, hidden=self.gate_hidden, depth=self.gate_depth
        )
        gate = sum(a * b for a, b in sizes)
        return n * gate + 2 * sum(self.capacities(n)) * layout.width * self.hidden

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> GatedLearners:
        gate = CountGate(
            width, self.learners, hidden=self.gate_hidden, depth=self.gate_depth, rngs=rngs
        )
        learners = Learners(
            width, self.learners, self.hidden, activation=self.activation, bias=self.bias, rngs=rngs
        )
        return GatedLearners(learners, gate)

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
    ) -> tuple[Tokens, Keep, Any, dict[str, Any]]:
        layer, x = require_module(self, module), evidence[NORMED.name]
        logits = layer.gate(x)
        choice, _, _ = GumbelChoice(self.temperature).update(
            logits, key=key, train=train and twin != "packed"
        )
        if tokens.valid is not None:
            choice = choice * tokens.valid[..., None]
        count = choice @ jnp.arange(self.learners + 1, dtype=choice.dtype)
        cost = _mean(count, tokens.valid) / self.learners
        aux: dict[str, Any] = {"choice": count.astype(jnp.int32), "cost": cost}
        if twin == "packed":
            y, aux["overflow"] = layer.learners.packed(
                x, aux["choice"], self.capacities(tokens.n), rule=self.rule
            )
        else:
            y = layer.learners.masked(x, choice)
            aux |= self._losses(choice, cost)
        aux["combine"] = Combine(fill=tokens.x + y.astype(tokens.x.dtype))
        nobody = Keep(jnp.zeros((*tokens.batch, 0), jnp.int32), tokens.n)
        return move(tokens, nobody), nobody, state, aux

    def _losses(self, choice: Array, cost: Array) -> dict[str, Array]:
        """Those whose weight is not 0; pairs of examples need all costs on every device."""
        losses = {
            "budget": lambda: self.budget * budget_loss([cost], self.target),
            "entropy": lambda: self.entropy * entropy_loss(choice),
            "diversity": lambda: self.diversity * diversity_loss([cost], self.learners),
        }
        return {f"loss_{name}": loss() for name, loss in losses.items() if getattr(self, name)}


def _mean(values: Float[Array, "*B N"], valid: Any) -> Float[Array, "*B"]:
    """Over valid tokens; those that are not have value 0."""
    return values.mean(-1) if valid is None else values.sum(-1) / jnp.maximum(valid.sum(-1), 1)


def budget_loss(costs: Sequence[Float[Array, "*B"]], target: float) -> Float[Array, ""]:
    """|mean cost - target| over the examples and all sites together; costs are shares per site."""
    return jnp.abs(jnp.stack(costs).mean() - target)


def entropy_loss(choice: Float[Array, "*B N k"]) -> Float[Array, ""]:
    """Minus the entropy of how an example's tokens spread over the k counts, 1 if evenly; mean.

    choice: one-hot or soft, 0 for padding.
    """
    total = choice.sum(-2)
    share = total / jnp.maximum(total.sum(-1, keepdims=True), 1e-6)
    return (share * jnp.log(share + 1e-20)).sum(-1).mean() / math.log(choice.shape[-1])


def diversity_loss(costs: Sequence[Float[Array, "*B"]], learners: int) -> Float[Array, ""]:
    """-2 x mean over pairs of examples |c - c'|; c is an example's mean over all sites.

    As officially, c counts learners divided by the number of choices, learners + 1.
    """
    mean = jnp.stack(costs).mean(0).reshape(-1) * learners / (learners + 1)
    return -2 * jnp.abs(mean[:, None] - mean[None, :]).mean()


def joint_losses(
    aux: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    *,
    budget: float = 0.1,
    diversity: float = 0.05,
) -> dict[str, Float[Array, ""]]:
    """The official budget and diversity losses, weighed, over all ACM sites of a report's aux.

    Raises:
      ValueError: the plan has no such site.
    """
    sites = [(site.name, r) for site, r in plan.steps if isinstance(r, ACM)]
    if not sites:
        raise ValueError(f"joint_losses: plan {plan.name!r} has no ACM; pass a plan of 'acm'.")
    costs, first = [aux[name]["cost"] for name, _ in sites], sites[0][1]
    return {
        "loss_budget": budget * budget_loss(costs, first.target),
        "loss_diversity": diversity * diversity_loss(costs, first.learners),
    }


def even_shares(learners: int, target: float) -> tuple[float, ...]:
    """Shares of tokens per learner that cost `target` of all: as if each of a token's learners
    ran by that chance (a binomial count)."""
    chance = [
        math.comb(learners, k) * target**k * (1 - target) ** (learners - k)
        for k in range(learners + 1)
    ]
    return tuple(min(1.0, sum(chance[j:])) for j in range(1, learners + 1))


def measure_shares(
    counts: Int[Array, "*B N"] | np.ndarray, learners: int, *, quantile: float = 1.0
) -> tuple[float, ...]:
    """Shares with room for the counts (aux 'choice') of that quantile of examples; 1: of all."""
    counts = np.asarray(counts)
    reach = [(counts >= j).mean(-1) for j in range(1, learners + 1)]
    return tuple(float(np.quantile(share, quantile)) for share in reach)


@register(
    "acm",
    family="skip",
    site="around_mlp",
    learned=True,
    twins="exact",
    golden=("core/acm",),
    paper="ACM 2023",
)
def acm(
    layout: Layout,
    *,
    keep: float = 0.6,
    layers: Sequence[int] | None = None,
    learners: int = 4,
    factor: float = 1.0,
    mlp_ratio: float = 4.0,
    shares: Sequence[float] | None = None,
    activation: str = "gelu",
    bias: str = "hidden",
    rule: str = "exact",
    budget: float = 0.1,
    entropy: float = 0.05,
    diversity: float = 0.05,
) -> Plan:
    """Learners in place of MLPs, as many per token as a gate chooses; trained to a budget.

    keep: target share of the learners' cost. layers: all by default. factor: cost of all learners
    over that of the MLP, whose hidden width is mlp_ratio times the model's. shares: of tokens that
    each learner has room for when packed, by default `even_shares`; see `measure_shares`. budget,
    entropy, diversity: weights of the losses, shared by the layers. Else see `ACM`, `Learners`.
    """
    chosen = range(layout.depth) if layers is None else layers
    sites = max(len(chosen), 1)
    hidden = int(layout.width * mlp_ratio)
    reduction = ACM(
        hidden=learner_width(layout.width, learners, hidden=hidden, factor=factor),
        shares=even_shares(learners, keep) if shares is None else tuple(shares),
        target=keep,
        budget=budget / sites,
        entropy=entropy / sites,
        diversity=diversity / sites,
        activation=activation,
        bias=bias,
        rule=rule,
    )
    if len(reduction.shares) != learners:
        raise ValueError(
            f"acm: shares={reduction.shares} must be one per learner, {learners}; change shares."
        )
    return Plan(tuple((Site("around_mlp", i), reduction) for i in chosen), name="acm")
