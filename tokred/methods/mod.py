"""Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258): a layer for a few tokens of its choice.

No official code exists. Where the paper is silent: positions are kept, the router starts as
N(0, 1/D), the auxiliary loss weighs 0.01, the predictor is D -> D/2 -> SiLU -> 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.combine import Combine
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.routers import TokenRouter
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.schedule import decaying_ratios
from tokred.select import keep_where
from tokred.tokens import Tokens

GATES = ("aux", "predictor", None)
ROUTERS = ("learned", "random")


@dataclass(frozen=True)
class MoD(Reduction):
    """The `capacity` share of a sequence with the highest router scores r enters the layer; they
    become x + r f(x), the others stay x.

    packed: the chosen are gathered. soft: all stay in their slots, the others hidden from them; the
    twins agree exactly. causal: the gate decides for every token alone: gate='aux' the router
    itself, trained by a membership loss of weight `aux_weight`; 'predictor' a small MLP that reads
    a copy without gradient; None trains none.
    squash: a sigmoid on r. rule: see `Combine`. router='random' draws scores (the paper's control).
    prefill: slots for causal decisions about several tokens at once, as a share of them; None for
    all, so that nothing is saved; those that find no slot skip and are counted. cache: slots of the
    layer's cache as a share of a dense layer's.
    Gradient: to the router through r, and from the membership loss; none through the choice.
    """

    capacity: float
    gate: str | None = "aux"
    router: str = "learned"
    rule: str = "residual"
    squash: bool = False
    aux_weight: float = 0.01
    prefill: float | None = None
    cache: float = 1.0
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def __post_init__(self) -> None:
        for field in ("capacity", "cache", "prefill"):
            if getattr(self, field) is not None:
                routing.check_share("mod", field, getattr(self, field))
        for field, known in (("gate", GATES), ("router", ROUTERS)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"mod: {field}={getattr(self, field)!r} must be one of {known}; change it."
                )

    @property
    def decides(self) -> bool:
        return self.gate is not None and self.router == "learned"

    def counts(self, n: int, prefix: int) -> int:
        k = routing.share_of(n, self.capacity)
        return routing.check_capacity("mod", "capacity", self.capacity, k, n)

    def slots(self, n: int, prefix: int, twin: str) -> int:
        if twin == "packed":
            return self.counts(n, prefix)
        if twin == "causal" and n > 1 and self.prefill is not None:
            return max(1, routing.share_of(n, self.prefill))
        return n

    def cached(self, length: int) -> int:
        return max(1, routing.share_of(length, self.cache))

    def macs(self, n: int, layout: Layout) -> int:
        d = layout.width
        return n * d + (n * (d * (d // 2) + d // 2) if self.gate == "predictor" else 0)

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> TokenRouter:
        return TokenRouter(width, predictor=self.gate == "predictor", rngs=rngs)

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
        if self.capacity == 1:
            return tokens, None, state, {}
        router = require_module(self, module)
        scores = router(tokens.x)
        if twin == "causal":
            map_, aux = self._decide(tokens, router, scores)
        else:
            map_, aux = self._choose(tokens, router, scores, key)
        weight = jax.nn.sigmoid(scores) if self.squash else scores
        reduced, map_, weight = routing.enter(tokens, map_, weight, twin=twin)
        aux |= {"combine": Combine(weight, rule=self.rule), "score": scores}
        return reduced, map_, state, aux

    def _choose(
        self, tokens: Tokens, router: Any, scores: Float[Array, "*B N"], key: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The best by score, and how well the gate knows them."""
        rank = self._draw(scores, key) if self.router == "random" else scores
        map_ = routing.keep_share(rank, lambda n: max(1, self._count(n)), tokens.valid)
        chosen = routing.selected(map_)
        aux: dict[str, Any] = routing.describe(chosen, tokens.valid)
        if self.gate is not None:
            gate = self._gate(tokens, router, scores)
            loss = routing.membership_loss(gate, chosen, tokens.valid)
            agrees = ((gate > 0) == chosen).astype(jnp.float32)
            aux["loss_gate"] = self.aux_weight * loss
            aux["agreement"] = routing.mean_over(agrees, tokens.valid)
        return map_, aux

    def _count(self, n: int) -> int:
        return routing.share_of(n, self.capacity)

    def _decide(
        self, tokens: Tokens, router: Any, scores: Float[Array, "*B N"]
    ) -> tuple[Any, dict[str, Any]]:
        """Each token by its gate."""
        decision = self._gate(tokens, router, scores) > 0
        k = self.slots(tokens.n, tokens.prefix, "causal")
        if k == tokens.n:
            map_ = routing.keep_decided(decision, tokens.valid)
            return map_, routing.describe(routing.selected(map_), tokens.valid)
        map_, overflow = keep_where(decision, k, scores=scores, valid=tokens.valid)
        aux = routing.describe(routing.selected(map_), tokens.valid)
        return map_, {**aux, "overflow": overflow}

    def _gate(self, tokens: Tokens, router: Any, scores: Array) -> Float[Array, "*B N"]:
        if self.gate is None:
            raise ValueError(
                "mod: decoding needs a trained gate, and gate=None trains none; use gate='aux' or "
                "gate='predictor'."
            )
        return scores if self.gate == "aux" else router.predict(tokens.x)

    def _draw(self, scores: Array, key: Any) -> Array:
        if key is None:
            raise ValueError("mod: router='random' draws scores; pass Call(key=...).")
        return jax.random.normal(key, scores.shape)


@register(
    "mod",
    family="skip",
    site="around",
    learned=True,
    twins="exact",
    trains="packed",
    paper="Mixture-of-Depths 2024",
)
def mod(
    layout: Layout,
    *,
    keep: float = 0.125,
    layers: Sequence[int] | None = None,
    decay: str | None = None,
    gate: str | None = "aux",
    router: str = "learned",
    rule: str = "residual",
    squash: bool = False,
    aux_weight: float = 0.01,
    prefill: float | None = None,
    cache: float = 1.0,
) -> Plan:
    """Every second layer processes only the tokens its router scores highest.

    keep: capacity, the share of tokens that enter. layers: where, default 1, 3, 5, ...
    decay: capacities that fall with depth, as in p-MoD, with keep as their mean over all layers;
    the schedule of `schedule.decaying_ratios`; layers: default all that are not dense then.
    Other options: see `MoD`.
    """
    options = (gate, router, rule, squash, aux_weight, prefill, cache)
    shares = (keep,) * layout.depth
    default = routing.alternate_layers(layout)
    if decay is not None:
        shares = decaying_ratios(layout.depth, keep, kind=decay)
        default = tuple(i for i, share in enumerate(shares) if share < 1)
    chosen = routing.layers_or(layers, default)
    return Plan(tuple((Site("around", i), MoD(shares[i], *options)) for i in chosen), name="mod")
