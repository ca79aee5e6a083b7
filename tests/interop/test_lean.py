"""Programs rewritten for ONNX compute what they computed."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from tokred.interop.lean import lean
from tokred.ops import gather, prefer, segment_sum

X = jnp.arange(24.0).reshape(2, 3, 4)


def agree(found, expected) -> None:
    for mine, theirs in zip(found, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
        assert mine.dtype == theirs.dtype


def eqns(f, *specs) -> list[str]:
    return [eqn.primitive.name for eqn in jax.make_jaxpr(f)(*specs).jaxpr.eqns]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jnp.concatenate([x[:, :0], x, x[:, :0]], 1),
        lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1)), constant_values=3.0),
        lambda x: jax.lax.pad(x, 0.0, ((0, 0, 0), (-1, 0, 0), (2, -1, 0))),
        lambda x: jax.lax.pad(x, 0.0, ((0, 0, 0), (1, 0, 1), (0, 0, 0))),
        lambda x: x.astype(jnp.int32) % -5,
        lambda x: x % 5.0,
        lambda x: jax.jit(jax.nn.gelu)(x) + jax.nn.relu(x),
        lambda x: jax.checkpoint(jnp.sin)(x)[..., 1],
        lambda x: gather(x[..., 0], jnp.array([[2, 0], [1, 1]]), axis=1),
        lambda x: (x.sum(), {"b": x.max(-1), "a": x[0]}),
    ],
)
def test_the_results_are_the_same(f):
    agree(lean(f, X)(X), f(X))


def test_a_batch_without_a_size():
    f = lambda x: (x[..., 1], gather(x[..., 0], jnp.array([[2, 0]]), axis=1))  # noqa: E731
    spec = jax.ShapeDtypeStruct((jax.export.symbolic_shape("b")[0], 3, 4), jnp.float32)
    exported = jax.export.export(jax.jit(lean(f, spec)))(spec)
    agree(exported.call(X), f(X))


def test_what_no_result_needs_is_gone():
    def f(x):
        unused = jnp.linalg.norm(jnp.sort(x, axis=1))
        return x + 1, jax.jit(lambda y: (y * 2, jnp.exp(unused)))(x)[0]

    assert eqns(lean(f, X), X) == ["add", "mul"]


def test_a_kept_trace_does_not_hide_what_is_preferred():
    target = jnp.array([[0, 1, 1], [1, 0, 2]])
    f = lambda x: segment_sum(x, target, 2, axis=1)  # noqa: E731
    assert "scatter-add" in str(jax.make_jaxpr(f)(X))
    with prefer(segment_sum="one_hot"):
        program = lean(f, X)
    assert "scatter" not in str(jax.make_jaxpr(program)(X))
    np.testing.assert_allclose(program(X)[0], f(X))
