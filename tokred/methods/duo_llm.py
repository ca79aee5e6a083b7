"""Duo-LLM (Alizadeh et al. 2024): per token and layer the big MLP, a small one beside it, or none.

No official code exists. Where the paper is silent: the small MLP is a quarter as wide, the share of
big ones in random training is uniform in [0, 1], the router is linear with Gumbel temperature 1.
Stages: 1. choice='random', soft, trains both MLPs · 2. `search_oracle`, with choice='assigned'
· 3. choice='router', soft, trains routers; run packed.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tokred.combine import Combine
from tokred.gates import GumbelChoice
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.routers import DuoMlp
from tokred.plan import Ask, Layout, Plan, Reduction, Site, require_module
from tokred.tokens import Tokens, move

NORMED = Ask("normed")
BYPASS, SMALL, BIG = 0, 1, 2
CHOICES = ("router", "random", "assigned")


@dataclass(frozen=True)
class DuoLLM(Reduction):
    """Around the MLP: tokens that choose big enter it, the others become x + small(norm x) or x.

    choice: 'router' the likeliest by its logits, a straight-through Gumbel draw in training
    · 'random' big by a chance drawn per example and layer, else small; needs a key · 'assigned'
    column `layer` of extra['assignment'], Int[*B N L] of BYPASS, SMALL and BIG.
    soft: all is computed and weighed by the choice, so that the router learns. packed: slots for a
    share `big` and `small` of an example's tokens (None: `target`, and all); those that find none
    bypass and are counted. The twins agree exactly where nothing overflows. causal: masked, with a
    slot for every token.
    hidden: of the small MLP, None for a quarter of a decoder's default. target: share of tokens
    that choose big, which `budget` (share - target)^2 asks for in this layer; the method's own loss
    is that of the mean over layers, see `joint_budget_loss`.
    """

    target: float
    choice: str = "router"
    big: float | None = None
    small: float = 1.0
    budget: float = 1.0
    hidden: int | None = None
    activation: str = "silu"
    temperature: float = 1.0
    layer: int | None = None
    asks: ClassVar[tuple[Ask, ...]] = (NORMED,)
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise ValueError(
                f"duo_llm: choice={self.choice!r} must be one of {CHOICES}; change choice."
            )
        for field in ("target", "big", "small"):
            if getattr(self, field) is not None:
                routing.check_share("duo_llm", field, getattr(self, field))

    def counts(self, n: int, prefix: int) -> int:
        return routing.room_of(n, self.target if self.big is None else self.big)

    def width(self, width: int) -> int:
        """Hidden width of the small MLP in a model of this width."""
        return -(-8 * width // 3 // 64) * 16 if self.hidden is None else self.hidden

    def macs(self, n: int, layout: Layout) -> int:
        small = 3 * layout.width * self.width(layout.width)
        router = 3 * layout.width * n if self.choice == "router" else 0
        return router + routing.room_of(n, self.small) * small

    def expected_count(
        self, n: Array | float, prefix: int, aux: Mapping[str, Any]
    ) -> Array | float:
        return n * aux["share"]

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> DuoMlp:
        return DuoMlp(width, self.width(width), activation=self.activation, rngs=rngs)

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
    ) -> tuple[Tokens, Any, Any, dict[str, Any]]:
        if self.choice == "router" and self.target == 1:
            return tokens, None, state, {}
        duo, x = require_module(self, module), evidence[NORMED.name]
        logits = duo(x)
        chosen = self._choose(tokens, logits, key, train)
        if twin == "soft":
            reduced, map_, aux = _weighed(tokens, x, duo, chosen)
        else:
            room = self if twin == "packed" else None
            reduced, map_, aux = _routed(tokens, x, duo, chosen, logits[..., BIG], room)
        share = routing.mean_over(chosen[..., BIG], tokens.valid)
        aux |= {"choice": jnp.argmax(chosen, -1), "share": share}
        if self.choice == "router" and self.budget:
            aux["loss_budget"] = self.budget * jnp.square(share - self.target)
        return reduced, map_, state, aux

    def _choose(
        self, tokens: Tokens, logits: Float[Array, "*B N 3"], key: Any, train: bool
    ) -> Float[Array, "*B N 3"]:
        """One-hot. Gradient: to logits, if the router chooses."""
        if self.choice == "router":
            return GumbelChoice(self.temperature).update(logits, key=key, train=train)[0]
        if self.choice == "assigned":
            given = jnp.asarray(routing.require_extra("duo_llm", tokens, "assignment"))
            return jax.nn.one_hot(given[..., self.layer], 3)
        if key is None:
            raise ValueError("duo_llm: choice='random' draws the choices; pass Call(key=...).")
        return jax.nn.one_hot(random_assignment(key, (*tokens.batch, tokens.n), 1)[..., 0], 3)


def _weighed(
    tokens: Tokens, x: Array, duo: DuoMlp, chosen: Float[Array, "*B N 3"]
) -> tuple[Tokens, Any, dict[str, Any]]:
    """Everything computed: x + big weight MLP(x) + small weight small(x)."""
    small = duo.small(x) * chosen[..., SMALL, None]
    fill = tokens.x + small.astype(tokens.x.dtype)
    return tokens, None, {"combine": Combine(chosen[..., BIG], fill)}


def _routed(
    tokens: Tokens,
    x: Array,
    duo: DuoMlp,
    chosen: Float[Array, "*B N 3"],
    scores: Float[Array, "*B N"],
    room: DuoLLM | None,
) -> tuple[Tokens, Any, dict[str, Any]]:
    """Each token where it chose to go, in the slots that `room` leaves; None: in its own slot."""
    big = (lambda n: n) if room is None else (lambda n: room.counts(n, 0))
    some = (lambda n: n) if room is None else (lambda n: routing.room_of(n, room.small))
    enters, valid = chosen > 0.5, tokens.valid
    map_, over = routing.keep_chosen(enters[..., BIG], big, valid, scores=scores)
    beside, beyond = routing.keep_chosen(enters[..., SMALL], some, valid)
    update = beside.restore(duo.small(beside.apply(x)))
    fill = tokens.x + update.astype(tokens.x.dtype)
    aux = {"combine": Combine(fill=fill), "overflow": over + beyond}
    return move(tokens, map_), map_, aux


def joint_budget_loss(
    aux: Mapping[str, Mapping[str, Array]], plan: Plan, *, weight: float = 1.0
) -> Float[Array, ""]:
    """weight (mean share of big over all layers - target)^2 of a report's aux, in place of the
    layers' own `loss_budget` (budget=0): then layers may differ. Gradient: to the routers.

    Raises:
      ValueError: the plan has no such layer.
    """
    sites = [(site.name, r) for site, r in plan.steps if isinstance(r, DuoLLM)]
    if not sites:
        raise ValueError(
            f"joint_budget_loss: plan {plan.name!r} has no DuoLLM; pass a plan of 'duo_llm'."
        )
    share = jnp.stack([aux[name]["share"] for name, _ in sites]).mean()
    return weight * jnp.square(share - sites[0][1].target)


def random_assignment(
    key: PRNGKeyArray, batch: tuple[int, ...], layers: int
) -> Int[Array, "*B N L"]:
    """Stage 1, for a batch (*B, N): BIG by a chance that each example draws from [0, 1], the same
    in all layers, else SMALL."""
    first, second = jax.random.split(key)
    chance = jax.random.uniform(first, (*batch[:-1], 1, 1))
    big = jax.random.uniform(second, (*batch, layers)) < chance
    return jnp.where(big, BIG, SMALL).astype(jnp.int32)


def budget_patterns(
    layers: int, budget: int, rng: np.random.Generator, *, samples: int = 100
) -> Int[np.ndarray, "P L"]:
    """Patterns with `budget` BIG layers, else SMALL: all of them where budget <= 2 or where they
    are no more than `samples`, else so many random ones.

    Raises:
      ValueError: a budget beyond the layers.
    """
    if not 0 <= budget <= layers:
        raise ValueError(
            f"budget_patterns: budget={budget} must lie in [0, {layers}], the layers; change it."
        )
    if budget <= 2 or math.comb(layers, budget) <= samples:
        where = list(itertools.combinations(range(layers), budget))
    else:
        where = [rng.choice(layers, budget, replace=False) for _ in range(samples)]
    patterns = np.full((len(where), layers), SMALL, np.int32)
    for pattern, big in zip(patterns, where, strict=True):
        pattern[list(big)] = BIG
    return patterns


class Oracle(NamedTuple):
    """Lowest loss of every token, and the pattern that reached it."""

    loss: Float[Array, "B N"]
    pattern: Int[Array, "B N L"]


def search_oracle(
    token_loss: Callable[[Int[Array, "B N L"]], Float[Array, "B N"]],
    base: Int[Array, "B N L"],
    patterns: Int[Any, "P L"],
) -> Oracle:
    """Stage 2: the best of `patterns` for every token, the other tokens fixed to `base`.

    token_loss: assignment -> the loss of each token, such as a model under choice='assigned'. Costs
    P x N calls of it. The search reads the labels: its loss is a bound on what choosing can give
    one token, not a number that a model can achieve; say so wherever it stands next to routers.
    """
    patterns = jnp.asarray(patterns)

    def of_token(pattern: Array, i: Array) -> Array:
        return token_loss(base.at[:, i].set(pattern))[:, i]

    every = jnp.arange(base.shape[1])
    of_pattern = lambda pattern: jax.lax.map(lambda i: of_token(pattern, i), every)  # noqa: E731
    losses = jnp.swapaxes(jax.lax.map(of_pattern, patterns), 1, 2)  # [P B N]
    return Oracle(losses.min(0), patterns[losses.argmin(0)])


@register(
    "duo_llm",
    family="skip",
    site="around_mlp",
    learned=True,
    count="data-dependent",
    twins="exact",
    paper="Duo-LLM 2024",
)
def duo_llm(
    layout: Layout,
    *,
    keep: float = 0.5,
    layers: Sequence[int] | None = None,
    choice: str = "router",
    big: float | None = None,
    small: float = 1.0,
    budget: float = 1.0,
    hidden: int | None = None,
    activation: str = "silu",
) -> Plan:
    """Each token takes a layer's big MLP, a small one beside it, or neither.

    keep: share of (token, layer) pairs that may take the big one; 1 leaves the layers dense.
    layers: all by default. budget: weight of the loss that asks for it, shared by the layers.
    Other options: see `DuoLLM`.
    """
    chosen = routing.layers_or(layers, range(layout.depth))
    reductions = [
        DuoLLM(
            keep,
            choice,
            big,
            small,
            budget / max(len(chosen), 1),
            hidden,
            activation,
            layer=layer if choice == "assigned" else None,
        )
        for layer in chosen
    ]
    sites = (Site("around_mlp", layer) for layer in chosen)
    return Plan(tuple(zip(sites, reductions, strict=True)), name="duo_llm")
