"""Expedit (Liang et al. 2022, arXiv 2210.01035): a span of layers of a frozen model runs on soft
clusters of its tokens, and all come back for dense prediction.

Official code: Expedit-LargeScale-Vision-Transformer, Expedit-SAM and -Segmenter (Apache-2.0).
Clusters start from a coarser grid's adaptive means, and a token belongs to those near its place
alone; each then gets back a combination of its nearest clusters. As in the code that combination is
over its weights' length (norm='l2'); the paper's formula is over their sum (norm='sum'). Defaults
are those for SAM; Segmenter has window=7, temperature=1, back_temperature=0.05, from layer 10 of 24
on. back='label' copies the nearest cluster instead. Where the code works in windows, lead with an
axis of them: `maps.fold`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from tokred.combine import Combine
from tokred.maps import Mix
from tokred.methods.connecting import Grid, cells_for, require_grid
from tokred.methods.registry import register
from tokred.nn.locality import adaptive_matrix, pool_regions, reached
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.select import beside_prefix, cluster_softly, nearest_of, spread_back
from tokred.select.cluster import NORMS
from tokred.tokens import Tokens, move

BACKS = ("neighbours", "label")


def near_pairs(grid: Grid, cells: Grid, window: int) -> Bool[np.ndarray, "K N"]:
    """Which cells may take in which tokens: those at most window // 2 rows and columns of cells
    away from the cell that covers the token's place, floor(i h / H)."""
    axes = []
    for n, k in zip(grid, cells, strict=True):
        home = np.arange(n) * k // n
        axes.append(np.abs(np.arange(k)[:, None] - home[None]) <= window // 2)
    rows, columns = axes
    return np.kron(rows, columns).astype(bool)


@dataclass(frozen=True)
class Expedit(Reduction):
    """Around layers: the `grid` of tokens behind the prefix becomes `cells` soft clusters, and
    comes back by the map's own restore.

    iterations, window, temperature: of the clusters. neighbours, back_temperature (None for the
    same), norm: of the way back, see `select.spread_back`; back='label' for the nearest alone.
    Static: all. Gradient: through means and combinations, none to distances.
    """

    grid: Grid
    cells: Grid
    iterations: int = 5
    window: int = 5
    temperature: float = 0.01
    neighbours: int = 20
    back_temperature: float | None = None
    norm: str = "l2"
    back: str = "neighbours"

    def __post_init__(self) -> None:
        for name, known in (("back", BACKS), ("norm", NORMS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"expedit: {name}={value!r} must be one of {known}; change it.")
        for name in ("iterations", "window", "neighbours"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"expedit: {name}={value} must be at least 1; raise it.")

    def counts(self, n: int, prefix: int) -> int:
        require_grid("expedit", self.grid, n, prefix)
        return prefix + self.cells[0] * self.cells[1]

    def macs(self, n: int, layout: Layout) -> int:
        pairs = (n - layout.prefix) * self.cells[0] * self.cells[1]
        return (2 * self.iterations + 3) * pairs * layout.width

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Mix:
        p = tokens.prefix
        x = jax.lax.stop_gradient(tokens.x[..., p:, :]).astype(jnp.float32)
        valid = None if tokens.valid is None else tokens.valid[..., p:]
        matrix = adaptive_matrix(self.grid, self.cells)
        there = reached(matrix, valid)
        lead = (None,) * (x.ndim - 2)
        allowed = jnp.asarray(near_pairs(self.grid, self.cells, self.window))[*lead]
        allowed = allowed if there is None else allowed & there[..., None]
        belongs = cluster_softly(
            x,
            pool_regions(x, matrix, valid),
            iterations=self.iterations,
            temperature=self.temperature,
            allowed=allowed,
            valid=valid,
        )
        centres = Mix(belongs).apply(x, "mean")
        return beside_prefix(p, belongs, self._back(x, centres, valid, there))

    def _back(self, x: Array, centres: Array, valid: Any, there: Any) -> Array:
        if self.back == "label":
            label = nearest_of(x, centres, there=there)
            back = jax.nn.one_hot(label, centres.shape[-2])
            return back if valid is None else back * valid[..., None]
        tau = self.temperature if self.back_temperature is None else self.back_temperature
        how = {"neighbours": self.neighbours, "temperature": tau, "norm": self.norm}
        return spread_back(x, centres, valid=valid, there=there, **how)

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
    ) -> tuple[Tokens, Mix | None, Any, dict[str, Any]]:
        if self.idle(tokens.n, tokens.prefix):
            return tokens, None, state, {}
        map_ = self.select(tokens, evidence, key=key)
        return move(tokens, map_, how="mean"), map_, state, {"combine": Combine(restore=map_)}


@register(
    "expedit",
    family="cluster",
    site="around",
    golden=("vit/expedit_cr",),
    paper="Expedit 2022",
)
def expedit(
    layout: Layout,
    *,
    keep: float = 0.5,
    layer: int | None = None,
    iterations: int = 5,
    window: int = 5,
    temperature: float = 0.01,
    neighbours: int = 20,
    back_temperature: float | None = None,
    norm: str = "l2",
    back: str = "neighbours",
) -> Plan:
    """From one layer on a frozen model runs on soft clusters, and all tokens come back at the end.

    keep: clusters as a share of the tokens, at most, on a coarser grid. layer: the first that runs
    on them, default at 5/12 of the depth, as 10 of 24. Other options: see `Expedit`.
    """
    cells = cells_for("expedit", layout.grid, keep)
    if cells == layout.grid:
        return Plan(name="expedit")
    layer = layout.depth * 5 // 12 if layer is None else layer
    how = (iterations, window, temperature, neighbours, back_temperature, norm, back)
    span = Site("around", layer, layout.depth - 1)
    return Plan(((span, Expedit(layout.grid, cells, *how)),), name="expedit")
