"""Convolutions on a grid of tokens: Honeybee's C-Abstractor and MobileVLM's LDPv2.

Where a token is invalid, convolutions see the zeros that they see outside the grid, and means
leave it out.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.nn.chain import Chain
from tokred.nn.grids import adaptive_pool_matrix, grid_matrix

NORM_EPS = 1e-5
MLP = "linear gelu linear"
Map = Float[Array, "*B Y X C"]
Real = Float[Array, "*B Y X 1"]


def pool_regions(
    x: Float[Array, "*B N D"],
    matrix: np.ndarray,
    valid: Bool[Array, "*B N"] | None = None,
) -> Float[Array, "*B K D"]:
    """The means that the rows of `matrix` [K N] (sums of 1) ask for, over valid tokens alone; 0
    where a row has none. In float32."""
    product = lambda a: jnp.einsum(  # noqa: E731
        "kn,...nd->...kd", jnp.asarray(matrix, jnp.float32), a.astype(jnp.float32)
    )
    if valid is None:
        return product(x).astype(x.dtype)
    here = valid[..., None]
    total, mass = product(jnp.where(here, x, 0)), product(here)
    return (total / jnp.where(mass == 0, 1.0, mass)).astype(x.dtype)


def reached(matrix: np.ndarray, valid: Bool[Array, "*B N"] | None) -> Bool[Array, "*B K"] | None:
    """Which rows of `matrix` [K N] have a valid token."""
    if valid is None:
        return None
    return jnp.einsum("kn,...n->...k", jnp.asarray(matrix, jnp.float32), 1.0 * valid) > 0


def adaptive_matrix(grid: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Float[K N] of the adaptive average: bins overlap where `cells` do not divide `grid`."""
    return grid_matrix(*(adaptive_pool_matrix(n, k) for n, k in zip(grid, cells, strict=True)))


def readout_of(depth: int) -> str:
    """Honeybee's perceptron of so many linear layers, as the names of a `Chain`."""
    return " silu ".join(["linear"] * depth)


def _on_grid(x: Float[Array, "*B N C"], grid: tuple[int, int]) -> Map:
    return x.reshape(*x.shape[:-2], *grid, x.shape[-1])


def _in_line(x: Map) -> Float[Array, "*B N C"]:
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _depthwise(width: int, bias: bool, rngs: nnx.Rngs) -> nnx.Conv:
    """3 x 3, one filter per channel, zeros around the grid."""
    return nnx.Conv(
        width, width, (3, 3), padding=1, feature_group_count=width, use_bias=bias, rngs=rngs
    )


class RegBlock(nnx.Module):
    """A RegNet bottleneck with channel norms: 1x1, depthwise 3x3, squeeze and excite, 1x1, each
    convolution without bias and with a LayerNorm; and the way around, with one if widths differ.

    Source: timm `regnet.Bottleneck`.
    """

    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs):
        linear = lambda a: nnx.Linear(a, out, use_bias=False, rngs=rngs)  # noqa: E731
        norm = lambda: nnx.LayerNorm(out, epsilon=NORM_EPS, rngs=rngs)  # noqa: E731
        squeezed = round(width / 4)
        self.conv1, self.norm1 = linear(width), norm()
        self.conv2, self.norm2 = _depthwise(out, False, rngs), norm()
        self.squeeze = nnx.Linear(out, squeezed, rngs=rngs)
        self.excite = nnx.Linear(squeezed, out, rngs=rngs)
        self.conv3, self.norm3 = linear(out), norm()
        self.around = None if width == out else linear(width)
        self.norm_around = None if width == out else norm()

    def __call__(self, x: Float[Array, "*B Y X C"], real: Real) -> Float[Array, "*B Y X E"]:
        """real: 1 or 0 per place."""
        y = jax.nn.silu(self.norm1(self.conv1(x)))
        y = jax.nn.silu(self.norm2(self.conv2(y * real)))
        mean = (y * real).sum((-3, -2), keepdims=True)
        mean = mean / jnp.maximum(real.sum((-3, -2), keepdims=True), 1)
        y = y * jax.nn.sigmoid(self.excite(jax.nn.silu(self.squeeze(mean))))
        y = self.norm3(self.conv3(y))
        if self.around is not None and self.norm_around is not None:
            x = self.norm_around(self.around(x))
        return jax.nn.silu(y + x)


