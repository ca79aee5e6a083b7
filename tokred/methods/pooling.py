"""Average pooling of near-equal grid cells at the input."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from tokred.maps import Assign
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.select import pool_cells
from tokred.tokens import Tokens


@dataclass(frozen=True)
class Pool(Reduction):
    """The mean of each of `cells` (rows, columns) of the patch grid."""

    grid: tuple[int, int]
    cells: tuple[int, int]

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.cells[0] * self.cells[1]

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        return pool_cells(
            self.grid, self.cells, tokens.batch, prefix=tokens.prefix, valid=tokens.valid
        )


def nearly_square_cells(grid: tuple[int, int], keep: float) -> tuple[int, int]:
    """The most cells, at most keep * h * w, whose sides follow the grid's to within two."""
    h, w = grid
    budget = max(1, int(keep * h * w))
    fits = [
        (a, b)
        for a in range(1, h + 1)
        for b in range(1, w + 1)
        if a * b <= budget and abs(a * w - b * h) <= 2 * max(h, w)
    ]
    return max(fits, key=lambda cell: (cell[0] * cell[1], -abs(cell[0] * w - cell[1] * h)))


def place(method: str, site: str) -> Site:
    """Before all layers or behind them. Raises ValueError for another site."""
    if site not in ("input", "output"):
        raise ValueError(f"{method}: site={site!r} must be 'input' or 'output'; change site.")
    return Site(site)


@register("pooling", family="baseline", site="input")
def pooling(layout: Layout, *, keep: float = 0.5, site: str = "input") -> Plan:
    """The mean of each cell of a coarser grid, once before the first layer.

    site: 'output' for behind the last one.
    """
    cells, where = nearly_square_cells(layout.grid, keep), place("pooling", site)
    if cells == layout.grid:
        return Plan(name="pooling")
    return Plan(((where, Pool(layout.grid, cells)),), name="pooling")
