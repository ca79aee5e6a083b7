"""Sums and maxima of rows by target, per example."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from tokred.ops.dispatch import choose
from tokred.ops.spread import platform


def segment_sum(
    x: Shaped[Array, "..."],
    target: Int[Array, "*I N"],
    k: int,
    *,
    axis: int,
    onto: Shaped[Array, "..."] | None = None,
    implementation: str | None = None,
) -> Shaped[Array, "..."]:
    """Rows of `x` added up by `target`, onto zeros or the rows `onto`; target value `k` means
    nobody.

    Shapes: x [*L N *T], target [*I N] with *I broadcasting to the end of *L; onto, of the type of
    x, and result [*L k *T]. Static: k. Gradient: to `x` and `onto`.
    """
    table = {"scatter": _scatter_sum, "one_hot": _one_hot_sum, "reference": _one_hot_sum}
    default = "one_hot" if platform() == "tpu" else "scatter"
    onto = jnp.zeros((*x.shape[:axis], k, *x.shape[axis + 1 :]), x.dtype) if onto is None else onto
    return choose("segment_sum", implementation, table, default)(x, target, onto, axis)


def segment_max(
    x: Shaped[Array, "..."],
    target: Int[Array, "*I N"],
    k: int,
    *,
    axis: int,
    implementation: str | None = None,
) -> Shaped[Array, "..."]:
    """Elementwise maximum of rows of `x` by `target`; a row nobody targets is 0.

    Shapes and static arguments as `segment_sum`. Gradient: to the maximal entries.
    """
    table = {"scatter": _scatter_max, "reference": _dense_max}
    return choose("segment_max", implementation, table, "scatter")(x, target, k, axis)


def _per_example(f: Callable, x: Array, target: Array, axis: int, *more: Array) -> Array:
    # Nested vmap keeps a sharded batch local; merging leading axes would gather it.
    lead = x.shape[:axis]
    target = jnp.broadcast_to(target, (*lead, target.shape[-1]))
    for _ in lead:
        f = jax.vmap(f)
    return f(x, target, *more)


def _scatter_sum(x: Array, target: Array, onto: Array, axis: int) -> Array:
    def one(rows: Array, t: Array, base: Array) -> Array:
        return base.at[t].add(rows, mode="drop")

    return _per_example(one, x, target, axis, onto)


def _one_hot_sum(x: Array, target: Array, onto: Array, axis: int) -> Array:
    def one(rows: Array, t: Array, base: Array) -> Array:
        hot = (t[:, None] == jnp.arange(len(base))[None]).astype(rows.dtype)
        nobody = jnp.expand_dims(t >= len(base), range(1, rows.ndim))
        rows = jnp.where(nobody, jnp.zeros_like(rows), rows)  # NaN of padding stays outside
        return base + jnp.tensordot(hot, rows, ((0,), (0,)), precision=jax.lax.Precision.HIGHEST)

    return _per_example(one, x, target, axis, onto)


def _lowest(dtype: jnp.dtype) -> Array:
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.array(-jnp.inf, dtype)
    return jnp.array(False if dtype == jnp.bool_ else jnp.iinfo(dtype).min, dtype)


def _scatter_max(x: Array, target: Array, k: int, axis: int) -> Array:
    def one(rows: Array, t: Array) -> Array:
        low = jnp.full((k, *rows.shape[1:]), _lowest(rows.dtype))
        hit = jnp.zeros((k,), bool).at[t].set(True, mode="drop")
        top = low.at[t].max(rows, mode="drop")
        return jnp.where(hit.reshape((k,) + (1,) * (rows.ndim - 1)), top, jnp.zeros_like(top))

    return _per_example(one, x, target, axis)


def _dense_max(x: Array, target: Array, k: int, axis: int) -> Array:
    def one(rows: Array, t: Array) -> Array:
        member = t[None] == jnp.arange(k)[:, None]  # [k N]
        wide = member.reshape((*member.shape,) + (1,) * (rows.ndim - 1))
        top = jnp.max(jnp.where(wide, rows[None], _lowest(rows.dtype)), axis=1)
        return jnp.where(wide.any(1), top, jnp.zeros_like(top))

    return _per_example(one, x, target, axis)
