"""Rows read and written by index along one axis, per example."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from tokred.ops.dispatch import choose


def aligned(index: Array, ndim: int, axis: int) -> Array:
    """`index` [*I K] with unit axes added, so that K lies at `axis` of an `ndim`-d array."""
    lead = axis - (index.ndim - 1)
    if lead < 0:
        raise ValueError(
            f"a map with {index.ndim - 1} leading axes cannot act on token axis {axis}; "
            "give the array as many axes before its token axis as the map has."
        )
    return index.reshape((1,) * lead + index.shape + (1,) * (ndim - axis - 1))


def gather(
    x: Shaped[Array, "..."],
    index: Int[Array, "*I K"],
    *,
    axis: int,
    implementation: str | None = None,
) -> Shaped[Array, "..."]:
    """`x` at `index` along `axis`; the axes of `index` align with those just before `axis`.

    Shapes: x [*L N *T], index [*I K] with *I broadcasting to the end of *L; result [*L K *T].
    Gradient: to `x`, a scatter-add ('take') or a product ('one_hot', floats only).
    """
    table = {"take": _take, "one_hot": _one_hot, "reference": _reference}
    return choose("gather", implementation, table, "take")(x, index, axis)


def put(
    x: Shaped[Array, "..."],
    index: Int[Array, "*I K"],
    rows: Shaped[Array, "..."],
    *,
    axis: int,
    implementation: str | None = None,
) -> Shaped[Array, "..."]:
    """`x` with `rows` at the distinct `index` along `axis`; what lies outside is not written.

    Shapes: x [*L N *T], index [*I K] with *I broadcasting to the end of *L, rows [*L K *T].
    Gradient: to `x` and `rows`, without any sum, unlike that of a gather.
    """
    table = {"scatter": _write, "where": _write_where}
    one, lead = choose("put", implementation, table, "scatter"), x.shape[:axis]
    for _ in lead:  # local on a sharded batch
        one = jax.vmap(one)
    return one(x, jnp.broadcast_to(index, (*lead, index.shape[-1])), rows)


def _write(x: Array, index: Array, rows: Array) -> Array:
    return x.at[index].set(rows, mode="drop", unique_indices=True)


def _write_where(x: Array, index: Array, rows: Array) -> Array:
    """Every row of `x` looks for itself among the indices."""
    mine = jnp.arange(x.shape[0])[:, None] == index[None]  # [N K]
    new = jnp.take(rows, jnp.argmax(mine, -1), axis=0, mode="clip")
    return jnp.where(jnp.expand_dims(mine.any(-1), range(1, x.ndim)), new, x)


def _take(x: Array, index: Array, axis: int) -> Array:
    # Stays local on a sharded batch; fancy indexing with arange(B) does not.
    return jnp.take_along_axis(x, aligned(index, x.ndim, axis), axis=axis, mode="clip")


def _one_hot(x: Array, index: Array, axis: int) -> Array:
    n = x.shape[axis]
    rows = jnp.moveaxis(x, axis, -1)  # [*L *T N]
    tail = x.ndim - axis - 1
    hot = jax.nn.one_hot(index, n, dtype=x.dtype)  # [*I K N]
    lead = (1,) * (axis - index.ndim + 1)
    hot = hot.reshape(lead + index.shape[:-1] + (1,) * tail + hot.shape[-2:])
    # Full precision: rows are copied, not rounded to what a matrix unit likes best.
    y = jnp.einsum("...n,...kn->...k", rows, hot, precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(y, -1, axis)


def _reference(x: Array, index: Array, axis: int) -> Array:
    lead = x.shape[:axis]
    index = jnp.broadcast_to(index, (*lead, index.shape[-1]))
    pick = lambda rows, i: rows[i]  # noqa: E731
    for _ in lead:
        pick = jax.vmap(pick)
    return pick(x, index)
