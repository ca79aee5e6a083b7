"""LaVIT's dynamic visual tokenizer (Jin et al. 2023): after the encoder a selector keeps some
tokens, and a merger lets them take in the others.

Official code: jy0205/LaVIT (LaVIT community licence). It samples its decisions in inference too,
where we take the likelier one unless sampled=True. It merges all positions and then reads out the
kept ones, which is our soft twin; see `TokenMerger` for the difference of the packed one. It has no
training code: the loss on the share of kept tokens, (share - 1/3)^2 with weight 2, is the paper's
as we know it (low confidence), and its reconstruction loss is the task's. The selector and the
merger read the encoder's features before any final norm there: ViTConfig(norm_after_pool=True).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.gates import Gumbel
from tokred.maps import Keep
from tokred.methods import routing
from tokred.methods.dynamicvit import predictor_macs, with_front
from tokred.methods.registry import register
from tokred.nn.predictors import SelectAndMerge
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.select import keep_where
from tokred.tokens import Tokens, move


@dataclass(frozen=True)
class LaVIT(Reduction):
    """Keeps the tokens behind the prefix whose gate is open, and merges the dropped ones into them.

    The gate is DynamicViT's: hard Gumbel samples of the selector's log-probabilities in training,
    in evaluation the likelier choice, or samples too with `sampled`.
    soft: all slots; kept tokens are the policy of the merger's attention, and of what reads out
    (pooling). packed: the kept ones in `capacity` static slots, in their order, with `valid`; of
    more than fit the least likely count as dropped (aux 'overflow' [*B]). With eps=0 and enough
    slots the twins agree exactly on kept tokens: a kept token sees itself and kept ones before it,
    and dropped tokens as they came from the encoder, which the merger does not change.
    An image may keep nothing: then none of its slots is valid.

    ratio, ratio_weight: of the loss on the share of kept tokens. depth, mlp_ratio, eps: of the
    merger. Gradient: to the merger; in the soft twin also to the selector, straight through.
    """

    capacity: int
    ratio: float = 1 / 3
    ratio_weight: float = 2.0
    depth: int = 12
    mlp_ratio: float = 4.3637
    eps: float = 1e-6
    sampled: bool = False
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def __post_init__(self) -> None:
        routing.check_share("lavit", "ratio", self.ratio)
        if self.depth < 1:
            raise ValueError(f"lavit: depth={self.depth} blocks must be at least 1; raise depth.")

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.capacity

    def idle(self, n: int, prefix: int) -> bool:
        return False  # what is kept is transformed

    def macs(self, n: int, layout: Layout) -> int:
        patches, k, d = n - layout.prefix, self.capacity, layout.width
        among = 4 * k * d * d + 2 * k * k * d
        across = 2 * (k + patches) * d * d + 2 * k * patches * d
        block = among + across + 2 * k * d * int(d * self.mlp_ratio)
        return patches * predictor_macs(d) + self.depth * block

    def expected_count(self, n: Any, prefix: int, aux: Mapping[str, Any]) -> Array:
        return aux["kept"] + prefix

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> SelectAndMerge:
        shape = {"depth": self.depth, "mlp_ratio": self.mlp_ratio}
        return SelectAndMerge(width, heads, **shape, rngs=rngs)

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
        module = require_module(self, module)
        body = tokens.x[..., tokens.prefix :, :]
        present = tokens.sizes()[..., tokens.prefix :] > 0
        chances = module.selector(body, present.astype(jnp.float32))  # [*B P 2]
        gate, _, _ = Gumbel().update(chances, key=key, train=train or self.sampled)
        gate = gate * present
        aux = {"kept": gate.sum(-1).mean()}
        if twin != "soft":
            return self._packed(tokens, module.merger, gate, chances[..., 0], state, aux)
        share = gate.sum(-1) / jnp.maximum(present.sum(-1), 1)
        aux["loss_ratio"] = self.ratio_weight * jnp.square(share - self.ratio).mean()
        y = module.merger(body, gate, valid=present, eps=self.eps)
        tokens = _with_body(tokens, jnp.where(present[..., None], y, 0))
        policy = with_front(gate, tokens.prefix, 1.0)
        return tokens.replace(policy=policy, policy_eps=self.eps), None, state, aux

    def _packed(
        self,
        tokens: Tokens,
        merger: Any,
        gate: Float[Array, "*B P"],
        scores: Float[Array, "*B P"],
        state: Any,
        aux: dict[str, Array],
    ) -> tuple[Tokens, Keep, Any, dict[str, Array]]:
        prefix = tokens.prefix
        chosen, scores = with_front(gate, prefix, 1.0) > 0, with_front(scores, prefix, jnp.inf)
        k = self.counts(tokens.n, prefix)
        map_, overflow = keep_where(chosen, k, scores=scores, valid=tokens.valid)
        kept = (map_.source[..., prefix:] >= 0).astype(gate.dtype)
        present = tokens.sizes()[..., prefix:] > 0
        inner = Keep(map_.index[..., prefix:] - prefix, tokens.n - prefix, map_.valid[..., prefix:])
        body = tokens.x[..., prefix:, :]
        y = merger(body, kept, map_=inner, valid=present, eps=self.eps)
        moved = _with_body(move(tokens, map_), jnp.where(inner.valid[..., None], y, 0))
        return moved, map_, state, {**aux, "overflow": overflow}


def _with_body(tokens: Tokens, y: Float[Array, "*B P D"]) -> Tokens:
    """New features behind the prefix."""
    front = tokens.x[..., : tokens.prefix, :]
    return tokens.replace(x=jnp.concatenate([front, y.astype(front.dtype)], axis=-2))


@register(
    "lavit",
    family="prune and merge",
    site="output",
    learned=True,
    count="data-dependent",
    twins="exact",
    golden=("core/lavit__merger",),
    paper="LaVIT 2023",
)
def lavit(
    layout: Layout,
    *,
    keep: float = 1 / 3,
    room: float = 1.5,
    ratio_weight: float = 2.0,
    depth: int = 12,
    mlp_ratio: float = 4.3637,
    eps: float = 1e-6,
    sampled: bool = False,
) -> Plan:
    """After the last layer a Gumbel gate keeps tokens, which then attend to the dropped ones.

    keep: the share of tokens that the ratio loss asks for. room: slots of the packed form, as a
    multiple of that share. Other options: see `LaVIT`.
    """
    if room <= 0:
        raise ValueError(f"lavit: room={room} must be positive; raise room.")
    patches = layout.patches
    capacity = min(patches, max(1, math.ceil(round(room * keep * patches, 6))))
    reduction = LaVIT(capacity, keep, ratio_weight, depth, mlp_ratio, eps, sampled)
    return Plan(((Site("output"), reduction),), name="lavit")
