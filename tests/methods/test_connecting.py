"""What connectors on a grid share: whole grids, sizes, maps, errors, costs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.methods.grids import BATCH, LAYOUT, layout_of, run, tokens_of
from tokred import cost
from tokred.cost.bench import forward
from tokred.methods.c_abstractor import c_abstractor
from tokred.methods.connecting import cells_for, region_map, window_for
from tokred.methods.connectors import quecc
from tokred.methods.ldp import ldp
from tokred.methods.m3 import m3
from tokred.methods.pixel_shuffle import pixel_shuffle
from tokred.methods.tokenflex import tokenflex
from tokred.models import ViT, ViTConfig
from tokred.nn.locality import adaptive_matrix
from tokred.nn.regions import dividing_windows
from tokred.plan import Plan

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
METHODS = {
    "m3": m3,
    "pixel_shuffle": pixel_shuffle,
    "tokenflex": tokenflex,
    "c_abstractor": functools.partial(c_abstractor, depth=1),
    "ldp": ldp,
}
LEARNED = [name for name in METHODS if name != "m3"]
each = pytest.mark.parametrize("name", METHODS)


def reduction_of(name: str, layout: Any = LAYOUT, **options: Any) -> Any:
    ((_, reduction),) = METHODS[name](layout, **options).steps
    return reduction


def test_windows_are_those_that_divide_both_sides():
    assert dividing_windows((24, 24)) == (1, 2, 3, 4, 6, 8, 12, 24)
    assert dividing_windows((6, 9)) == (1, 3)
    assert window_for("m3", (24, 24), 0.25, dividing_windows((24, 24))) == 2
    assert window_for("m3", (24, 24), 0.24, dividing_windows((24, 24))) == 3
    assert window_for("m3", (24, 24), 1e-9, dividing_windows((24, 24))) == 24


def test_a_share_that_no_window_leaves_is_refused():
    sides = dividing_windows((6, 9))
    with pytest.raises(ValueError, match=r"raise keep to 0\.112"):
        window_for("m3", (6, 9), 0.1, sides)
    assert window_for("m3", (6, 9), 0.112, sides) == 3


def test_square_grids_get_square_cells_others_similar_ones():
    assert cells_for("ldp", (24, 24), 0.5) == (16, 16)
    assert cells_for("ldp", (24, 24), 0.25) == (12, 12)
    assert cells_for("ldp", (24, 24), 1e-9) == (1, 1)
    assert cells_for("ldp", (3, 5), 0.5) == (2, 3)
    assert cells_for("ldp", (24, 24), 0.5, tokens=64) == (8, 8)


@pytest.mark.parametrize(
    ("grid", "tokens", "near"), [((4, 4), 8, 9), ((3, 5), 4, 4), ((4, 4), 0, 1)]
)
def test_other_counts_than_squares_are_refused(grid, tokens, near):
    for method in (tokenflex, c_abstractor, ldp):
        with pytest.raises(ValueError, match=f"square grid; use {near},"):
            method(layout_of(grid), tokens=tokens)


@each
def test_the_prefix_stays_and_so_does_the_book_keeping(name: str):
    reduction = reduction_of(name)
    tokens = tokens_of(LAYOUT)
    got, map_ = run(reduction, tokens)
    assert got.n == reduction.counts(tokens.n, tokens.prefix) == map_.k == 2 + 4
    np.testing.assert_array_equal(got.x[:, :2], tokens.x[:, :2])
    np.testing.assert_array_equal(got.sizes(), BATCH * [[1, 1, 4, 4, 4, 4]])
    windows = np.arange(16).reshape(2, 2, 2, 2) // 8 * 2 + np.arange(2)[:, None] + 2
    np.testing.assert_array_equal(got.sources()[0], [0, 1, *windows.reshape(-1)])
    close(got.position[0, 2:], [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]])
    np.testing.assert_array_equal(got.position[0, :2], -1)


@each
def test_invalid_tokens_count_for_nothing(name: str):
    """Nor does what they hold; a cell without any valid one is invalid and 0."""
    reduction = reduction_of(name)
    valid = np.ones((BATCH, 18), bool)
    valid[:, [4, 5, 8, 9, 16]] = False  # all of the second cell, one of the last
    tokens = tokens_of(LAYOUT, valid=jnp.asarray(valid))
    other = tokens.replace(x=jnp.where(valid[..., None], tokens.x, 99.0))
    got, map_ = run(reduction, tokens)
    again, _ = run(reduction, other)
    np.testing.assert_array_equal(got.x, again.x)
    np.testing.assert_array_equal(got.valid[0], [True, True, True, False, True, True])
    np.testing.assert_array_equal(got.x[:, 3], 0)
    np.testing.assert_array_equal(got.sizes()[0], [1, 1, 4, 0, 4, 3])
    np.testing.assert_array_equal(np.asarray(map_.source)[0] < 0, ~valid[0])


@each
def test_two_leading_axes_are_images_of_an_example(name: str):
    reduction = reduction_of(name)
    one = tokens_of(LAYOUT)
    two = jax.tree.map(lambda a: a.reshape(2, BATCH // 2, *a.shape[1:]), one)
    got, map_ = run(reduction, one)
    both, both_map = run(reduction, two)
    close(both.x.reshape(got.x.shape), got.x, rtol=1e-4, atol=1e-5)
    assert both_map.batch == (2, BATCH // 2) and map_.batch == (BATCH,)


@each
def test_tokens_that_left_before_are_missed(name: str):
    reduction = reduction_of(name)
    with pytest.raises(ValueError, match=r"16 tokens of grid=\(4, 4\).*got 7"):
        run(reduction, tokens_of(dataclasses.replace(LAYOUT, tokens=9)))


@pytest.mark.parametrize("name", LEARNED)
def test_a_prefix_of_another_width_is_refused(name: str):
    reduction = reduction_of(name, out=12)
    assert reduction.out_width(8) == 12
    with pytest.raises(ValueError, match="drop the prefix before, or keep the width"):
        run(reduction, tokens_of(LAYOUT))
    alone = dataclasses.replace(LAYOUT, tokens=16, prefix=0)
    got, _ = run(reduction, tokens_of(alone))
    assert got.x.shape == (BATCH, 4, 12)


@pytest.mark.parametrize("name", LEARNED)
def test_without_its_module_a_connector_says_so(name: str):
    with pytest.raises(ValueError, match="no module for this site"):
        reduction_of(name)(tokens_of(LAYOUT), {})


@pytest.mark.parametrize("name", METHODS)
def test_macs_are_the_compilers(name: str):
    config = ViTConfig(
        image_size=(96, 96), patch=(8, 8), width=192, depth=1, heads=3, classes=10, pool="mean",
        class_token=False,
    )  # fmt: skip
    plan = METHODS[name](config.layout)
    own = lambda plan: cost.macs(config, plan) - cost.macs(config)  # noqa: E731
    counted = compiled(config, plan) - compiled(config, Plan())
    assert own(plan) == pytest.approx(counted, rel=0.08, abs=2e5)


def compiled(config: ViTConfig, plan: Plan) -> float:
    f, state = forward(ViT(config, rngs=nnx.Rngs(0)), plan)
    images = jnp.zeros((1, *config.image_size, config.channels))
    return cost.compiled_macs(f, state, images, jax.random.key(0))


def test_what_is_shared_returns_in_the_same_shares():
    tokens = tokens_of(layout_of((3, 5), prefix=1))
    matrix = adaptive_matrix((3, 5), (2, 3))
    map_ = region_map(tokens, matrix, added=2)
    assert (map_.n, map_.k) == (16, 1 + 6 + 2)
    dense = np.asarray(map_.dense())
    close(dense.sum(-2), np.ones((BATCH, 16)))
    np.testing.assert_array_equal((dense[0, 1:7, 1:] > 0), matrix > 0)
    y = jax.random.normal(jax.random.key(3), (BATCH, 9, 4))
    close(map_.restore(y), np.swapaxes(dense, 1, 2) @ np.asarray(y), atol=1e-5)


def test_a_convolution_may_overlap():
    layout = layout_of((6, 6))
    ((_, plain),) = quecc(layout, window=3).steps[-1:]
    ((_, wider),) = quecc(layout, window=3, conv=(4, 2)).steps[-1:]
    n = layout.prefix + 36
    assert wider.counts(n, layout.prefix) == plain.counts(n, layout.prefix) == layout.prefix + 4
    assert wider.macs(n, layout) - plain.macs(n, layout) == 4 * (4**2 - 3**2) * layout.width
    with pytest.raises(ValueError, match=r"conv=\(4, 1\) gives \(3, 3\) queries"):
        quecc(layout, window=3, conv=(4, 1))
