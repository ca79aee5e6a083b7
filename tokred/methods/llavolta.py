"""LLaVolta (Chen et al. 2024, arXiv 2406.20092): within a decoder, runs of an image's tokens become
their mean, much so at first in training and not at all in the end.

Official code: Beckschen/LLaVolta (Apache-2.0). There every image has 576 tokens and all rows of a
batch as many images, padding lies on the right, the causal mask is cut to the new length, and the
loss looks labels up by averaged positions; here whoever sees whom follows from positions, and
`Report.restore` finds where a token went. Its strided convolutions are left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred import boundary
from tokred.maps import Assign
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.ops import gather, segment_sum
from tokred.plan import Layout, Plan, Reduction, Site, nearest
from tokred.select import keep_where
from tokred.tokens import Tokens, move

POSITIONS = ("mean", "official")
Stages = tuple[tuple[int, int], ...]
STAGES: Mapping[str, Stages] = {
    "4stage": ((2, 8), (2, 2), (16, 2), (0, 1)),
    "heavy": ((2, 8),),
    "light": ((16, 8),),
}
DEPTH = 32  # of the decoder that the table was made for


def stages(name: str, depth: int = DEPTH) -> Stages:
    """(layer, stride) of every stage of training, all of equal length; stride 1 pools nothing.

    name: '4stage', whose stages officially begin at steps 0, 1300, 2600 and 3900 of about 5200,
    'heavy' or 'light', one stage each. depth: layers are moved to the same share of another
    decoder's. Each stage is a plan, and a compiled step, of its own.

    Raises:
      ValueError: an unknown name, or no layers.
    """
    if name not in STAGES:
        raise ValueError(
            f"llavolta: stages {name!r} are unknown{nearest(name, STAGES)}; they are "
            f"{tuple(STAGES)}."
        )
    if depth < 1:
        raise ValueError(f"llavolta: depth={depth} must be at least 1; raise depth.")
    return tuple((min(round(layer * depth / DEPTH), depth - 1), s) for layer, s in STAGES[name])


@dataclass(frozen=True)
class VisualPool(Reduction):
    """Of each image's tokens, in their order, every `stride` become their mean; those over at its
    end are dropped. Text stays as it is, and so does the order.

    Reads extra['vision'], bool [*B N], and extra['frame'], int [*B N], the number of a vision
    token's image. images: how many an example holds, and of how many tokens each; with them there
    is a static count out. Rows with fewer images, spliced as a VLM does, leave slots empty behind
    their last token; where text fills their place, what finds no slot is lost, aux 'overflow'.
    packed: the means are gathered. soft and causal, which are one: each stands in the slot of its
    first token and the others are hidden, exactly as good. For decoding the prompt comes whole, a
    token decoded alone is left alone, and caches behind the site hold the means.
    positions: 'mean', exact, or 'official', which is averaged in half precision and cut to whole
    numbers. Of other extras, whole numbers and bools are those of a mean's first token.
    Gradient: to the tokens, through the mean.
    """

    stride: int
    images: tuple[int, int]
    positions: str = "mean"
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(
                f"llavolta: positions={self.positions!r} must be one of {POSITIONS}; change it."
            )
        count, each = self.images
        if count < 0 or not 1 <= self.stride <= max(each, 1):
            raise ValueError(
                f"llavolta: stride={self.stride} must lie in [1, {max(each, 1)}], the tokens of "
                f"an image of images={self.images}; change one of the two."
            )

    @property
    def dropped(self) -> int:
        """Tokens less, in an example that has all its images."""
        count, each = self.images
        return count * (each - each // self.stride)

    def counts(self, n: int, prefix: int) -> int:
        k = n - self.dropped
        if k <= prefix:
            raise ValueError(
                f"llavolta: images={self.images} have no room in a sequence of {n}; lower images, "
                "or decode single tokens under plan.with_twin('causal')."
            )
        return k

    def idle(self, n: int, prefix: int) -> bool:
        return self.dropped == 0

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
        k = self.slots(tokens.n, tokens.prefix, twin)
        map_, aux = self._groups(tokens, k)
        return self.move(tokens, map_, evidence), map_, state, aux

    def move(self, tokens: Tokens, map_: Assign, evidence: Mapping[str, Array]) -> Tokens:
        moved = move(tokens, map_, how="mean")
        whole = {
            name: map_.apply(value, "keep")
            for name, value in tokens.extra.items()
            if not jnp.issubdtype(value.dtype, jnp.floating)
        }
        moved = moved.replace(extra={**moved.extra, **whole})
        if self.positions == "mean" or tokens.position is None:
            return moved
        place = moved.position.at[..., 0].set(self._official_places(tokens, moved, map_))
        return moved.replace(position=place)

    def _official_places(self, tokens: Tokens, moved: Tokens, map_: Assign) -> Float[Array, "*B K"]:
        """Averaged in half precision, then cut to whole numbers; text keeps its own."""
        places = tokens.positions()[..., 0]
        mean = map_.apply(places.astype(jnp.float16).astype(jnp.float32), "mean")
        cut = jnp.trunc(mean.astype(jnp.float16).astype(jnp.float32))
        return jnp.where(moved.extra["vision"] & moved.valid, cut, moved.position[..., 0])

    def _groups(self, tokens: Tokens, k: int) -> tuple[Assign, dict[str, Array]]:
        """Which tokens become one; the first of each stands for it."""
        valid, axis = tokens.valid, len(tokens.batch)
        valid = jnp.ones((*tokens.batch, tokens.n), bool) if valid is None else valid
        vision = routing.require_extra("llavolta", tokens, "vision").astype(bool) & valid
        frame = routing.require_extra("llavolta", tokens, "frame")
        leader = jnp.maximum(self._leaders(vision, frame), 0)
        members = segment_sum(vision.astype(jnp.int32), leader, tokens.n, axis=axis)
        whole = vision & (gather(members, leader, axis=axis) == self.stride)
        slots = jax.lax.broadcasted_iota(jnp.int32, vision.shape, axis)
        stays = (valid & ~vision) | whole
        first = stays & (leader == slots)
        if k == tokens.n:
            keep, aux = routing.keep_decided(first, None), {}
        else:
            keep, overflow = keep_where(first, k)
            aux = {"overflow": overflow}
        target = gather(keep.source, leader, axis=axis)
        target = jnp.where(stays & (target >= 0), target, k)
        return Assign(target, k, index=keep.index, valid=keep.valid), aux

    def _leaders(self, vision: Bool[Array, "*B N"], frame: Int[Array, "*B N"]) -> Array:
        """The slot of the first of each token's run of `stride`; of text, its own."""
        before = boundary.previous_slots(vision.shape, vision)
        opens = vision & ((before < 0) | (frame != boundary.at_previous(frame, before)))
        place = boundary.places(opens, vision)  # within its image
        leads = ~vision | (place % self.stride == 0)
        slots = jax.lax.broadcasted_iota(jnp.int32, vision.shape, vision.ndim - 1)
        return jnp.where(vision, boundary.latest(leads & vision), slots)


