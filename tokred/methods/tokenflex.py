"""TokenFLEX (2025): any number n x n of visual tokens from one projector.

The paper has no repository; its authors released the projector with LiAutoAD/Ristretto-3B (MIT).
The paper speaks of adaptive average pooling; the released module resizes the map bilinearly (with
aligned corners) to the next multiple of n and averages windows, our default. The two differ where n
does not divide the grid's side. The paper trains with n * n drawn from {64, 144, 256}, by chances
that are not known; the released code sees square maps only, ours any grid.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.methods.connecting import Grid, RegionConnector, cells_for
from tokred.methods.registry import register
from tokred.nn.grids import grid_matrix, resize_matrix
from tokred.nn.locality import adaptive_matrix, pool_regions
from tokred.nn.projectors import GatedProjector, gated_macs
from tokred.plan import Layout, Plan, Site, require_module

AVERAGES = ("resize", "adaptive")


def resized_mean(n: int, k: int) -> np.ndarray:
    """Float[k n]: a line of n resized to the next multiple of k (aligned corners), then the mean of
    each window. n may be less than k."""
    size = -(-n // k) * k
    resized = resize_matrix(n, size, "bilinear", align_corners=True)
    return resized.reshape(k, size // k, n).mean(1)


@functools.cache
def pool_matrix(grid: Grid, cells: Grid, average: str) -> np.ndarray:
    """Float[K N]: one constant matrix for both steps."""
    if average == "adaptive":
        return adaptive_matrix(grid, cells)
    return grid_matrix(*(resized_mean(n, k) for n, k in zip(grid, cells, strict=True)))


@dataclass(frozen=True, kw_only=True)
class TokenFlex(RegionConnector):
    """A mean of the valid tokens, by `average`, for each cell, then LayerNorm and a gated
    perceptron of three times the width."""

    method: ClassVar[str] = "tokenflex"
    average: str = "resize"

    @property
    def matrix(self) -> np.ndarray:
        return pool_matrix(self.grid, self.cells, self.average)

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> GatedProjector:
        return GatedProjector(width, 3 * width, self.out_width(width), rngs=rngs)

    def macs(self, n: int, layout: Layout) -> int:
        d = layout.width
        mean = (n - layout.prefix) * d
        return self.left * (mean + gated_macs(d, 3 * d, self.out_width(d)))

    def features(
        self, x: Float[Array, "*B N D"], valid: Bool[Array, "*B N"] | None, module: Any
    ) -> Float[Array, "*B K E"]:
        return require_module(self, module)(pool_regions(x, self.matrix, valid))


@register(
    "tokenflex",
    family="connector",
    site="output",
    learned=True,
    trains="packed",
    golden=("core/tokenflex__projector",),
    paper="TokenFLEX 2025",
)
def tokenflex(
    layout: Layout,
    *,
    keep: float = 0.25,
    tokens: int | None = None,
    average: str = "resize",
    out: int | None = None,
) -> Plan:
    """Behind the last layer, a mean of the grid to n x n tokens, then a gated perceptron.

    keep: the largest n within that share of the tokens. tokens: n * n, instead; it may exceed the
    grid. average: 'resize', as released, or 'adaptive', as in the paper. out: width behind.

    Raises:
      ValueError: tokens that are no square number, or of a grid that is no square.
    """
    if average not in AVERAGES:
        raise ValueError(f"tokenflex: average={average!r} must be one of {AVERAGES}.")
    cells = cells_for("tokenflex", layout.grid, keep, tokens)
    reduction = TokenFlex(grid=layout.grid, cells=cells, out=out, average=average)
    return Plan(((Site("output"), reduction),), name="tokenflex")
