"""Router-Tuning (He et al. 2024): a threshold decides which tokens enter a branch, and the router
alone is trained.

Official code: CASE-Lab-UMD/Router-Tuning-Mixture-of-Depths. That all other weights stay frozen is
a matter of the training recipe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.combine import Combine
from tokred.gates import StraightThrough
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.routers import TokenRouter
from tokred.plan import Ask, Layout, Plan, Reduction, Site, require_module
from tokred.tokens import Tokens, move

NORMED = Ask("normed")
SITES = ("around", "around_attention", "around_mlp")
PER = ("token", "sequence")


@dataclass(frozen=True)
class RouterTuning(Reduction):
    """x + m update with m = 1 where sigmoid(r) >= `threshold`; r is linear in the normalised input
    of the branch.

    soft (training): all tokens are computed and all keys seen; m is a straight-through step, so
    that the router learns. packed, causal: tokens with m = 0 do not enter, and nobody sees their
    keys: twins different by design around attention, equal around the MLP.
    target: share of tokens with m = 1 above which `scale` relu(share - target) is a layer's loss.
    room: slots of the packed form as a share of the tokens, None for `target`; of more chosen ones
    those with the highest r enter, the others are counted ('overflow').
    per='sequence': r of the sequence's mean, one m for all its tokens, which keep their slots. In
    causal decisions the prompt has its own mean and every later token decides alone; then
    extra['generated'] tells them apart.
    Gradient: to the router in the soft twin, and from the loss.
    """

    target: float
    per: str = "token"
    scale: float = 1.0
    threshold: float = 0.5
    room: float | None = None
    asks: ClassVar[tuple[Ask, ...]] = (NORMED,)
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def __post_init__(self) -> None:
        for field in ("target", "room"):
            if getattr(self, field) is not None:
                routing.check_share("router_tuning", field, getattr(self, field))
        if self.per not in PER:
            raise ValueError(f"router_tuning: per={self.per!r} must be one of {PER}; change per.")

    def counts(self, n: int, prefix: int) -> int:
        if self.per == "sequence":
            return n
        return routing.room_of(n, self.target if self.room is None else self.room)

    def macs(self, n: int, layout: Layout) -> int:
        return layout.width * (n if self.per == "token" else 1)

    def expected_count(
        self, n: Array | float, prefix: int, aux: Mapping[str, Any]
    ) -> Array | float:
        return n * aux["share"]

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> TokenRouter:
        return TokenRouter(width, rngs=rngs)

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
        scores = require_module(self, module)(self._read(tokens, evidence[NORMED.name], twin))
        step = StraightThrough(self.threshold, inclusive=True).update(scores)[0]
        share = routing.mean_over(step, tokens.valid)
        excess = jax.nn.relu(share - self.target)
        aux: dict[str, Any] = {"score": scores, "share": share}
        aux["loss_capacity"] = self.scale * excess
        if twin == "soft":
            return tokens, None, state, {**aux, "combine": Combine(step), "entered": step > 0}
        counts = lambda n: self.slots(n, tokens.prefix, twin)  # noqa: E731
        map_, overflow = routing.keep_chosen(step > 0, counts, tokens.valid, scores=scores)
        aux |= {"overflow": overflow, "entered": routing.selected(map_)}
        return move(tokens, map_), map_, state, aux

    def _read(self, tokens: Tokens, x: Float[Array, "*B N D"], twin: str) -> Float[Array, "*B N D"]:
        """What the router reads of every token."""
        if self.per == "token":
            return x
        prompt = jnp.ones(x.shape[:-1], bool) if tokens.valid is None else tokens.valid
        alone = None
        if twin == "causal":
            alone = routing.require_extra("router_tuning", tokens, "generated") >= 0
            prompt &= ~alone
        weight = prompt[..., None].astype(x.dtype)
        mean = (x * weight).sum(-2, keepdims=True) / jnp.maximum(weight.sum(-2, keepdims=True), 1)
        mean = jnp.broadcast_to(mean, x.shape)
        return mean if alone is None else jnp.where(alone[..., None], x, mean)


@register(
    "router_tuning",
    family="skip",
    site="around_attention",
    learned=True,
    count="data-dependent",
    twins="different",
    golden=("core/routertuning",),
    paper="Router-Tuning 2024",
)
def router_tuning(
    layout: Layout,
    *,
    keep: float = 0.5,
    layers: Sequence[int] | None = None,
    site: str = "around_attention",
    per: str = "token",
    scale: float = 1.0,
    threshold: float = 0.5,
    room: float | None = None,
) -> Plan:
    """A linear threshold lets tokens, or whole sequences, skip attention; only routers are trained.

    keep: target share of tokens that enter; 1 routes nothing. layers: where, default 1, 3, 5, ...
    site: 'around_attention', 'around_mlp' or 'around' the whole layer. Other options: see
    `RouterTuning`.
    """
    if site not in SITES:
        raise ValueError(f"router_tuning: site={site!r} must be one of {SITES}; change site.")
    reduction = RouterTuning(keep, per, scale, threshold, room)
    chosen = routing.layers_or(layers, routing.alternate_layers(layout))
    steps = tuple((Site(site, i), reduction) for i in chosen if keep < 1)
    return Plan(steps, name="router_tuning")
