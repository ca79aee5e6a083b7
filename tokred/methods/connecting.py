"""What connectors on a grid share: which tokens go where, and what stands behind the prefix."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokred.maps import Assign, Mix, TokenMap
from tokred.methods.pooling import nearly_square_cells
from tokred.methods.routing import share_of
from tokred.nn.locality import adaptive_matrix, reached
from tokred.plan import Reduction, require_module
from tokred.select import merge_into
from tokred.tokens import Tokens, move

Grid = tuple[int, int]


def require_grid(method: str, grid: Grid, n: int, prefix: int) -> None:
    """Raises ValueError where not all tokens of the grid are there."""
    if n - prefix != grid[0] * grid[1]:
        raise ValueError(
            f"{method}: expected the {grid[0] * grid[1]} tokens of grid={grid} behind the prefix, "
            f"got {n - prefix}; let no token leave before site 'output'."
        )


def windows_left(grid: Grid, side: int) -> int:
    """How many whole windows fit."""
    return (grid[0] // side) * (grid[1] // side)


def window_for(method: str, grid: Grid, keep: float, sides: tuple[int, ...]) -> int:
    """The smallest of `sides` that leaves at most that share of the tokens, and at least one.

    Raises:
      ValueError: none does.
    """
    places = grid[0] * grid[1]
    budget = max(1, share_of(places, keep))
    fits = [side for side in sides if 1 <= windows_left(grid, side) <= budget]
    if not fits:
        enough = math.ceil(1000 * windows_left(grid, sides[-1]) / places) / 1000
        raise ValueError(
            f"{method}: keep={keep} of grid={grid} needs larger windows than those that fit, of "
            f"sides {sides}; raise keep to {enough} or change the grid."
        )
    return fits[0]


def cells_for(method: str, grid: Grid, keep: float, tokens: int | None = None) -> Grid:
    """Rows and columns of the coarser grid: at most keep of the tokens, or exactly `tokens`.

    A square grid gets a square one, another one nearly the same sides.

    Raises:
      ValueError: `tokens` that are no square number, or of a grid that is none.
    """
    if tokens is not None:
        side = max(1, round(math.sqrt(max(tokens, 0))))
        if side**2 != tokens or grid[0] != grid[1]:
            raise ValueError(
                f"{method}: tokens={tokens} of grid={grid} must be a square number of a square "
                f"grid; use {side**2}, or keep= for other grids."
            )
        return side, side
    if grid[0] == grid[1]:
        side = math.isqrt(max(1, share_of(grid[0] * grid[1], keep)))
        return side, side
    return nearly_square_cells(grid, keep)


def window_map(tokens: Tokens, grid: Grid, side: int, *, columns_first: bool = False) -> Assign:
    """Every whole window to one token, what is over at the borders to nobody.

    columns_first: windows follow each other down the columns, not along the rows.
    """
    (h, w), prefix = grid, tokens.prefix
    a, b = h // side, w // side
    rows, cols = (axis // side for axis in np.indices(grid))
    slot = cols * a + rows if columns_first else rows * b + cols
    target = np.where((rows < a) & (cols < b), slot, a * b).reshape(-1)
    y, x = (side * axis + (side - 1) // 2 for axis in np.indices((a, b)))
    middle = (y * w + x).T if columns_first else y * w + x
    spread = lambda inner: jnp.broadcast_to(  # noqa: E731
        jnp.asarray(np.concatenate([np.arange(prefix), inner.reshape(-1) + prefix]), jnp.int32),
        (*tokens.batch, prefix + inner.size),
    )
    return merge_into(spread(target), prefix + a * b, spread(middle), tokens.valid)


def region_map(tokens: Tokens, matrix: np.ndarray, added: int = 0) -> Mix:
    """For the books: each token spreads a total of 1 over the regions, rows of `matrix` [K N], that
    take it in, and gets back as much of what they are. added: tokens behind that are nobody's."""
    prefix, (k, n) = tokens.prefix, matrix.shape
    whole = np.zeros((prefix + k + added, prefix + n), np.float32)
    whole[:prefix, :prefix] = np.eye(prefix)
    whole[prefix : prefix + k, prefix:] = matrix / matrix.sum(0)
    share = jnp.broadcast_to(jnp.asarray(whole), (*tokens.batch, *whole.shape))
    valid = reached(whole, tokens.valid)
    if valid is not None and tokens.valid is not None:
        share = share * tokens.valid[..., None, :]
        valid = valid.at[..., prefix + k :].set(True)
    return Mix(share, valid, jnp.swapaxes(share, -1, -2))


def with_body(method: str, tokens: Tokens, y: Float[Array, "*B K E"]) -> Tokens:
    """New features behind the prefix, 0 where invalid.

    Raises:
      ValueError: a prefix of another width.
    """
    front = tokens.x[..., : tokens.prefix, :]
    if tokens.prefix and front.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{method}: {tokens.prefix} tokens in front have {front.shape[-1]} channels, those "
            f"behind {y.shape[-1]}; drop the prefix before, or keep the width."
        )
    if tokens.valid is not None:
        y = jnp.where(tokens.valid[..., tokens.prefix :, None], y, 0)
    y = y.astype(tokens.x.dtype)
    return tokens.replace(x=jnp.concatenate([front, y], axis=-2) if tokens.prefix else y)


@dataclass(frozen=True, kw_only=True)
class Connector(Reduction):
    """Base: the grid's tokens behind the prefix become others; `map_of` says which goes where, and
    `features` what they become.

    grid: rows and columns, all of which must be there. out: the width behind, None for as before.
    """

    method: ClassVar[str] = "connector"  # for errors
    grid: Grid
    out: int | None = None

    @property
    def left(self) -> int:
        """Tokens out, without the prefix."""
        raise NotImplementedError

    def map_of(self, tokens: Tokens) -> TokenMap:
        raise NotImplementedError

    def features(
        self, x: Float[Array, "*B N D"], valid: Bool[Array, "*B N"] | None, module: Any
    ) -> Float[Array, "*B K E"]:
        """Of the tokens behind the prefix."""
        raise NotImplementedError

    def counts(self, n: int, prefix: int) -> int:
        require_grid(self.method, self.grid, n, prefix)
        return prefix + self.left

    def idle(self, n: int, prefix: int) -> bool:
        return False  # even where all stay, they change

    def out_width(self, width: int) -> int:
        return self.out or width

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
    ) -> tuple[Tokens, TokenMap | None, Any, dict[str, Array]]:
        n, prefix = tokens.n, tokens.prefix
        self.counts(n, prefix)
        if self.idle(n, prefix):
            return tokens, None, state, {}
        valid = None if tokens.valid is None else tokens.valid[..., prefix:]
        y = self.features(tokens.x[..., prefix:, :], valid, module)
        map_ = self.map_of(tokens)
        return with_body(self.method, move(tokens, map_), y), map_, state, {}


@dataclass(frozen=True, kw_only=True)
class RegionConnector(Connector):
    """Base: the mean of each of `cells` (rows, columns), adaptive by default, by a module that
    takes (tokens, valid)."""

    cells: Grid

    @property
    def left(self) -> int:
        return self.cells[0] * self.cells[1]

    @property
    def matrix(self) -> np.ndarray:
        """Float[K N] of the mean."""
        return adaptive_matrix(self.grid, self.cells)

    def map_of(self, tokens: Tokens) -> Mix:
        return region_map(tokens, self.matrix)

    def features(
        self, x: Float[Array, "*B N D"], valid: Bool[Array, "*B N"] | None, module: Any
    ) -> Float[Array, "*B K E"]:
        return require_module(self, module)(x, valid)
