"""Elements that matrix products write."""

import jax
import jax.numpy as jnp
import pytest

from tokred.cost.activations import activations

X, W = jnp.ones((2, 3)), jnp.ones((3, 5))


@pytest.mark.parametrize(
    ("f", "count"),
    [
        (lambda x, w: jnp.tanh(x @ w), 10),
        (lambda x, w: jax.jit(lambda y: y @ w)(x) @ w.T, 16),
        (lambda x, w: jax.lax.scan(lambda c, _: (c @ w @ w.T, None), x, length=4)[0], 4 * 16),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w.T @ w), 26),
        (lambda x, w: x + 1, 0),
    ],
)
def test_of_every_kind_of_program(f, count):
    assert activations(f, X, W) == count
