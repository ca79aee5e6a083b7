"""LookupViT (Koner et al. 2024, arXiv 2407.12753): a ViT's blocks run on a few compressed tokens,
which look all others up in every layer and give them back what they found.

No official code. Fixed by the paper and two re-implementations (medium confidence): compressed
tokens begin as a bilinear resize of the grid with its positions; then in every layer comes a
cross-attention from them to the lookup tokens, a transformer block among them, the same attention
transposed back, without a softmax of its own, and a cheap perceptron on the lookup tokens; the
weights fit any number of compressed tokens.
Our choice where they are silent: that perceptron's width, half of D; the transposed attention as it
is, not renormalised; a LayerNorm for each use; no bias of keys, which would cancel. Tokens in front
(class token, registers), which the paper has not, join the compressed ones within blocks and take
no part in the cross-attention. The head reads what is left, the compressed tokens, so that the last
layer gives nothing back; with output='both' all are left, and a mean over tokens is one over both
streams, where a re-implementation adds the two streams' means.
Training draws the side in every step: several plans over the same weights, such as of sides 3, 5, 7
and 10 on 14 x 14, alike on all hosts.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tokred.combine import Combine
from tokred.maps import Assign, Keep
from tokred.methods.connecting import Grid, cells_for, require_grid
from tokred.methods.registry import register
from tokred.nn.grids import grid_matrix, resize_matrix
from tokred.nn.locality import pool_regions, reached
from tokred.nn.lookup import LookupAttention, lookup_macs
from tokred.ops import gather
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.select import grid_cells, keep_static
from tokred.tokens import Tokens, move

OUTPUTS = ("compressed", "both")


def resize_cells(grid: Grid, cells: Grid) -> Float[np.ndarray, "M N"]:
    """The matrix of a bilinear resize, half-pixel centres and no antialiasing."""
    sides = zip(grid, cells, strict=True)
    return grid_matrix(*(resize_matrix(n, k, "bilinear") for n, k in sides))


@dataclass(frozen=True)
class Streams(Reduction):
    """Base: the tokens of `grid` and, where they are there, those of `cells` behind them."""

    grid: Grid
    cells: Grid

    @property
    def lookup(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def compressed(self) -> int:
        return self.cells[0] * self.cells[1]

    def idle(self, n: int, prefix: int) -> bool:
        return False

    def require_both(self, n: int, prefix: int) -> None:
        """Raises ValueError where not all tokens of the two streams are there."""
        if n - prefix != self.lookup + self.compressed:
            raise ValueError(
                f"lookupvit: expected {self.lookup} tokens of grid={self.grid} and "
                f"{self.compressed} of cells={self.cells} behind the prefix, got {n - prefix}; let "
                "no token leave, and none be added, between site 'input' and here."
            )


@dataclass(frozen=True)
class Compress(Streams):
    """Adds the grid at the size of `cells` behind its tokens: features and positions, bilinearly;
    of valid tokens alone. For the books a compressed token stands for no original yet."""

    grows: ClassVar[bool] = True

    def counts(self, n: int, prefix: int) -> int:
        require_grid("lookupvit", self.grid, n, prefix)
        return n + self.compressed

    def macs(self, n: int, layout: Layout) -> int:
        return self.lookup * self.compressed * layout.width

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        n, k = tokens.n, self.counts(tokens.n, tokens.prefix)
        target = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (*tokens.batch, n))
        if tokens.valid is None:
            return Assign(target, k)
        new: Any = reached(resize_cells(self.grid, self.cells), tokens.valid[..., tokens.prefix :])
        valid = jnp.concatenate([tokens.valid, new], axis=-1)
        return Assign(jnp.where(tokens.valid, target, k), k, valid=valid)

    def move(self, tokens: Tokens, map_: Any, evidence: Mapping[str, Array]) -> Tokens:
        moved, n, p = move(tokens, map_), tokens.n, tokens.prefix
        valid = None if tokens.valid is None else tokens.valid[..., p:]
        matrix = resize_cells(self.grid, self.cells)
        resize = lambda a: pool_regions(a[..., p:n, :], matrix, valid)  # noqa: E731
        moved = moved.replace(x=jnp.concatenate([tokens.x, resize(tokens.x)], axis=-2))
        place = moved.position
        if place is None:
            return moved
        place = jnp.concatenate([place[..., :n, :], resize(place)], axis=-2)
        place = place if moved.valid is None else jnp.where(moved.valid[..., None], place, -1)
        return moved.replace(position=place)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["module", "lookup", "weights"],
    meta_fields=["prefix"],
)
@dataclass(frozen=True)
class GiveBack:
    """What comes out of a block goes back to its slots, and on to the lookup tokens [*B N D] in
    between, by the weights [*B H M N] with which it was gathered."""

    module: Any
    lookup: Any
    weights: Any
    prefix: int

    def restore(self, y: Float[Array, "*B K D"]) -> Float[Array, "*B S D"]:
        """Gradient: to y and to all that is held."""
        front, compressed = y[..., : self.prefix, :], y[..., self.prefix :, :]
        lookup = self.module.give(self.lookup, compressed, self.weights)
        return jnp.concatenate([front, lookup.astype(y.dtype), compressed], axis=-2)


@dataclass(frozen=True)
class Lookup(Streams):
    """Around a layer: the compressed tokens gather from the lookup tokens, enter alone with those
    in front, and give back.

    hidden: width of the lookup tokens' perceptron as a share of D. renorm, gives: see
    `LookupAttention`. The weights depend on neither grid nor cells.
    """

    hidden: float = 0.5
    renorm: bool = False
    gives: bool = True

    def __post_init__(self) -> None:
        if not self.hidden > 0:
            raise ValueError(f"lookupvit: hidden={self.hidden} must be above 0; raise hidden.")

    def counts(self, n: int, prefix: int) -> int:
        self.require_both(n, prefix)
        return prefix + self.compressed

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> LookupAttention:
        hidden = max(1, int(self.hidden * width))
        how = {"gives": self.gives, "renorm": self.renorm}
        return LookupAttention(width, heads, hidden, **how, rngs=rngs)

    def macs(self, n: int, layout: Layout) -> int:
        hidden = max(1, int(self.hidden * layout.width))
        return lookup_macs(self.lookup, self.compressed, layout.width, hidden, self.gives)

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
    ) -> tuple[Tokens, Keep, Any, dict[str, Any]]:
        n, p = tokens.n, tokens.prefix
        self.counts(n, p)
        module, behind = require_module(self, module), p + self.lookup
        valid = tokens.valid
        front, lookup, compressed = jnp.split(tokens.x, [p, behind], axis=-2)
        seen = None if valid is None else valid[..., p:behind]
        compressed, weights = module.gather(compressed, lookup, seen)
        map_ = keep_static(range(behind, n), n, tokens.batch, prefix=p)
        entered = move(tokens, map_)
        entered = entered.replace(x=jnp.concatenate([front, compressed], axis=-2))
        if not self.gives:
            return entered, map_, state, {}
        if valid is not None:
            weights = jnp.where(valid[..., None, behind:, None], weights, 0.0)
        restore = GiveBack(module, lookup, weights, p)
        return entered, map_, state, {"combine": Combine(restore=restore)}


@dataclass(frozen=True)
class ReadOut(Streams):
    """The compressed tokens stay; each stands for the originals in its part of the grid."""

    def counts(self, n: int, prefix: int) -> int:
        self.require_both(n, prefix)
        return prefix + self.compressed

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        p, m = tokens.prefix, self.compressed
        k = self.counts(tokens.n, p)
        cell, _ = grid_cells(self.grid, self.cells)
        own = p + np.arange(m)
        spread = lambda *parts: jnp.broadcast_to(  # noqa: E731
            jnp.asarray(np.concatenate(parts), jnp.int32), (*tokens.batch, sum(map(len, parts)))
        )
        target, index = spread(np.arange(p), p + cell, own), spread(np.arange(p), own + self.lookup)
        if tokens.valid is None:
            return Assign(target, k, index=index)
        there = gather(tokens.valid, index, axis=index.ndim - 1)
        return Assign(jnp.where(tokens.valid, target, k), k, index=index, valid=there)

    def move(self, tokens: Tokens, map_: Any, evidence: Mapping[str, Array]) -> Tokens:
        return move(tokens, map_, how="keep", position="keep")


@register(
    "lookupvit",
    family="nested",
    site="around",
    learned=True,
    trains="packed",
    paper="LookupViT 2024",
)
def lookupvit(
    layout: Layout,
    *,
    keep: float = 0.25,
    side: int | None = None,
    hidden: float = 0.5,
    renorm: bool = False,
    output: str = "compressed",
) -> Plan:
    """A ViT's blocks run on a small grid of compressed tokens that looks up the whole one.

    keep: compressed tokens as a share of the patches, at most. side: a side x side grid of them
    instead, any at call time on the same weights. output: 'compressed', or 'both' to keep all
    tokens at the end, compressed ones last, for dense outputs; it has weights in the last layer
    that the other has not. Other options: see `Lookup`.

    Raises:
      ValueError: a side beyond the grid's, or an unknown output.
    """
    if output not in OUTPUTS:
        raise ValueError(f"lookupvit: output={output!r} must be one of {OUTPUTS}; change output.")
    grid = layout.grid
    if side is not None and not 1 <= side <= min(grid):
        raise ValueError(
            f"lookupvit: side={side} must lie in [1, {min(grid)}], as grid={grid} allows; change "
            "side."
        )
    cells = cells_for("lookupvit", grid, keep) if side is None else (side, side)
    around = [
        Lookup(grid, cells, hidden, renorm, output == "both" or i < layout.depth - 1)
        for i in range(layout.depth)
    ]
    steps = [(Site("input"), Compress(grid, cells))]
    steps += [(Site("around", i), step) for i, step in enumerate(around)]
    steps += [(Site("output"), ReadOut(grid, cells))] if output == "compressed" else []
    return Plan(tuple(steps), name="lookupvit")
