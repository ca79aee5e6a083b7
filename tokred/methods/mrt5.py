"""MrT5 (Kallini et al. 2024): a gate inside the encoder deletes tokens for all that follows.

Official code: jkallini/mrt5 (Apache-2.0). Left out: its log-sigmoid gate with entropy terms, the
score regulariser, hard deletion in a share of the training steps. Unlike there the controller
rests in evaluation, and a token survives in every example.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.gates import RateController, SigmoidBias
from tokred.maps import Keep
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.routers import DeleteGate
from tokred.ops.attention import NEGATIVE
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.score import score_by_chance
from tokred.select import keep_where
from tokred.tokens import Tokens, move

GATES = ("learned", "random", "stride")


@dataclass(frozen=True)
class MrT5(Reduction):
    """Tokens whose gate G = scale sigmoid(-logit) does not exceed `threshold` are deleted.

    soft (training): nothing leaves; G is added to the attention logits of a token as key, here, in
    all later layers and in cross-attention. Saves nothing.
    packed: those above the threshold move to the front of prefix + capacity (N - prefix) slots; of
    more than fit the lowest logits go, and aux 'overflow' counts them. If all would go, the first
    stays.
    The twins differ: packed drops the G of what it keeps, as the official code does. corrected:
    packed keeps it, and soft hides what packed deletes, so that they agree exactly.
    positions: after deletion 'keep' (the true distances, official) or 'renumber' without gaps.
    gate: 'learned', or controls that delete `target` of every example, rounded up: 'random',
    'stride'.
    target: deletion rate; 0 deletes nothing. coefficient: of the mean G in the loss; None for a
    `RateController` (proportional, integral, delay, two_sided), whose state is this reduction's
    running state: the loss takes the coefficient of the step before. The rate is the mean over all
    valid tokens of the batch, the one sum over devices that training adds. threshold: None for
    scale / 2.
    Gradient: to the gate through the keys' bias and 'loss_delete'; none through the choice.
    """

    target: float = 0.5
    capacity: float = 0.5
    gate: str = "learned"
    scale: float = -30.0
    threshold: float | None = None
    coefficient: float | None = None
    proportional: float = 0.5
    integral: float = 1e-5
    delay: int = 0
    two_sided: bool = False
    noise: bool = False
    corrected: bool = False
    positions: str = "keep"
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def __post_init__(self) -> None:
        routing.check_share("mrt5", "capacity", self.capacity)
        if not 0 <= self.target < 1:
            raise ValueError(
                f"mrt5: target={self.target} is a deletion rate in [0, 1); change target or keep."
            )
        if not self.scale < 0:
            raise ValueError(f"mrt5: scale={self.scale} must be below 0; change scale.")
        if self.gate not in GATES:
            raise ValueError(f"mrt5: gate={self.gate!r} must be one of {GATES}; change gate.")
        routing.check_positions("mrt5", self.positions)

    def counts(self, n: int, prefix: int) -> int:
        if self.target == 0:
            return n
        return prefix + max(1, routing.share_of(n - prefix, self.capacity))

    def idle(self, n: int, prefix: int) -> bool:
        return self.target == 0

    def init(self) -> Any:
        steers = self.gate == "learned" and self.coefficient is None and self.target > 0
        return self.controller.init() if steers else None

    def macs(self, n: int, layout: Layout) -> int:
        return n * layout.width if self.gate == "learned" else 0

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> DeleteGate | None:
        return DeleteGate(width, rngs=rngs) if self.gate == "learned" and self.target else None

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
        if self.target == 0:
            return tokens, None, state, {}
        logits, gate = self._gate(tokens, module, key, train)
        kept = self._decide(tokens, logits, gate)
        aux: dict[str, Any] = routing.describe(kept, tokens.valid)
        aux |= {"score": logits, "gate": gate}
        if self.gate == "learned" and train:
            state, more = self._regularise(tokens, gate, state, aux["share"])
            aux |= more
        if twin == "soft":
            return self._soften(tokens, gate, kept), None, state, aux
        rank = jnp.where(_prefix(tokens), jnp.inf, logits)
        k = self.counts(tokens.n, tokens.prefix)
        map_, aux["overflow"] = keep_where(kept, k, scores=rank, valid=tokens.valid)
        aux |= routing.describe(routing.selected(map_), tokens.valid)  # what found no slot is gone
        aux["padding"] = 1.0 - routing.mean_over(map_.valid.astype(jnp.float32), None)
        return self._pack(tokens, gate, map_), map_, state, aux

    def _gate(self, tokens: Tokens, module: Any, key: Any, train: bool) -> tuple[Array, Array]:
        """(logits, gates), both [*B N]; padding is closed."""
        if self.gate == "learned":
            logits = require_module(self, module)(tokens.x)
            gate, _, _ = SigmoidBias(self.scale, self.noise).update(logits, key=key, train=train)
        else:
            logits = self._control(tokens, key)
            gate = jnp.where(logits > 0, 0.0, self.scale)
        return logits, gate if tokens.valid is None else jnp.where(tokens.valid, gate, self.scale)

    def _control(self, tokens: Tokens, key: Any) -> Float[Array, "*B N"]:
        """1 for tokens that a control keeps, -1 for the others."""
        free = ~_prefix(tokens) if tokens.valid is None else tokens.valid & ~_prefix(tokens)
        keep = lambda n: max(1, routing.share_of(n, 1 - self.target))  # noqa: E731
        if self.gate == "random":
            if key is None:
                raise ValueError("mrt5: gate='random' draws; pass Call(key=...).")
            map_ = routing.keep_share(score_by_chance(key, free.shape), keep, free)
            return jnp.where(routing.selected(map_), 1.0, -1.0)
        total = free.sum(-1, keepdims=True)
        count, rank = routing.of_count(keep, tokens.n, total), jnp.cumsum(free, -1)
        reached = lambda r: (r * count) // jnp.maximum(total, 1)  # noqa: E731
        return jnp.where(free & (reached(rank) > reached(rank - 1)), 1.0, -1.0)

    def _decide(self, tokens: Tokens, logits: Array, gate: Array) -> Bool[Array, "*B N"]:
        """Which tokens stay: the prefix, and those above the threshold, or else the first."""
        threshold = self.scale / 2 if self.threshold is None else self.threshold
        prefix = _prefix(tokens)
        free = ~prefix if tokens.valid is None else tokens.valid & ~prefix
        kept = routing.at_least_one(gate > threshold, jnp.zeros_like(logits), free)
        return kept | (prefix if tokens.valid is None else prefix & tokens.valid)

    def _regularise(
        self, tokens: Tokens, gate: Array, state: Any, share: Array
    ) -> tuple[Any, dict[str, Any]]:
        """(state after this step, loss and coefficient)."""
        mean = routing.mean_over(gate, tokens.valid)
        if self.coefficient is not None:
            return state, {"loss_delete": self.coefficient * mean}
        if state is None:
            raise ValueError(
                "mrt5: training under a controller needs its state, which is missing; pass "
                "Call(states=plan.init()), restore it, or set coefficient=."
            )
        told = {"loss_delete": state["coefficient"] * mean, "coefficient": state["coefficient"]}
        return self.controller.update(1.0 - share, state), told

    @property
    def controller(self) -> RateController:
        """What steers the coefficient where it is not fixed."""
        return RateController(
            self.target, self.proportional, self.integral, self.delay, self.two_sided
        )

    def _soften(self, tokens: Tokens, gate: Array, kept: Array) -> Tokens:
        gate = jnp.where(kept, gate, NEGATIVE) if self.corrected else gate
        gate = jnp.where(_prefix(tokens), 0.0, gate)
        softer = tokens.replace(bias=_sum(tokens.bias, gate))
        if self.positions == "keep":
            return softer
        return softer.replace(position=routing.renumber(tokens.replace(valid=kept)).position)

    def _pack(self, tokens: Tokens, gate: Array, map_: Keep) -> Tokens:
        if self.corrected:
            gate = jnp.where(_prefix(tokens), 0.0, gate)
            tokens = tokens.replace(bias=_sum(tokens.bias, gate))
        packed = move(tokens, map_)
        return packed if self.positions == "keep" else routing.renumber(packed)


def _prefix(tokens: Tokens) -> Bool[Array, "*B N"]:
    first = jnp.arange(tokens.n) < tokens.prefix
    return jnp.broadcast_to(first, (*tokens.batch, tokens.n))


def _sum(bias: Array | None, gate: Array) -> Array:
    return gate if bias is None else bias + gate


@register(
    "mrt5",
    family="delete",
    site="before",
    learned=True,
    count="data-dependent",
    twins="different",
    paper="MrT5 2024",
    golden=(
        "core/mrt5__gate",
        "core/mrt5__encoder",
        "core/mrt5__soft_attention",
        "core/mrt5__softmax1",
        "core/mrt5__pi_controller",
        "core/mrt5__span_corruption",
        "core/mrt5__span_lengths",
    ),
)
def mrt5(
    layout: Layout,
    *,
    keep: float = 0.5,
    layer: int | None = None,
    capacity: float | None = None,
    gate: str = "learned",
    scale: float = -30.0,
    threshold: float | None = None,
    coefficient: float | None = None,
    proportional: float = 0.5,
    integral: float = 1e-5,
    delay: int = 0,
    two_sided: bool = False,
    noise: bool = False,
    corrected: bool = False,
    positions: str = "keep",
) -> Plan:
    """A gate before one layer deletes tokens, steered to a rate; soft in training, packed after.

    keep: 1 - the deletion rate aimed at; 1 deletes nothing. layer: default 3, or the middle of
    models with fewer than six. capacity: slots that a packed sequence has, as a share of its
    tokens, default keep. Other options: see `MrT5`.
    """
    layer = (3 if layout.depth >= 6 else layout.depth // 2) if layer is None else layer
    reduction = MrT5(
        round(1 - keep, 6), keep if capacity is None else capacity, gate, scale, threshold,
        coefficient, proportional, integral, delay, two_sided, noise, corrected, positions,
    )  # fmt: skip
    return Plan(((Site("before", layer), reduction),), name="mrt5")
