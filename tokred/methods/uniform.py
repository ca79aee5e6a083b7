"""A uniform sub-grid of tokens at the input."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from tokred.maps import Keep
from tokred.methods.pooling import Pool, nearly_square_cells, place
from tokred.methods.registry import register
from tokred.plan import Layout, Plan
from tokred.tokens import Tokens


@dataclass(frozen=True)
class UniformGrid(Pool):
    """The centre token of each of `cells` of the patch grid."""

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Keep:
        cells = super().select(tokens, evidence, key=key)
        kept = None if tokens.valid is None else Keep(cells.index, tokens.n).apply(tokens.valid)
        return Keep(cells.index, tokens.n, kept)


@register("uniform", family="baseline", site="input")
def uniform(layout: Layout, *, keep: float = 0.5, site: str = "input") -> Plan:
    """The centre of each cell of a coarser grid, once before the first layer.

    site: 'output' for behind the last one.
    """
    cells, where = nearly_square_cells(layout.grid, keep), place("uniform", site)
    if cells == layout.grid:
        return Plan(name="uniform")
    return Plan(((where, UniformGrid(layout.grid, cells)),), name="uniform")
