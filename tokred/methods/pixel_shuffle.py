"""Pixel shuffle (InternVL, Chen et al. 2024): tokens next to each other become one, their features
side by side.

Official code: OpenGVLab/InternVL, here read in OpenGVLab/V2PE (MIT), which gives such tokens
positions of their own (`tokred.positions`). Nothing is lost, and nothing learned but the projector
behind. Version 'v1' leaves rows and columns of the small grid exchanged, 'v2' does not.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.maps import Assign
from tokred.methods.connecting import (
    Connector,
    Grid,
    window_for,
    window_map,
    windows_left,
)
from tokred.methods.registry import register
from tokred.nn.chain import Chain, chain_macs
from tokred.nn.regions import dividing_windows
from tokred.plan import Layout, Plan, Site, require_module
from tokred.tokens import Tokens

VERSIONS = ("v1", "v2")
NORM_EPS = 1e-5
MLP = "norm linear gelu linear"


def shuffle_grid(
    x: Float[Array, "*B N D"], grid: Grid, factor: int, *, columns_first: bool = False
) -> Float[Array, "*B K E"]:
    """The features of every `factor` x `factor` tokens in one row, along its rows first.

    columns_first: the windows follow each other down the columns. Static: all but x. E is
    D * factor^2.
    """
    (h, w), lead = grid, x.ndim - 2
    cut = (h // factor, factor, w // factor, factor, x.shape[-1])
    x = x.reshape(*x.shape[:-2], *cut)
    order = (2, 0, 1, 3, 4) if columns_first else (0, 2, 1, 3, 4)
    x = x.transpose(*range(lead), *(lead + axis for axis in order))
    return x.reshape(*x.shape[:lead], cut[0] * cut[2], -1)


@dataclass(frozen=True, kw_only=True)
class PixelShuffle(Connector):
    """`factor` x `factor` tokens become one of so many times the width, invalid ones as zeros.

    project: LayerNorm, Linear, GELU, Linear to `out`. columns_first: version 'v1'.
    """

    method: ClassVar[str] = "pixel_shuffle"
    factor: int
    columns_first: bool = False
    project: bool = True

    @property
    def left(self) -> int:
        return windows_left(self.grid, self.factor)

    def idle(self, n: int, prefix: int) -> bool:
        return self.factor == 1 and not self.project

    def out_width(self, width: int) -> int:
        return super().out_width(width) if self.project else width * self.factor**2

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> Chain | None:
        if not self.project:
            return None
        wide = width * self.factor**2
        return Chain(MLP, wide, self.out_width(width), eps=NORM_EPS, rngs=rngs)

    def macs(self, n: int, layout: Layout) -> int:
        if not self.project:
            return 0
        wide = layout.width * self.factor**2
        return self.left * chain_macs(MLP, wide, self.out_width(layout.width))

    def map_of(self, tokens: Tokens) -> Assign:
        return window_map(tokens, self.grid, self.factor, columns_first=self.columns_first)

    def features(
        self, x: Float[Array, "*B N D"], valid: Bool[Array, "*B N"] | None, module: Any
    ) -> Float[Array, "*B K E"]:
        x = x if valid is None else jnp.where(valid[..., None], x, 0)
        x = shuffle_grid(x, self.grid, self.factor, columns_first=self.columns_first)
        return require_module(self, module)(x) if self.project else x


@register(
    "pixel_shuffle",
    family="connector",
    site="output",
    learned=True,
    trains="packed",
    golden=("connectors/pixel_shuffle", "connectors/v2pe_pos", "connectors/v2pe_rotary"),
    paper="InternVL 2024",
)
def pixel_shuffle(
    layout: Layout,
    *,
    keep: float = 0.25,
    factor: int | None = None,
    version: str = "v2",
    project: bool = True,
    out: int | None = None,
) -> Plan:
    """Behind the last layer, the features of each window side by side, then a projector.

    keep: the smallest window that leaves at most that share. factor: its side, instead. project:
    False leaves tokens of factor^2 times the width, and learns nothing. out: width behind the
    projector, by default the model's.

    Raises:
      ValueError: a factor that does not divide the grid; it names the nearest that does.
    """
    if version not in VERSIONS:
        raise ValueError(f"pixel_shuffle: version={version!r} must be one of {VERSIONS}.")
    if out is not None and not project:
        raise ValueError(f"pixel_shuffle: out={out} needs project=True, which leads there.")
    sides = dividing_windows(layout.grid)
    factor = window_for("pixel_shuffle", layout.grid, keep, sides) if factor is None else factor
    if factor not in sides:
        nearest = min(sides, key=lambda side: abs(side - factor))
        raise ValueError(
            f"pixel_shuffle: factor={factor} does not divide grid={layout.grid}; the nearest that "
            f"does is {nearest}."
        )
    how = {"columns_first": version == "v1", "project": project, "out": out}
    reduction = PixelShuffle(grid=layout.grid, factor=factor, **how)
    return Plan(((Site("output"), reduction),), name="pixel_shuffle")
