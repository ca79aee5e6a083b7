"""M3: scales, the official floor, what is refused."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.grids import BATCH, layout_of, run, tokens_of
from tokred.methods.m3 import m3, scales_of

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def reduction_of(grid=(4, 4), prefix=0, **options) -> Any:
    ((_, reduction),) = m3(layout_of(grid, prefix), **options).steps
    return reduction


def test_scales_of_the_paper_fit_its_grid():
    assert scales_of((24, 24)) == (1, 4, 9, 16, 36, 64, 144, 576)
    assert [reduction_of((24, 24), scale=s).window for s in (1, 9, 36, 144, 576)] == [
        24,
        8,
        4,
        2,
        1,
    ]
    assert scales_of((6, 9)) == (6, 54)


def test_means_of_windows():
    tokens = tokens_of(layout_of((4, 6), prefix=1))
    got, _ = run(reduction_of((4, 6), prefix=1, scale=6), tokens)
    image = np.asarray(tokens.x[:, 1:]).reshape(BATCH, 2, 2, 3, 2, -1)
    close(got.x[:, 1:], image.mean((2, 4)).reshape(BATCH, 6, -1))


def test_means_of_valid_tokens():
    tokens = tokens_of(layout_of((2, 2)), valid=jnp.array([[True, False, True, True]] * BATCH))
    got, _ = run(reduction_of((2, 2), scale=1), tokens)
    close(got.x[:, 0], tokens.x[:, [0, 2, 3]].mean(1))
    assert got.valid is not None


def test_the_official_floor_drops_borders():
    """Scale 3 of 5 x 5 asks for windows of 2, which leave 4."""
    reduction = reduction_of((5, 5), scale=3, strict=False)
    tokens = tokens_of(layout_of((5, 5)))
    got, map_ = run(reduction, tokens)
    image = np.asarray(tokens.x).reshape(BATCH, 5, 5, -1)[:, :4, :4].reshape(BATCH, 2, 2, 2, 2, -1)
    close(got.x, image.mean((2, 4)).reshape(BATCH, 4, -1))
    gone = np.asarray(map_.source[0]).reshape(5, 5) < 0
    assert gone[4].all() and gone[:, 4].all() and not gone[:4, :4].any()
    assert reduction_of((5, 5), keep=0.2, strict=False).window == 2


def test_what_no_window_leaves_is_refused_with_the_nearest():
    for scale, near in ((3, 4), (8, 4), (12, 16)):
        with pytest.raises(ValueError, match=rf"scale={scale} tokens.*is {near}, or"):
            m3(layout_of((4, 4)), scale=scale)
    with pytest.raises(ValueError, match=r"must lie in \[1, 16\]"):
        m3(layout_of((4, 4)), scale=17)
    with pytest.raises(ValueError, match="raise keep to 1"):
        m3(layout_of((3, 5)), keep=0.5)
    with pytest.raises(ValueError, match="more than grid"):
        m3(layout_of((2, 8)), scale=1, strict=False)


def test_all_tokens_are_left_alone():
    reduction, tokens = reduction_of(keep=1.0), tokens_of(layout_of((4, 4)))
    got, map_ = run(reduction, tokens)
    assert map_ is None
    np.testing.assert_array_equal(got.x, tokens.x)
