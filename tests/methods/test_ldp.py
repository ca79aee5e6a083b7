"""LDPv2 by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.methods.grids import BATCH, layout_of, module_of, run, tokens_of
from tests.methods.test_c_abstractor import conv
from tokred.methods.ldp import ldp
from tokred.nn.locality import adaptive_matrix

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def reduction_of(grid=(4, 4), **options) -> Any:
    ((_, reduction),) = ldp(layout_of(grid), **options).steps
    return reduction


def by_hand(module, pooled: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
    image = pooled.reshape(*cells, -1)
    inject = conv(image, np.asarray(module.conv.kernel[...])) + np.asarray(module.conv.bias[...])
    return (image + inject).reshape(pooled.shape)


def test_perceptron_mean_convolution():
    reduction = reduction_of((5, 5), tokens=9, out=6)
    tokens, m = tokens_of(layout_of((5, 5))), module_of(reduction)
    got, _ = run(reduction, tokens)
    first, second = m.mlp.layers
    y = second(jax.nn.gelu(first(tokens.x), approximate=False))
    pooled = np.asarray(adaptive_matrix((5, 5), (3, 3)) @ y)
    for row in range(BATCH):
        close(got.x[row], by_hand(m, pooled[row], (3, 3)))


def test_bins_overlap_where_they_do_not_divide():
    row = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 1]])
    row = row / row.sum(1, keepdims=True)
    close(adaptive_matrix((5, 5), (3, 3)), np.kron(row, row))


def test_a_cell_without_valid_tokens_is_zeros_to_its_neighbours():
    reduction = reduction_of(tokens=4)
    valid = jnp.ones((BATCH, 16), bool).at[:, jnp.array([2, 3, 6, 7, 8])].set(False)
    tokens, m = tokens_of(layout_of((4, 4)), valid=valid), module_of(reduction)
    got, _ = run(reduction, tokens)
    weight = adaptive_matrix((4, 4), (2, 2)) * np.asarray(valid)[0]
    pooled = weight @ np.asarray(m.mlp(tokens.x)) / np.maximum(weight.sum(1), 1e-9)[:, None]
    for row in range(BATCH):
        want = by_hand(m, pooled[row], (2, 2))
        close(got.x[row, [0, 2, 3]], want[[0, 2, 3]])
    np.testing.assert_array_equal(got.x[:, 1], 0)
