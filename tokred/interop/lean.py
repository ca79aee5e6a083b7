"""Programs without what their results do not need, for runtimes that compile less than XLA does."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array

CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint")


def lean(f: Callable[..., Any], *specs: Any) -> Callable[..., list[Array]]:
    """`f` for arrays like these, as a function that gives the list of its result's leaves.

    Traced now, so that what is traced later cannot change it. Calls are inlined, equations that no
    result needs are left out, and so are empty arrays, which ONNX has no place for.
    """
    closed = jax.make_jaxpr(lambda *arrays: f(*arrays))(*specs)  # a new function: no kept trace
    flat = jax.make_jaxpr(functools.partial(_evaluate, closed.jaxpr, closed.consts))(*specs)
    return functools.partial(_evaluate, flat.jaxpr, flat.consts)


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else env[v]  # noqa: E731
    for eqn in _needed(jaxpr):
        results = _run(eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _needed(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations that the results depend on."""
    used = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or used & set(eqn.outvars):
            kept.append(eqn)
            used |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return kept[::-1]


def _run(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    results: list[Any] = [v.aval for v in eqn.outvars]
    if all(map(_empty, results)):
        return [jnp.zeros(aval.shape, aval.dtype) for aval in results]
    if eqn.primitive.name in CALLS:
        inner: Any = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
        return _evaluate(inner.jaxpr, inner.consts, *values)
    rewrite = REWRITES.get(eqn.primitive.name)
    if rewrite is not None and (found := rewrite(values, **eqn.params)) is not None:
        return [found]
    found = eqn.primitive.bind(*values, **eqn.params)
    return list(found) if eqn.primitive.multiple_results else [found]


def _empty(x: Any) -> bool:
    return any(isinstance(n, int) and n == 0 for n in x.shape)


def _concatenate(values: Sequence[Any], dimension: int) -> Array:
    return lax.concatenate([x for x in values if not _empty(x)], dimension)


def _rem(values: Sequence[Any]) -> Array | None:
    a, b = values
    return a - lax.div(a, b) * b if jnp.issubdtype(a.dtype, jnp.integer) else None


def _pad(values: Sequence[Any], padding_config: Sequence[Any]) -> Array | None:
    """By slices and concatenation; None with padding inside."""
    x, value = values
    if any(inside for _, _, inside in padding_config):
        return None
    for axis, (low, high, _) in enumerate(padding_config):
        if min(low, high) < 0:
            keep = slice(max(0, -low), x.shape[axis] - max(0, -high))
            x = x[(slice(None),) * axis + (keep,)]
        sides = [(*x.shape[:axis], max(0, n), *x.shape[axis + 1 :]) for n in (low, high)]
        before, after = (lax.full(shape, value) for shape in sides)
        x = _concatenate([before, x, after], axis)
    return x


def _gather(
    values: Sequence[Any],
    dimension_numbers: Any,
    slice_sizes: Any,
    indices_are_sorted: bool,
    unique_indices: bool,
    mode: Any,
    fill_value: Any,
) -> Array | None:
    """One slice, as x[:, 2:5] is where the batch has no size yet, by a slice; single numbers as
    rows of one number; None for others."""
    x, index = values
    how = dimension_numbers
    if index.shape == (1,):
        (axis,) = how.start_index_map
        y = lax.dynamic_slice_in_dim(x, index[0], slice_sizes[axis], axis)
        return lax.squeeze(y, how.collapsed_slice_dims)
    if how.offset_dims:
        return None
    how = how._replace(offset_dims=(index.ndim - 1,))
    rows = lax.gather(
        x[..., None],
        index,
        how,
        (*slice_sizes, 1),
        indices_are_sorted=indices_are_sorted,
        unique_indices=unique_indices,
        mode=mode,
        fill_value=fill_value,
    )
    return rows[..., 0]


# What ONNX or its converter lacks, by what they have; None leaves an equation as it is.
REWRITES: dict[str, Callable[..., Array | None]] = {
    "concatenate": _concatenate, "rem": _rem, "pad": _pad, "gather": _gather
}  # fmt: skip
