"""Pixel shuffle: order of tokens and channels in both versions, widths, refusals."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.grids import BATCH, WIDTH, layout_of, module_of, run, tokens_of
from tokred.methods.pixel_shuffle import pixel_shuffle
from tokred.models import ViTConfig
from tokred.plan import Plan

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def reduction_of(grid=(4, 6), **options) -> Any:
    ((_, reduction),) = pixel_shuffle(layout_of(grid), **options).steps
    return reduction


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_window_lies_side_by_side(version: str):
    reduction = reduction_of(project=False, version=version)
    tokens = tokens_of(layout_of((4, 6)))
    got, map_ = run(reduction, tokens)
    assert got.x.shape == (BATCH, 6, 4 * WIDTH) and reduction.out_width(WIDTH) == 4 * WIDTH
    image = np.asarray(tokens.x).reshape(BATCH, 4, 6, WIDTH)
    slots = [(i, j) for i in range(2) for j in range(3)]
    slots = slots if version == "v2" else sorted(slots, key=lambda ij: ij[::-1])
    for slot, (i, j) in enumerate(slots):
        window = image[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_array_equal(got.x[:, slot], window.reshape(BATCH, -1))
        close(got.position[0, slot], [2 * i + 0.5, 2 * j + 0.5])
        assert map_.source[0, 12 * i + 2 * j] == slot


def test_invalid_tokens_are_zeros():
    valid = jnp.ones((BATCH, 4), bool).at[:, 2].set(False)
    tokens = tokens_of(layout_of((2, 2)), valid=valid)
    tokens = tokens.replace(x=tokens.x.at[:, 2].set(9.0))
    got, _ = run(reduction_of((2, 2), project=False), tokens)
    want = jnp.where(valid[..., None], tokens.x, 0).reshape(BATCH, 1, -1)
    np.testing.assert_array_equal(got.x, want)


def test_the_projector_sees_all_channels():
    reduction = reduction_of(out=5)
    tokens = tokens_of(layout_of((4, 6)))
    wide, _ = run(reduction_of(project=False), tokens)
    got, _ = run(reduction, tokens)
    close(got.x, module_of(reduction)(wide.x))
    assert got.x.shape[-1] == reduction.out_width(WIDTH) == 5


def test_one_token_each_is_nothing_at_all():
    tokens = tokens_of(layout_of((4, 6)))
    got, map_ = run(reduction_of(factor=1, project=False), tokens)
    assert map_ is None
    np.testing.assert_array_equal(got.x, tokens.x)
    assert run(reduction_of(factor=1), tokens)[1] is not None


def test_keep_takes_the_smallest_window():
    assert reduction_of((12, 12), keep=0.25).factor == 2
    assert reduction_of((12, 12), keep=0.2).factor == 3


def test_a_second_reduction_meets_the_new_width():
    config = ViTConfig(image_size=(16, 16), patch=(2, 2), width=WIDTH, heads=2, class_token=False,
                       pool="mean")  # fmt: skip
    first = pixel_shuffle(config.layout, project=False)
    again = reduction_of((4, 4), out=WIDTH)
    plan = first + Plan(((first.steps[0][0], again),))
    assert plan.out_width(WIDTH) == WIDTH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 3}, r"factor=3 does not divide grid=\(4, 6\); the nearest that does is 2"),
        ({"factor": 0}, "nearest that does is 1"),
        ({"keep": 0.1}, "raise keep to 0.25"),
        ({"version": "v3"}, "version='v3' must be one of"),
        ({"project": False, "out": 5}, "out=5 needs project=True"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        reduction_of(**options)
