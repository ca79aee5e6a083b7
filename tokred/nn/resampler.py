"""One resampler for all connectors: queries that look at an image's tokens, or at some of them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokred.fold import fold, window_order
from tokred.nn.chain import Chain, as_input, grown, linears
from tokred.nn.cross_attention import CrossAttention, PostBlock, PreBlock
from tokred.nn.grids import grid_matrix, resize_matrix, sincos_2d
from tokred.nn.locality import pool_regions
from tokred.nn.regions import check_window, in_bins, region_matrix
from tokred.nn.resampler_shape import ResamplerShape
from tokred.ops import gather

GAP = 3.0  # in logits


class Resampled(NamedTuple):
    """y [*B K out] · weights [*B H K P], what each query took of each key that it looked at."""

    y: Array
    weights: Array


class Resampler(nnx.Module):
    """tokens [*B M D'] of a grid -> queries' results [*B K out].

    width: D' of the tokens. keys: channels of what queries look at, None for the same.
    """

    def __init__(
        self, shape: ResamplerShape, width: int, *, keys: int | None = None, rngs: nnx.Rngs
    ):
        s, keys = shape, keys or width
        self.shape = shape
        chain = lambda names, a, b=None: Chain(names, a, b, eps=s.eps, rngs=rngs)  # noqa: E731
        entered = grown(s.entry, keys, s.width)
        self.entry = chain(s.entry, keys, entered)
        self.source = chain(s.source, width, grown(s.source, width, s.width))
        self.text = None if s.text is None else chain(s.text, s.text_width, width)
        start = s.width if s.queries in ("learned", "given") else self.source.out
        self.query = chain(s.query, start, grown(s.query, start, s.width))
        self.key = chain(s.key, entered, grown(s.key, entered, s.width))
        self.value = chain(s.value, entered, grown(s.value, entered, s.width))
        draw = 0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, (s.count, s.width))
        self.table = nnx.Param(draw) if s.queries == "learned" else None
        side = math.isqrt(s.count)
        self.position = (
            None if s.positions == "none" else nnx.Variable(sincos_2d(s.width, (side, side)))
        )
        self.pool = _depthwise(self.source.out, s, rngs) if s.queries == "conv" else None
        self.blocks = nnx.List(_make_blocks(s, self.query.out, self.key.out, rngs))
        self.out = chain(s.out, self.query.out, s.out_width or self.query.out)
        if s.start == "local":
            self._start_local(self.table, side)

    def _start_local(self, table: Any, side: int) -> None:
        """See `ResamplerShape.start`."""
        (look,), places = self.blocks, self._position()
        key = local_kernel(self.key(places), look.key.kernel[...], look.heads, side)
        look.key.kernel[...], look.query.kernel[...] = key, key
        for linear in (look.value, look.out, *linears(self.out)):
            into, out = linear.kernel.shape
            linear.kernel[...] = jnp.eye(into, out)
        table[...] = table[...] + places[spread(side)] - places

    def __call__(
        self,
        x: Float[Array, "*B M D"],
        *,
        grid: tuple[int, int],
        keys: Float[Array, "*K C"] | None = None,
        queries: Float[Array, "*B K D"] | None = None,
        text: Float[Array, "*B T"] | None = None,
        valid: Bool[Array, "*P"] | None = None,
        length: int | None = None,
    ) -> Resampled:
        """keys: what to look at instead of x: several levels' channels [*B M C], or groups
        [*B K P C] for region='given' (`valid` then [*B K P]). queries: for queries='given'. length:
        the first so many of the queries alone; static.

        Gradient: to x, keys, queries, text and the parameters; with `length` to the first rows of
        the table alone.
        """
        s = self.shape
        q = self.query(self._queries(x, grid, queries, text, length))
        if self.position is not None and s.positions == "both":
            q = q + self._table_position(length, q)
        entered = self.entry(x if keys is None else keys)
        value = self.value(entered)
        if s.positions == "only":
            table = self.key(self.resized(grid).astype(x.dtype))
            key = jnp.broadcast_to(table, (*value.shape[:-2], *table.shape))
        else:
            key = self.key(entered)
            key = key if s.positions == "none" else key + _like(self.resized(grid), key)
        if s.region == "global":
            y, weights = self._run(q, key, value, valid)
            return Resampled(self.out(y), weights)
        key, value, valid = (self._region(a, grid) for a in (key, value, valid))
        y, weights = self._run(q[..., None, :], key, value, valid)
        weights = jnp.swapaxes(weights[..., 0, :], -2, -3)  # [*B K H 1 P] -> [*B H K P]
        return Resampled(self.out(y[..., 0, :]), weights)

    def _queries(
        self, x: Array, grid: tuple[int, int], given: Any, text: Any, length: int | None
    ) -> Array:
        s = self.shape
        told = None if self.text is None else self._told(text)
        if s.pooled:
            x = x if told is None else x + told
            return self._pooled(self.source(x), grid)
        if self.table is None:
            if given is None:
                raise ValueError("Resampler: queries='given' needs queries=; pass them.")
            q = given
        else:
            rows = self.table[...][:length].astype(x.dtype)
            q = jnp.broadcast_to(rows, (*x.shape[:-2], *rows.shape))
        if s.positions == "only":
            q = q + self._table_position(length, q)
        return q if told is None else q + told

    def _told(self, text: Array | None) -> Array:
        if text is None or self.text is None:
            raise ValueError("Resampler: queries depend on a text; pass text=.")
        return self.text(text)[..., None, :]

    def _pooled(self, x: Array, grid: tuple[int, int]) -> Array:
        s = self.shape
        s.queries_of(grid)  # raises where windows do not fit
        h, w = grid[0] // s.window, grid[1] // s.window
        if s.queries == "average":
            return self._region(x, grid).mean(-2)
        if self.pool is not None:
            lead, image = x.shape[:-2], x.reshape(-1, *grid, x.shape[-1])
            return self.pool(image).reshape(*lead, h * w, -1)
        rows = resize_matrix(grid[0], h, "bilinear"), resize_matrix(grid[1], w, "bilinear")
        return pool_regions(x, grid_matrix(*rows))

    def _table_position(self, length: int | None, like: Array) -> Array:
        return _like(self._position()[:length], like)

    def _position(self) -> Array:
        if self.position is None:
            raise ValueError("Resampler: positions='none' has no table.")
        return self.position[...]

    def resized(self, grid: tuple[int, int]) -> Float[Array, "M D"]:
        """The table for the grid of the keys."""
        side = math.isqrt(self.shape.count)
        sides = (resize_matrix(side, n, "bicubic") for n in grid)
        return pool_regions(self._position().astype(jnp.float32), grid_matrix(*sides))

    def _region(self, x: Any, grid: tuple[int, int]) -> Any:
        """[*B M ...] -> [*B K P ...]: what each query looks at."""
        s = self.shape
        if x is None or s.region == "given":
            return x
        if s.region == "matrix":
            side = math.isqrt(s.count)
            return in_bins(x, region_matrix(grid, (side, side), s.bins))
        check_window(grid, s.window)
        axis = x.ndim - (1 if x.dtype == bool else 2)
        order = window_order(grid, (s.window, s.window))
        order = jnp.broadcast_to(order, (*x.shape[:axis], len(order)))
        return fold(gather(x, order, axis=axis), order.shape[-1] // s.window**2, axis=axis)

    def _run(self, q: Array, key: Array, value: Array, valid: Any) -> Resampled:
        s = self.shape
        if s.form in ("plain", "residual"):
            (attend,) = self.blocks
            y = attend(q, key, value, valid=valid)
            weights = attend.weights(q, key, valid)  # for the books; unread, it costs nothing
            return Resampled(q + y if s.form == "residual" else y, weights)
        mask = None
        if s.mask == "causal":
            mask = causal(q.shape[-2])[*(None,) * (q.ndim - 2)]
        total = []
        for block in self.blocks:
            q, weights = block(q, key, value, valid=valid, mask=mask)
            total.append(weights.mean(-3, keepdims=True))
        return Resampled(q, jnp.stack(total).mean(0))


def local_kernel(
    places: Float[Array, "M C"], drawn: Float[Array, "C E"], heads: int, side: int
) -> Float[Array, "C E"]:
    """A projection of queries and keys alike under which a place looks at itself, and at its
    neighbours in the row by e^-GAP of that; what all places have in common is left out."""
    common = places.mean(0)
    common = common / jnp.linalg.norm(common)
    kernel = drawn - jnp.outer(common, common @ drawn)
    seen = (places @ kernel).reshape(side, side, heads, -1)
    apart = jnp.square(seen[:, 1:] - seen[:, :-1]).sum(-1) / 2
    return kernel * jnp.sqrt(GAP * math.sqrt(seen.shape[-1]) / apart.mean())


def spread(side: int) -> Int[np.ndarray, " K"]:
    """The cells of a square grid in an order whose every beginning covers it evenly."""
    places, bits = np.divmod(np.arange(side**2), side), (side - 1).bit_length()
    digit = lambda b: 2 * (places[0] >> b & 1) + (places[1] >> b & 1)  # noqa: E731
    rank = sum(digit(b) << 2 * (bits - 1 - b) for b in range(bits))
    return np.argsort(rank, kind="stable")


def causal(n: int) -> Bool[Array, "K K"]:
    """Which queries each query sees: itself and those before it."""
    slots = jnp.arange(n)
    return slots[None, :] <= slots[:, None]


def _like(table: Array, x: Array) -> Array:
    """A table [M D] for every example, as x is."""
    return jnp.broadcast_to(table.astype(x.dtype), (*x.shape[:-2], *table.shape))


def _depthwise(width: int, shape: ResamplerShape, rngs: nnx.Rngs) -> nnx.Conv:
    kernel, stride = shape.kernel_and_stride
    return nnx.Conv(
        width,
        width,
        (kernel, kernel),
        strides=stride,
        padding="VALID",
        feature_group_count=width,
        promote_dtype=as_input,
        rngs=rngs,
    )


def _make_blocks(s: ResamplerShape, width: int, keys: int, rngs: nnx.Rngs) -> list[Any]:
    how: dict[str, Any] = {"keys": keys, **dict(s.attention)}
    if s.form in ("plain", "residual"):
        return [CrossAttention(width, s.heads, rngs=rngs, **how)]
    hidden, more = s.hidden or 4 * width, {**how, **dict(s.block)}
    if s.form == "pre":
        return [PreBlock(width, s.heads, hidden, rngs=rngs, **more) for _ in range(s.depth)]
    return [
        PostBlock(width, s.heads, hidden, looks=i % s.looks_every == 0, rngs=rngs, **more)
        for i in range(s.depth)
    ]
