"""gamma-MoD (Luo et al. 2024): layers of low attention rank, for the tokens that one router picks.

Official code: Yaxin9Luo/Gamma-MOD (MIT).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokred.combine import Combine
from tokred.maps import Keep
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.routers import PairRouter
from tokred.plan import Ask, Layout, Plan, Reduction, Site, require_module
from tokred.tokens import Tokens

NORMED, CACHED, PROBS = Ask("normed"), Ask("cached"), Ask("probs")
DENSE_LAYERS = (0, 1, 2)  # released default, and the last one
ENTER = 0.5  # a token that is decoded enters from this probability on


@dataclass(frozen=True)
class GammaMoD(Reduction):
    """With p a token's probability of entering, by a router on the normalised input: those that
    enter become u + p MLP(u), u = x + Attention among them; the others stay x.

    packed and soft, which agree exactly: of n tokens the n - floor((1 - keep) routable)
    with the highest p enter, those of extra['protected'] (bool [*B N]) before all others; a
    cross-entropy of weight `aux_weight` teaches the router who did. With prefill, for inference,
    those with p > threshold enter instead, in slots for that share of the tokens. causal: p >= 0.5.

    routable: how many tokens the share to drop is taken of; None for all (released: the 1024
    image tokens and 35 others, and of a sequence no longer than that all enter). protect: False
    reads no extra. protected: how many such tokens a row holds at most, where that is known: then
    more than fit is an error at once. aux 'overflow' counts per row the protected, or with prefill
    the willing, tokens that found no slot.
    positions: 'renumber' 0, 1, ... among those that ever entered the layer, as released, or 'keep'.
    shared: one router for all layers. cache: slots of the layer's cache as a share of a dense
    layer's. Gradient: to the router through p, and from the loss; none through the choice.
    """

    keep: float
    routable: int | None = None
    protect: bool = True
    protected: int = 0
    prefill: float | None = None
    threshold: float = 0.005
    positions: str = "renumber"
    shared: bool = True
    aux_weight: float = 0.01
    cache: float = 1.0
    asks: ClassVar[tuple[Ask, ...]] = (NORMED, CACHED)
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def __post_init__(self) -> None:
        for field in ("keep", "cache", "prefill"):
            if getattr(self, field) is not None:
                routing.check_share("gammamod", field, getattr(self, field))
        routing.check_positions("gammamod", self.positions)
        if self.routable is not None and self.routable < 1:
            raise ValueError(f"gammamod: routable={self.routable} must be at least 1; raise it.")

    def counts(self, n: int, prefix: int) -> int:
        if self.keep < 1 and self.prefill is not None:
            return routing.room_of(n, self.prefill)
        k = routing.check_capacity("gammamod", "keep", self.keep, self._entering(n), n)
        if self.protected > k:
            raise ValueError(
                f"gammamod: protected={self.protected} tokens exceed the {k} of {n} that may enter "
                f"a layer; raise keep={self.keep} or lower routable={self.routable}."
            )
        return k

    def _entering(self, n: int) -> int:
        if self.routable is None:
            return n - routing.share_of(n, 1 - self.keep)
        return n if n <= self.routable else n - routing.share_of(self.routable, 1 - self.keep)

    def cached(self, length: int) -> int:
        return routing.room_of(length, self.cache)

    def module_name(self, site: Site) -> str:
        return "gammamod" if self.shared else site.name

    def macs(self, n: int, layout: Layout) -> int:
        return 2 * n * layout.width

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> PairRouter:
        return PairRouter(width, rngs=rngs)

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
        if self.keep == 1:
            return tokens, None, state, {}
        logits = require_module(self, module)(evidence[NORMED.name])
        logits = logits[..., 1] - logits[..., 0]  # of entering, in a softmax over two
        chance = jax.nn.sigmoid(logits)
        map_, aux = self._choose(tokens, logits, chance, twin)
        reduced, map_, weight = routing.enter(tokens, map_, chance, twin=twin)
        if self.positions == "renumber":
            reduced = routing.renumber(reduced, evidence[CACHED.name][..., :1])
        aux |= routing.describe(routing.selected(map_), tokens.valid)
        aux |= {"score": chance, "combine": Combine(weight, rule="mlp_branch")}
        return reduced, map_, state, aux

    def _choose(
        self, tokens: Tokens, logits: Array, chance: Float[Array, "*B N"], twin: str
    ) -> tuple[Keep, dict[str, Any]]:
        valid = tokens.valid
        if twin == "causal":
            return routing.keep_decided(chance >= ENTER, valid), {}
        if self.prefill is None:
            return self._best(tokens, logits, twin)
        willing, room = chance > self.threshold, partial(routing.room_of, share=self.prefill)
        map_, overflow = routing.keep_chosen(willing, room, valid, scores=logits)
        return map_ if twin == "packed" else map_.masked(), {"overflow": overflow}

    def _best(self, tokens: Tokens, logits: Array, twin: str) -> tuple[Keep, dict[str, Any]]:
        """The likeliest, protected tokens first, and what the router learns from that."""
        self.counts(tokens.n, tokens.prefix)  # raises where protected tokens do not fit
        protected = self._protected(tokens)
        rank = jnp.where(protected, jnp.inf, logits)  # officially + 1 on chances, which may tie
        map_ = routing.keep_share(rank, self._entering, tokens.valid)
        chosen = routing.selected(map_)
        loss = routing.membership_loss(logits, chosen, tokens.valid)
        left_out = (protected & ~chosen).sum(-1)
        aux = {"loss_router": self.aux_weight * loss, "overflow": left_out}
        return map_ if twin == "packed" else map_.masked(), aux

    def _protected(self, tokens: Tokens) -> Bool[Array, "*B N"]:
        if not self.protect:
            return jnp.zeros((*tokens.batch, tokens.n), bool)
        protected = routing.require_extra("gammamod", tokens, "protected").astype(bool)
        return protected if tokens.valid is None else protected & tokens.valid


def head_ranks(
    probs: Float[Array, "*B H S S"], valid: Bool[Array, "*B S"] | None = None
) -> Int[Array, "*B H"]:
    """Numerical rank of the strictly lower triangle of every head's attention.

    Counts singular values above the largest times S times the float32 epsilon; S: valid tokens.
    """
    lower, count = jnp.tril(probs.astype(jnp.float32), -1), probs.shape[-1]
    if valid is not None:
        both = valid[..., :, None] & valid[..., None, :]
        lower, count = jnp.where(both[..., None, :, :], lower, 0.0), valid.sum(-1)[..., None, None]
    values = jnp.linalg.svd(lower, compute_uv=False)
    tolerance = values.max(-1, keepdims=True) * count * jnp.finfo(jnp.float32).eps
    return (values > tolerance).sum(-1)


def arank(
    probs: Float[Array, "*B H S S"], valid: Bool[Array, "*B S"] | None = None
) -> Float[Array, "*B"]:
    """The mean of `head_ranks` over the heads: low where a layer's attention is redundant."""
    return head_ranks(probs, valid).mean(-1)


