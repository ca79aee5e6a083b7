"""TokenFLEX: the matrix of resize and mean, the paper's adaptive mean, any number of tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.grids import BATCH, WIDTH, layout_of, module_of, run, tokens_of
from tokred.methods.tokenflex import pool_matrix, resized_mean, tokenflex
from tokred.nn.locality import pool_regions

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def reduction_of(grid=(4, 4), **options) -> Any:
    ((_, reduction),) = tokenflex(layout_of(grid), **options).steps
    return reduction


@pytest.mark.parametrize(("n", "k"), [(27, 8), (5, 7), (8, 4), (9, 4), (3, 1), (1, 2), (4, 4)])
def test_one_matrix_resizes_and_averages(n: int, k: int):
    x = np.random.default_rng(0).normal(size=n)
    size = -(-n // k) * k
    resized = np.interp(np.arange(size) * (n - 1) / max(size - 1, 1), np.arange(n), x)
    close(resized_mean(n, k) @ x, resized.reshape(k, -1).mean(1))


def test_both_averages_agree_where_windows_divide():
    close(pool_matrix((4, 6), (2, 3), "adaptive"), pool_matrix((4, 6), (2, 3), "resize"))
    different = pool_matrix((5, 5), (2, 2), "adaptive") - pool_matrix((5, 5), (2, 2), "resize")
    assert np.abs(different).max() > 0.01


@pytest.mark.parametrize("average", ["resize", "adaptive"])
def test_projected_means(average: str):
    reduction = reduction_of((5, 5), tokens=4, average=average)
    tokens, m = tokens_of(layout_of((5, 5))), module_of(reduction)
    pooled = pool_matrix((5, 5), (2, 2), average) @ np.asarray(tokens.x)
    centred = pooled - pooled.mean(-1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
    normed = jnp.asarray(normed * np.asarray(m.norm.scale[...]) + np.asarray(m.norm.bias[...]))
    gated = jax.nn.silu(m.gate(normed)) * m.up(normed)
    assert gated.shape[-1] == 3 * WIDTH
    close(run(reduction, tokens)[0].x, m.down(gated))


def test_more_tokens_than_there_are():
    reduction = reduction_of((3, 3), tokens=16)
    got, map_ = run(reduction, tokens_of(layout_of((3, 3))))
    assert got.n == 16
    close(map_.sizes().sum(-1), 9)


def test_means_of_valid_tokens():
    x = jax.random.normal(jax.random.key(0), (BATCH, 25, WIDTH))
    valid = jax.random.bernoulli(jax.random.key(1), 0.5, (BATCH, 25))
    matrix = pool_matrix((5, 5), (3, 3), "resize")
    weight = matrix * np.asarray(valid)[:, None]
    mass = weight.sum(-1, keepdims=True)
    want = weight @ np.asarray(x) / np.where(mass > 0, mass, 1)
    close(pool_regions(x, matrix, valid), want)
    assert (pool_regions(x, matrix, jnp.zeros_like(valid)) == 0).all()


def test_unknown_average_is_refused():
    with pytest.raises(ValueError, match="average='mean' must be one of"):
        tokenflex(layout_of((4, 4)), average="mean")