def block_macs(n: int, width: int, out: int) -> int:
    """Multiply-accumulates of a `RegBlock` on `n` places."""
    around = 0 if width == out else width * out
    return n * (width * out + 9 * out + out * out + around) + 2 * out * round(width / 4)


class ConvAbstractor(nnx.Module):
    """Honeybee: positions, blocks, adaptive mean, blocks, readout, learned tokens at the end.

    Source: khanrc/honeybee `CAbstractor`.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        cells: tuple[int, int],
        *,
        channels: int,
        out: int,
        depth: int = 3,
        mlp_depth: int = 2,
        eos: int = 0,
        prenorm: bool = False,
        rngs: nnx.Rngs,
    ):
        self.grid, self.cells = grid, cells
        draw = lambda *shape: nnx.Param(  # noqa: E731
            0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, shape)
        )
        stage = lambda width: nnx.List(  # noqa: E731
            RegBlock(width if i == 0 else channels, channels, rngs=rngs) for i in range(depth)
        )
        self.position = draw(grid[0] * grid[1], width)
        self.prenorm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs) if prenorm else None
        self.before, self.after = stage(width), stage(channels)
        self.readout = Chain(readout_of(mlp_depth), channels, out, rngs=rngs)
        self.eos = draw(eos, out) if eos else None

    def __call__(
        self, x: Float[Array, "*B N D"], valid: Bool[Array, "*B N"] | None = None
    ) -> Float[Array, "*B K L"]:
        """K: the cells, then the learned tokens."""
        matrix = adaptive_matrix(self.grid, self.cells)
        x = x if self.prenorm is None else self.prenorm(x)
        x = x + self.position[...].reshape((1,) * (x.ndim - 2) + self.position.shape)
        x = pool_regions(_run(self.before, x, self.grid, valid), matrix, valid)
        x = _run(self.after, x, self.cells, reached(matrix, valid))
        return self._ended(self.readout(x))

    def _ended(self, x: Float[Array, "*B N L"]) -> Float[Array, "*B K L"]:
        if self.eos is None:
            return x
        eos = self.eos[...].astype(x.dtype).reshape((1,) * (x.ndim - 2) + self.eos.shape)
        eos = jnp.broadcast_to(eos, (*x.shape[:-2], *self.eos.shape))
        return jnp.concatenate([x, eos], axis=-2)


def _run(
    blocks: Iterable[RegBlock],
    x: Float[Array, "*B N C"],
    grid: tuple[int, int],
    valid: Bool[Array, "*B N"] | None,
) -> Float[Array, "*B N E"]:
    real = jnp.ones(x.shape[:-1]) if valid is None else valid.astype(jnp.float32)
    x, real = _on_grid(x, grid), _on_grid(real[..., None], grid)
    for block in blocks:
        x = block(x, real)
    return _in_line(x)


class LocalProjector(nnx.Module):
    """MobileVLM V2's LDPv2: Linear, GELU, Linear; adaptive mean; x plus a depthwise 3x3 of it.

    Source: Meituan-AutoML/MobileVLM `LDPNetV2Projector`.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        cells: tuple[int, int],
        *,
        out: int,
        rngs: nnx.Rngs,
    ):
        self.grid, self.cells = grid, cells
        self.mlp = Chain(MLP, width, out, rngs=rngs)
        self.conv = _depthwise(out, True, rngs)

    def __call__(
        self, x: Float[Array, "*B N D"], valid: Bool[Array, "*B N"] | None = None
    ) -> Float[Array, "*B K L"]:
        """A cell without a valid token is 0 to its neighbours."""
        matrix = adaptive_matrix(self.grid, self.cells)
        x = _on_grid(pool_regions(self.mlp(x), matrix, valid), self.cells)
        return _in_line(x + self.conv(x))