@dataclass(frozen=True)
class MeasureRank(Reduction):
    """Removes nothing; aux 'arank' [*B] is the layer's."""

    asks: ClassVar[tuple[Ask, ...]] = (PROBS,)

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
        return tokens, None, state, {"arank": arank(evidence[PROBS.name], tokens.valid)}


def measure_ranks(model: Any, *inputs: Any, **options: Any) -> Float[Array, " L"]:
    """ARank of every layer of a model, the mean over the calibration examples.

    inputs, options: those of a call of the model, such as ids and valid=.
    """
    depth = model.config.depth
    plan = Plan(tuple((Site("keys", i), MeasureRank()) for i in range(depth)), name="arank")
    _, report = model(*inputs, plan=plan, **options)
    return jnp.stack([report.aux[f"keys_{i}"]["arank"].mean() for i in range(depth)])


def lowest_layers(ranks: Float[Array, " L"], count: int) -> tuple[int, ...]:
    """The `count` layers of lowest ARank, ascending: for `gammamod(layers=)`.

    Raises ValueError for more layers than there are.
    """
    if not 0 <= count <= len(ranks):
        raise ValueError(
            f"gammamod: count={count} must lie in [0, {len(ranks)}], the layers measured; "
            "change count."
        )
    return tuple(sorted(np.argsort(np.asarray(ranks), kind="stable")[:count].tolist()))


def default_layers(depth: int) -> tuple[int, ...]:
    """All but the first three and the last, as released."""
    return tuple(i for i in range(depth) if i not in (*DENSE_LAYERS, depth - 1))


@register(
    "gammamod",
    family="skip",
    site="around",
    learned=True,
    needs=("protected",),
    twins="exact",
    trains="packed",
    paper="gamma-MoD 2024",
    golden=("core/gammamod__arank", "core/gammamod__train", "core/gammamod__infer"),
)
def gammamod(
    layout: Layout,
    *,
    keep: float = 0.5,
    layers: Sequence[int] | None = None,
    routable: int | None = None,
    protect: bool = True,
    protected: int = 0,
    prefill: float | None = None,
    threshold: float = 0.005,
    positions: str = "renumber",
    shared: bool = True,
    aux_weight: float = 0.01,
    cache: float = 1.0,
) -> Plan:
    """Layers of low attention rank process the tokens that a shared router finds likeliest.

    keep: share of the routable tokens that enter. layers: where; default all but 0, 1, 2 and the
    last, better those of `lowest_layers(measure_ranks(model, ids), count)`. Other options: see
    `GammaMoD`.
    """
    reduction = GammaMoD(
        keep, routable, protect, protected, prefill, threshold, positions, shared, aux_weight, cache
    )
    chosen = routing.layers_or(layers, default_layers(layout.depth))
    return Plan(tuple((Site("around", i), reduction) for i in chosen), name="gammamod")