@register(
    "llavolta",
    family="nested",
    site="before",
    needs=("vision", "frame"),
    twins="exact",
    paper="LLaVolta 2024",
    golden=("core/llavolta__pool", "connectors/llavolta"),
)
def llavolta(
    layout: Layout,
    *,
    keep: float = 0.125,
    layer: int = 2,
    stride: int | None = None,
    positions: str = "mean",
    images: tuple[int, int] | None = None,
) -> Plan:
    """From one layer of a decoder on, every few tokens of an image are their mean.

    keep: the largest share of an image's tokens that may stay. layer, stride: which layer, and of
    how many tokens, instead; see `stages`. images: how many there are in an example and of how many
    tokens each, by default those of the layout. positions: see `VisualPool`.

    Raises:
      ValueError: a layout without images, more tokens to a mean than an image has, or an unknown
        rule of positions.
    """
    stride = math.ceil(1 / keep - 1e-6) if stride is None else stride
    count, each = layout.images if images is None else images
    if stride != 1 and not count * each:
        raise ValueError(
            f"llavolta: images={(count, each)} leave nothing to pool; take the layout from "
            "VLMConfig.decoder_layout(tokens, plan), or pass images=(how many, tokens of each)."
        )
    reduction = VisualPool(stride, (count, each), positions)
    return Plan(((Site("before", layer), reduction),), name="llavolta")
