"""Matryoshka queries that begin where they look."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.models import ViT, ViTConfig
from tokred.nn.resampler import Resampler, spread
from tokred.nn.resampler_shape import ResamplerShape

CONFIG = ViTConfig(image_size=(16, 16), patch=(4, 4), width=96, depth=1, heads=3, classes=5)


def local(side, **changed):
    how: dict[str, Any] = {
        "positions": "only",
        "query": "norm",
        "key": "norm",
        "out": "bare",
        "start": "local",
    }
    return ResamplerShape(96, 3, side**2, **(how | changed))


@pytest.mark.parametrize("side", [4, 6, 8])
def test_a_query_begins_with_the_token_at_its_place(side):
    module = Resampler(local(side), 96, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, side**2, 96))
    y, weights = module(x, grid=(side, side))
    own = np.asarray(weights)[0][:, np.arange(side**2), spread(side)]
    assert own.mean() > 0.4
    assert np.corrcoef(np.ravel(y), np.ravel(x[:, spread(side)]))[0, 1] > 0.6


def test_a_drawn_one_begins_with_a_mean_of_all():
    x = jax.random.normal(jax.random.key(0), (1, 64, 96))
    _, weights = Resampler(local(8, start="drawn"), 96, rngs=nnx.Rngs(0))(x, grid=(8, 8))
    assert weights.max() < 0.2


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_every_place_comes_once(side):
    assert sorted(spread(side)) == list(range(side**2))


def test_every_beginning_covers_the_grid():
    for count, cells in ((4, 2), (16, 4)):
        rows, columns = np.divmod(spread(8)[:count], 8)
        within = rows // (8 // cells) * cells + columns // (8 // cells)
        assert sorted(within) == list(range(count))


def test_fewer_queries_are_a_beginning():
    plan = make_plan("mqt", CONFIG.layout, length=4, start="local")
    model = ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    _, few = model(images, plan=plan)
    _, all_ = model(images, plan=make_plan("mqt", CONFIG.layout, start="local"))
    kept = few.tokens.x[:, few.tokens.prefix :]
    np.testing.assert_allclose(kept, all_.tokens.x[:, 1:5], atol=1e-6)
    assert jnp.isfinite(kept).all()


def test_a_single_one_has_no_neighbours():
    with pytest.raises(ValueError, match="several learned queries"):
        local(1)


@pytest.mark.parametrize(
    "changed", [{"positions": "keys"}, {"queries": "average"}, {"form": "pre"}]
)
def test_others_cannot_begin_so(changed):
    with pytest.raises(ValueError, match="use start='drawn'"):
        local(4, **changed)
