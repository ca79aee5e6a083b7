"""VideoLLM-MoD (Wu et al. 2024): in some layers only a few tokens of every video frame take part.

No code of the method is public. From the paper: the choice is within each frame, text always takes
part, every second layer is routed, skipped tokens leave no keys. Our choice, as Mixture-of-Depths:
the update is weighted by the raw score, the router starts as N(0, 1/D), positions are kept, the
first layer is dense, 20 % of a frame enter, and a frame's class token competes with the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from tokred.combine import Combine
from tokred.maps import Keep
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.routers import TokenRouter
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.select import keep_where, rank_within
from tokred.tokens import Tokens


@dataclass(frozen=True)
class FrameMoD(Reduction):
    """Of every frame the k = max(1, round(ratio frame_tokens)) tokens with the highest scores r
    enter the layer and become x + r f(x), text enters and becomes x + f(x), the others stay x.

    Reads extra['frame'], int [*B N]: the frame that a token belongs to, -1 for text.
    frame_tokens: of a whole frame. frames: whole frames that every row holds at least; so many
    times frame_tokens - k slots can be saved. A row with fewer may overflow its slots: text comes
    first, aux 'overflow' counts who is left out. 0 saves nothing.
    packed and soft agree exactly. causal: masked, with room for all; a token decoded alone is text
    unless extra says otherwise. A frame must come whole, in one call; it is compared with no other.
    Gradient: to the router through r.
    """

    ratio: float
    frame_tokens: int
    frames: int = 0
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def __post_init__(self) -> None:
        routing.check_share("videollm_mod", "ratio", self.ratio)
        for field, least in (("frame_tokens", 1), ("frames", 0)):
            if getattr(self, field) < least:
                raise ValueError(
                    f"videollm_mod: {field}={getattr(self, field)} must be at least {least}; "
                    f"raise {field}."
                )

    @property
    def per_frame(self) -> int:
        """k, tokens of a frame that enter."""
        return max(1, round(self.ratio * self.frame_tokens))

    def counts(self, n: int, prefix: int) -> int:
        if self.frames * self.frame_tokens > n:
            raise ValueError(
                f"videollm_mod: frames={self.frames} of {self.frame_tokens} tokens do not fit a "
                f"sequence of {n}; lower frames, or stream under plan.with_twin('causal')."
            )
        return n - self._skipping(self.frames)

    def _skipping(self, frames: int) -> int:
        return frames * (self.frame_tokens - self.per_frame)

    def cached(self, length: int) -> int:
        return max(1, length - self._skipping(min(self.frames, length // self.frame_tokens)))

    def macs(self, n: int, layout: Layout) -> int:
        return n * layout.width

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
        if self.per_frame == self.frame_tokens:
            return tokens, None, state, {}
        frame = routing.extra_or("videollm_mod", tokens, "frame", -1, twin=twin)
        scores = require_module(self, module)(tokens.x)
        weight = jnp.where(frame >= 0, scores, 1.0)
        map_, overflow = self._choose(tokens, scores, frame, twin)
        reduced, map_, entering = routing.enter(tokens, map_, weight, twin=twin)
        aux: dict[str, Any] = routing.describe(routing.selected(map_), tokens.valid)
        aux |= {"overflow": overflow, "score": weight, "combine": Combine(entering)}
        return reduced, map_, state, aux

    def _choose(self, tokens: Tokens, scores: Array, frame: Array, twin: str) -> tuple[Keep, Array]:
        """(map, overflow): all text, and the best of every frame."""
        chosen = self._best(scores, frame, tokens.valid)
        if twin == "causal":
            return routing.keep_decided(chosen, tokens.valid), jnp.zeros(tokens.batch, jnp.int32)
        rank = jnp.where(frame >= 0, scores, jnp.inf)
        k = self.counts(tokens.n, tokens.prefix)
        map_, overflow = keep_where(chosen, k, scores=rank, valid=tokens.valid)
        return map_ if twin == "packed" else map_.masked(), overflow

    def _best(self, scores: Array, frame: Array, valid: Any) -> Bool[Array, "*B N"]:
        group = frame if valid is None else jnp.where(valid, frame, -2)  # padding competes apart
        return (frame < 0) | (rank_within(scores, group) < self.per_frame)


@register(
    "videollm_mod",
    family="skip",
    site="around",
    learned=True,
    needs=("frame",),
    twins="exact",
    trains="packed",
    paper="VideoLLM-MoD 2024",
)
def videollm_mod(
    layout: Layout,
    *,
    keep: float = 0.2,
    frame_tokens: int = 10,
    frames: int = 0,
    layers: Sequence[int] | None = None,
) -> Plan:
    """Every second layer processes only the best tokens of each video frame, and all text.

    keep: share of a frame's tokens that enter. layers: where, default 1, 3, 5, ... Other options:
    see `FrameMoD`.
    """
    reduction = FrameMoD(keep, frame_tokens, frames)
    chosen = routing.layers_or(layers, routing.alternate_layers(layout))
    return Plan(tuple((Site("around", i), reduction) for i in chosen), name="videollm_mod")
