"""p-MoD (Zhang et al. 2024): fewer vision tokens enter a layer, the deeper it lies.

Official code: MCG-NJU/p-MoD (Apache-2.0).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.combine import Combine
from tokred.maps import Keep
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.routers import VisionRouter
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.schedule import decaying_ratios
from tokred.select import keep_top_k
from tokred.tokens import Tokens

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
    "none": lambda logits: logits,
}
ABSENT = -1e30  # the logit of what is not routed; finite, so that a row without vision stays so


def router_weights(
    logits: Float[Array, "*B N"],
    vision: Bool[Array, "*B N"],
    *,
    norm: str = "tanh",
    scale: float = 0.2,
    bias: float = 1.0,
) -> Float[Array, "*B N"]:
    """scale act(logit) + bias; TanhNorm by default, in (0.8, 1.2).

    norm: a name of `ACTIVATIONS`. Where `vision` is False the logit counts as -inf, so the weight
    there means nothing and must not be multiplied in. Gradient: to logits of vision tokens.
    """
    return scale * ACTIVATIONS[norm](jnp.where(vision, logits, ABSENT)) + bias


@dataclass(frozen=True)
class PMoD(Reduction):
    """Of a row's v vision tokens the trunc(ratio v) with the highest logits enter the layer, and
    all text does; w = scale act(logit) + bias.

    With u = x + Attention among those that entered: vision u + w MLP(u), text u + MLP(u), vision
    that skips w x. Positions stay. At first all logits are 0, and the first tokens win the tie.
    Reads extra['vision'], bool [*B N].

    targets: vision tokens that every row holds at least; so many slots can be saved. A row with
    fewer may overflow its slots: text comes first, aux 'overflow' counts who is left out. 0 saves
    nothing. norm, scale, bias: see `router_weights`.
    packed and soft agree exactly. causal: masked, with room for all; a token decoded alone is text
    unless extra says otherwise. The choice is among the vision tokens of one call, so an image
    must come whole.
    Gradient: to the router through w, of entered and skipped vision tokens.
    """

    ratio: float
    targets: int = 0
    norm: str = "tanh"
    scale: float = 0.2
    bias: float = 1.0
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def __post_init__(self) -> None:
        routing.check_share("pmod", "ratio", self.ratio)
        if self.targets < 0:
            raise ValueError(f"pmod: targets={self.targets} is a count; make it 0 or more.")
        if self.norm not in ACTIVATIONS:
            known = sorted(ACTIVATIONS)
            raise ValueError(f"pmod: norm={self.norm!r} must be one of {known}; change norm.")

    def counts(self, n: int, prefix: int) -> int:
        if self.targets > n:
            raise ValueError(
                f"pmod: targets={self.targets} vision tokens do not fit a sequence of {n}; lower "
                "targets, or decode single tokens under plan.with_twin('causal')."
            )
        k = n - self._skipping(self.targets)
        return routing.check_capacity("pmod", "ratio", self.ratio, k, n)

    def _skipping(self, targets: int) -> int:
        return targets - routing.share_of(targets, self.ratio)

    def cached(self, length: int) -> int:
        return max(1, length - self._skipping(min(self.targets, length)))

    def macs(self, n: int, layout: Layout) -> int:
        return n * layout.width

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> VisionRouter:
        return VisionRouter(width, rngs=rngs)

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
        vision = routing.extra_or("pmod", tokens, "vision", False, twin=twin).astype(bool)
        vision = vision if tokens.valid is None else vision & tokens.valid
        logits = require_module(self, module)(tokens.x)
        own = router_weights(logits, vision, norm=self.norm, scale=self.scale, bias=self.bias)
        weight = jnp.where(vision, own, 1.0)
        map_, overflow = self._choose(tokens, logits, vision, twin)
        reduced, map_, entering = routing.enter(tokens, map_, weight, twin=twin)
        fill = tokens.x * weight[..., None].astype(tokens.x.dtype)
        aux: dict[str, Any] = routing.describe(routing.selected(map_), tokens.valid)
        aux |= {"overflow": overflow, "score": weight}
        aux["combine"] = Combine(entering, fill, rule="mlp_branch")
        return reduced, map_, state, aux

    def _choose(
        self, tokens: Tokens, logits: Array, vision: Bool[Array, "*B N"], twin: str
    ) -> tuple[Keep, Array]:
        """(map, overflow): all text, then vision by logit."""
        n = tokens.n
        k = n if twin == "causal" else self.counts(n, tokens.prefix)
        alive = jnp.ones_like(vision) if tokens.valid is None else tokens.valid
        limit = alive.sum(-1) - routing.of_count(self._skipping, n, vision.sum(-1))
        rank = jnp.where(vision, logits, jnp.inf)
        map_ = keep_top_k(rank, k, valid=tokens.valid, order="position", limit=limit)
        return map_ if twin == "packed" else map_.masked(), jnp.maximum(limit - k, 0)


@register(
    "pmod",
    family="skip",
    site="around",
    learned=True,
    needs=("vision",),
    twins="exact",
    trains="packed",
    paper="p-MoD 2024",
    golden=("core/pmod__schedule", "core/pmod__layer"),
)
def pmod(
    layout: Layout,
    *,
    keep: float = 0.5,
    targets: int | None = None,
    schedule: str = "cosine",
    highest: float = 0.85,
    lowest: float = 0.15,
    layers: Sequence[int] | None = None,
    norm: str = "tanh",
    scale: float = 0.2,
    bias: float = 1.0,
) -> Plan:
    """Deep layers process few vision tokens, all weighted by a router; text is always processed.

    keep: the average ratio. schedule ('cosine', 'linear', 'interleave'), highest, lowest: see
    `schedule.decaying_ratios`; layers of ratio 1 stay dense. layers: only these. targets: default
    all tokens of the images that the layout tells of. Other options: see `PMoD`.
    """
    ratios = decaying_ratios(layout.depth, keep, kind=schedule, highest=highest, lowest=lowest)
    chosen = routing.layers_or(layers, range(layout.depth))
    images, each = layout.images
    targets = images * each if targets is None else targets
    steps = tuple(
        (Site("around", i), PMoD(ratio, targets, norm, scale, bias))
        for i, ratio in enumerate(ratios)
        if i in chosen and ratio < 1
    )
    return Plan(steps, name="pmod")
