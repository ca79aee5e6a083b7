"""Matryoshka Multimodal Models (Cai et al. 2024): one model, nested grids of averaged tokens.

Official code: mu-cai/matryoshka-mm (Apache-2.0). There the pooling follows the projector to the
language model's width; it learns nothing and does not ask for a width, so that here it stands
wherever the grid is whole: at 'output', before or behind a projector of single tokens. The paper
trains on the mean of the losses of all its scales, (1, 9, 36, 144, 576) of 24 x 24 tokens, in
every step, and chooses one to run. Official positions are those of the shorter sequence; ours are
the means of what was averaged.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from tokred.maps import Assign
from tokred.methods.connecting import (
    Grid,
    require_grid,
    window_for,
    window_map,
    windows_left,
)
from tokred.methods.registry import register
from tokred.nn.regions import dividing_windows
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.tokens import Tokens


@dataclass(frozen=True)
class M3(Reduction):
    """The mean of the valid tokens of each `window` x `window` of the grid; border rows and columns
    that fill no window are dropped."""

    grid: Grid
    window: int

    def counts(self, n: int, prefix: int) -> int:
        require_grid("m3", self.grid, n, prefix)
        return prefix + windows_left(self.grid, self.window)

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        return window_map(tokens, self.grid, self.window)


def scales_of(grid: Grid) -> tuple[int, ...]:
    """Every count that windows leave which divide the grid, ascending."""
    return tuple(windows_left(grid, side) for side in reversed(dividing_windows(grid)))


def _window_of(grid: Grid, scale: int, strict: bool) -> int:
    """int(sqrt(N / scale)), as officially; strict: only where that leaves `scale` tokens."""
    places = grid[0] * grid[1]
    if not 1 <= scale <= places:
        raise ValueError(f"m3: scale={scale} must lie in [1, {places}], the tokens of the grid.")
    window, fits = math.isqrt(places // scale), scales_of(grid)
    if strict and scale not in fits:
        nearest = min(fits, key=lambda count: abs(count - scale))
        raise ValueError(
            f"m3: no window leaves scale={scale} tokens of grid={grid}; the nearest that one does "
            f"is {nearest}, or allow strict=False."
        )
    if window > min(grid):
        raise ValueError(
            f"m3: scale={scale} needs windows of side {window}, more than grid={grid} has; raise "
            "scale."
        )
    return window


@register(
    "m3",
    family="connector",
    site="output",
    golden=("connectors/m3_pool", "core/m3__pool"),
    paper="M3 2024",
)
def m3(
    layout: Layout, *, keep: float = 0.25, scale: int | None = None, strict: bool = True
) -> Plan:
    """Behind the last layer, the mean of each window of the grid.

    keep: the largest scale within that share of the tokens. scale: how many tokens, instead.
    strict: False takes the official floor, windows of int(sqrt(N / scale)) that need not divide the
    grid: borders are dropped, and there may be fewer or more tokens than `scale`.

    Raises:
      ValueError: a scale that no window leaves; it names the nearest.
    """
    grid = layout.grid
    sides = dividing_windows(grid) if strict else tuple(range(1, min(grid) + 1))
    if scale is None:
        window = window_for("m3", grid, keep, sides)
    else:
        window = _window_of(grid, scale, strict)
    return Plan(((Site("output"), M3(grid, window)),), name="m3")
