"""C-Abstractor: padding is a border, learned tokens at the end, refusals. Parity: golden cases."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.grids import BATCH, WIDTH, layout_of, module_of, run, tokens_of
from tokred.methods.c_abstractor import c_abstractor

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def reduction_of(grid=(4, 4), prefix=0, **options) -> Any:
    ((_, reduction),) = c_abstractor(layout_of(grid, prefix), depth=1, **options).steps
    return reduction


def conv(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """x [Y X C], kernel [3 3 1 C], zeros around."""
    y, padded = np.zeros_like(x), np.pad(x, [(1, 1), (1, 1), (0, 0)])
    for i, j in np.ndindex(3, 3):
        y += padded[i : i + x.shape[0], j : j + x.shape[1]] * kernel[i, j, 0]
    return y


def block_by_hand(block, x: np.ndarray) -> np.ndarray:
    silu, sigmoid = jax.nn.silu, jax.nn.sigmoid
    y = silu(block.norm1(block.conv1(x)))
    y = silu(block.norm2(jnp.asarray(conv(np.asarray(y), np.asarray(block.conv2.kernel[...])))))
    mean = y.mean((0, 1), keepdims=True)
    y = y * sigmoid(block.excite(silu(block.squeeze(mean))))
    around = x if block.around is None else block.norm_around(block.around(x))
    return np.asarray(silu(block.norm3(block.conv3(y)) + around))


def test_step_by_step():
    reduction = reduction_of(tokens=4, channels=6, out=5)
    tokens, m = tokens_of(layout_of((4, 4))), module_of(reduction)
    got, _ = run(reduction, tokens)
    for row in range(BATCH):
        x = np.asarray(tokens.x[row] + m.position[...]).reshape(4, 4, WIDTH)
        x = block_by_hand(m.before[0], x).reshape(2, 2, 2, 2, 6).mean((1, 3))
        x = block_by_hand(m.after[0], x).reshape(4, 6)
        first, second = m.readout.layers
        close(got.x[row], second(jax.nn.silu(first(x))))


def test_padded_rows_are_a_border():
    """The upper half of a grid, the rest invalid, is that half alone."""
    small, large = reduction_of((4, 4), keep=0.25), reduction_of((8, 4), keep=0.25)
    assert (small.cells, large.cells) == ((2, 2), (4, 2))
    module, wide = module_of(small), module_of(large)
    for name in ("before", "after", "readout"):
        setattr(wide, name, getattr(module, name))
    wide.position[...] = jnp.zeros_like(wide.position[...]).at[:16].set(module.position[...])
    half = tokens_of(layout_of((4, 4)))
    x = jnp.concatenate([half.x, jnp.full((BATCH, 16, WIDTH), 7.0)], 1)
    valid = jnp.arange(32)[None] < jnp.full((BATCH, 1), 16)
    padded = tokens_of(layout_of((8, 4)), valid=valid).replace(x=x)
    want = small(half, {}, module=module)[0]
    got = large(padded, {}, module=wide)[0]
    close(got.x[:, :4], want.x)
    np.testing.assert_array_equal(got.valid[0], np.arange(8) < 4)
    np.testing.assert_array_equal(got.x[:, 4:], 0)


@pytest.mark.parametrize("padding", [False, True])
def test_learned_tokens_at_the_end_are_nobodys(padding: bool):
    layout, reduction = layout_of((4, 4), prefix=1), reduction_of(prefix=1, tokens=4, eos=2)
    valid = jnp.zeros((BATCH, 17), bool).at[:, 0].set(True) if padding else None
    got, map_ = run(reduction, tokens_of(layout, valid))
    assert got.n == map_.k == 1 + 4 + 2
    eos = module_of(reduction).eos[...]
    close(got.x[:, -2:], jnp.broadcast_to(eos, (BATCH, *eos.shape)))
    np.testing.assert_array_equal(got.sizes()[:, -2:], 0)
    np.testing.assert_array_equal(got.position[:, -2:], -1)
    if padding:
        np.testing.assert_array_equal(got.valid[0], [True, *4 * [False], True, True])
    without, _ = run(reduction_of(prefix=1, tokens=4), tokens_of(layout, valid))
    assert without.n == 5


@pytest.mark.parametrize(("depth", "channels"), [(1, None), (3, 4)])
def test_as_many_blocks_on_both_sides(depth: int, channels: int | None):
    ((_, reduction),) = c_abstractor(layout_of((4, 4)), depth=depth, channels=channels).steps
    module = module_of(reduction)
    assert len(module.before) == len(module.after) == depth
    assert (module.before[0].around is None) == (channels is None)
    assert all(block.around is None for block in [*module.before[1:], *module.after])
    assert module.before[0].squeeze.out_features == WIDTH // 4


@pytest.mark.parametrize("field", ["depth", "mlp_depth"])
def test_no_blocks_are_refused(field: str):
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        c_abstractor(layout_of((4, 4)), **{field: 0})
