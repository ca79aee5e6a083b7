"""H-Net (Hwang et al. 2025, arXiv 2507.07955; goombalab/hnet, MIT): a sequence cuts itself into
chunks, the layers of a span run on one token for each, and all tokens come back.

Unlike the released code: chunks beyond a static capacity are not opened, and counted; the ratio
loss is over real tokens, not over padding too; padding may be on either side; documents of one row
never share a chunk or a moving average; the bias of the residual projection starts at 0; all stages
have one width, and the layers are those of the model, attention where the paper has Mamba.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred import boundary
from tokred.combine import Combine
from tokred.gates import Boundary
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.routers import BoundaryRouter
from tokred.ops import gather
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.tokens import Tokens, move

CLIP = 1e-4  # a chunk's weight in the moving average stays so far from 0 and 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "fresh", "reads", "confidence"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Dechunk:
    """From chunks to tokens: a moving average over the chunks, of which every token reads the last.

    weight: Float[*B K], of each chunk in the average, 0 in empty slots · fresh: Bool[*B K], where
    it begins anew · reads: Int[*B N], each token's slot · confidence: Float[*B N], a factor.
    """

    weight: Any
    fresh: Any
    reads: Any
    confidence: Any

    def restore(self, y: Float[Array, "*B K D"]) -> Float[Array, "*B N D"]:
        """In float32. Gradient: to y, weight and confidence."""
        smooth = boundary.moving_average(y, self.weight, self.fresh)
        return gather(smooth, self.reads, axis=y.ndim - 2) * self.confidence[..., None]


@dataclass(frozen=True)
class HNet(Reduction):
    """A token begins a chunk where it is unlike the one before, p = (1 - cosine) / 2 > 1/2 of its
    key with that one's query; the first of a sequence always does. Its own features stand for the
    chunk, so that nothing looks ahead. After the span, with e a moving average of the chunks by
    their p, token t becomes e of its chunk times c + a projection of what it was before; c is 1
    with the gradient of max(p, 1 - p).

    capacity: slots as a share of a row's tokens, rounded up; chunks that find none stay part of the
    last one and are counted as aux 'overflow'. chunk: the length that the ratio loss asks for, with
    weight `loss_weight`, as aux 'loss_ratio'. positions: of chunks, 'keep' their first token's or
    'renumber' 0, 1, ..., as released.
    packed: chunks are gathered. soft: they stay in their slots, other tokens hidden from them; the
    twins agree exactly. Static: the slots.
    Gradient: to the router through p in the average, through c and from the loss; none through the
    cut itself. A cache holds neither the token before nor the average: decode by full passes.
    """

    capacity: float
    chunk: float = 6.0
    loss_weight: float = 0.03
    positions: str = "keep"
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def __post_init__(self) -> None:
        routing.check_share("hnet", "keep", self.capacity)
        routing.check_positions("hnet", self.positions)
        if not self.chunk > 1:
            raise ValueError(f"hnet: chunk={self.chunk} must be above 1 token; raise chunk.")

    def counts(self, n: int, prefix: int) -> int:
        return routing.room_of(n, self.capacity)

    def idle(self, n: int, prefix: int) -> bool:
        return False

    def macs(self, n: int, layout: Layout) -> int:
        return 3 * n * layout.width**2

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> BoundaryRouter:
        return BoundaryRouter(width, rngs=rngs)

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
        router, valid = require_module(self, module), tokens.valid
        previous = boundary.previous_slots((*tokens.batch, tokens.n), valid)
        first = boundary.find_first(tokens, previous)
        chance = router(tokens.x, previous, first)
        confidence, _, told = Boundary().update(chance)
        starts = told["starts"] if valid is None else told["starts"] & valid
        k = self.counts(tokens.n, tokens.prefix)
        room = routing.per_row(lambda m: self.counts(m, 0), tokens.n, valid)
        starts, overflow = boundary.limit_starts(starts, k if room is None else room)
        map_, latest = boundary.keep_starts(starts, k), boundary.latest(starts)
        reads = latest if twin == "soft" else boundary.segments(starts)
        map_ = map_.masked() if twin == "soft" else map_
        own = latest >= boundary.latest(first)  # a document without a slot reads no other's
        restore = Dechunk(
            map_.apply(jnp.clip(chance, CLIP, 1 - CLIP)),
            map_.apply(first),
            jnp.maximum(reads, 0),
            jnp.where(own, confidence, 0.0),
        )
        reduced = move(tokens, map_)
        if self.positions == "renumber":
            reduced = routing.renumber(reduced)
        loss = boundary.ratio_loss(starts, chance, self.chunk, valid)
        aux: dict[str, Any] = routing.describe(starts, valid)
        aux |= {"chance": chance, "overflow": overflow, "loss_ratio": self.loss_weight * loss}
        aux["combine"] = Combine(fill=router.pass_by(tokens.x), restore=restore)
        return reduced, map_, state, aux


@register(
    "hnet",
    family="chunk",
    site="around",
    learned=True,
    count="data-dependent",
    twins="exact",
    trains="packed",
    paper="H-Net 2025",
    golden=("gen/hnet__route_chunk_dechunk", "gen/hnet__ste"),
)
def hnet(
    layout: Layout,
    *,
    keep: float = 0.25,
    spans: Sequence[tuple[int, int]] | None = None,
    chunk: float | None = None,
    loss_weight: float = 0.03,
    positions: str = "keep",
) -> Plan:
    """A learned boundary gate cuts text into chunks, and the inner layers run on one token of each.

    keep: slots for chunks as a share of the tokens that come in; give it slack above 1 / chunk.
    spans: (first, last) layer of every stage, each inside the one before; default one stage, all
    but the first and the last quarter of the layers. chunk: tokens that a chunk should have, by
    default 6, or 3 in each of several stages. Other options: see `HNet`.

    Raises:
      ValueError: a model that reads no sequence, or spans that overlap.
    """
    routing.check_sequence("hnet", layout)
    spans = (routing.inner_span(layout),) if spans is None else tuple(spans)
    chunk = (6.0 if len(spans) == 1 else 3.0) if chunk is None else chunk
    stage = HNet(keep, chunk, loss_weight, positions)
    return Plan(tuple((Site("around", *span), stage) for span in spans), name="hnet")
