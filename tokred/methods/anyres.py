"""Anyres (LLaVA-NeXT, Liu et al. 2024): a large image as an overview and one map of its crops.

Official code: haotian-liu/LLaVA, `prepare_inputs_labels_for_multimodal` with `spatial_unpad`;
transformers' `LlavaNextModel.pack_image_features`. `tokred.data.slicing.plan_anyres` chooses the
crops of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tokred.methods.registry import register
from tokred.plan import Ask, Layout, Plan, Reduction, Site
from tokred.tokens import Tokens

NEWLINE = Ask("given", rows="newline")


def unpadded(canvas: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a canvas that an image of `size` (Y, X) in its middle covers, if it was
    scaled to fit. As official: the side to cut is rounded down, both borders are equal."""
    (rows, columns), (y, x) = canvas, size
    if x / y > columns / rows:
        border = (rows - int(round(y * columns / x, 7))) // 2
        return slice(border, rows - border), slice(0, columns)
    border = (columns - int(round(x * rows / y, 7))) // 2
    return slice(0, rows), slice(border, columns - border)


def anyres_index(
    grid: tuple[int, int], crops: tuple[int, int], size: tuple[int, int]
) -> Int[np.ndarray, " M"]:
    """Which of the tokens of all views, and a newline behind them, come one after the other: the
    whole overview, then the rows of the map of all crops, each with a newline behind it."""
    (h, w), (r, c) = grid, crops
    views = np.arange((1 + r * c) * h * w).reshape(-1, h, w)
    page = np.moveaxis(views[1:].reshape(r, c, h, w), 1, 2).reshape(r * h, c * w)
    page = page[unpadded(page.shape, size)]
    rows = np.concatenate([page, np.full((len(page), 1), views.size)], 1)
    return np.concatenate([views[0].ravel(), rows.ravel()])


@dataclass(frozen=True)
class Anyres(Reduction):
    """Tokens [*B I N D] of views, for every image 1 + R C: the overview and its `crops`, R rows of
    C, become those [*B I/(1 + R C) M D] of images: see `anyres_index`.

    size: (Y, X) of the image before it was scaled; what it leaves of the crops is padding, whose
    tokens go. grid: of a view's tokens, all of which must be there. All static. The newline is the
    model's own, asked for as 'newline' [*B D]. Gradient: to the tokens and the newline.
    """

    crops: tuple[int, int]
    size: tuple[int, int]
    grid: tuple[int, int]
    asks: ClassVar[tuple[Ask, ...]] = (NEWLINE,)
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, pair in (("crops", self.crops), ("size", self.size)):
            if min(pair) < 1:
                raise ValueError(f"anyres: {name}={pair} must be at least 1 each; change {name}.")

    @property
    def joins(self) -> int:
        return 1 + self.crops[0] * self.crops[1]

    def counts(self, n: int, prefix: int) -> int:
        return len(anyres_index(self.grid, self.crops, self.size))

    def macs(self, n: int, layout: Layout) -> int:
        return 0

    def __call__(
        self, tokens: Tokens, evidence: Mapping[str, Array], state: Any = None, **how: Any
    ) -> tuple[Tokens, Any, Any, dict[str, Any]]:
        x, views = tokens.x, self.joins
        if x.ndim < 4 or x.shape[-3] % views:
            raise ValueError(
                f"anyres: expected [*B I N D] with {views} views of every image, the overview and "
                f"{self.crops[0]}x{self.crops[1]} crops, got {x.shape}; change crops or the images."
            )
        if tokens.n != self.grid[0] * self.grid[1] or tokens.valid is not None:
            raise ValueError(
                f"anyres: expected all tokens of {self.grid[0]}x{self.grid[1]} grids, got "
                f"{tokens.n}; let no token leave before it, or set grid."
            )
        *batch, i, n, d = x.shape
        x = x.reshape(*batch, i // views, views * n, d)
        newline = evidence[NEWLINE.name].astype(x.dtype)[..., None, None, :]
        x = jnp.concatenate([x, jnp.broadcast_to(newline, (*x.shape[:-2], 1, d))], -2)
        index = jnp.asarray(anyres_index(self.grid, self.crops, self.size))
        return Tokens(jnp.take(x, index, axis=-2)), None, state, {}


@register(
    "anyres",
    family="connector",
    site="output",
    needs=("crops", "size"),
    paper="LLaVA-NeXT 2024",
)
def anyres(
    layout: Layout,
    *,
    crops: tuple[int, int] = (1, 1),
    size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
) -> Plan:
    """An overview and crops of a large image become one image, whose rows end in newlines.

    crops: (rows, columns) of crops, behind the overview; an example's images are then as many times
    1 + rows * columns. size: (Y, X) of the image before it was scaled, default all of the crops.
    grid: of a view's tokens in front of it, default the model's. For the connector of a `VLM` with
    `newline`: the plan lies in the part 'connector'. It adds tokens: what reduces them goes in
    front of it, if grids stay whole, or behind it.
    """
    rows, columns = crops
    whole = (rows * layout.grid[0], columns * layout.grid[1]) if layout.grid else (rows, columns)
    reduction = Anyres((rows, columns), size or whole, grid or layout.grid)
    return Plan(((Site("output", part="connector"), reduction),), name="anyres")
