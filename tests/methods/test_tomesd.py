"""ToMe for Stable Diffusion: merged for one layer, put back behind it."""

import jax
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.methods.tomesd import ToMeSD
from tokred.models import ViT, ViTConfig
from tokred.plan import Plan
from tokred.select import match_cells
from tokred.tokens import make_tokens

CONFIG = ViTConfig(
    image_size=(24, 16), patch=(4, 4), width=32, depth=3, heads=2, class_token=False, pool="mean"
)
X = jax.random.normal(jax.random.key(0), (2, 24, 8))


def test_merged_tokens_share_an_update():
    plan = make_plan("tomesd", CONFIG.layout, keep=0.5, layers=[1])
    model = ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    tokens = model.tokens(jax.random.normal(jax.random.key(1), (2, 24, 16, 3)))
    before, _ = model.encode(tokens, layers=1)
    after, _ = model.encode(tokens, plan=plan, layers=2)
    map_ = ToMeSD(CONFIG.grid, 12).select(before, {}, key=None)
    assert after.n == before.n == 24
    for group, update in zip(np.asarray(map_.target), np.asarray(after.x - before.x), strict=True):
        firsts = update[[np.argmax(group == slot) for slot in group]]
        np.testing.assert_allclose(update, firsts, atol=1e-5)
        assert len(set(group)) == 12


@pytest.mark.parametrize("drawn", [False, True])
def test_one_of_each_cell_stays(drawn):
    draws = jax.random.uniform(jax.random.key(2), (24,)) if drawn else None
    map_ = match_cells(X, 24, (6, 4), draws=draws)
    assert map_.k == 6
    stays = np.sort(np.asarray(map_.index), -1)
    assert (stays == stays[:1]).all()
    rows, columns = np.divmod(stays[0], 4)
    assert sorted(rows // 2 * 2 + columns // 2) == list(range(6))
    assert drawn or (rows % 2 == 0).all()


def test_draws_need_a_key():
    with pytest.raises(ValueError, match="draws need a key"):
        ToMeSD((6, 4), 4, random=True).select(make_tokens(X), {}, key=None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep": 0.1}, "raise keep or stride"),
        ({"stride": 1}, "leaves no token to merge"),
        ({"site": "mid"}, "must be one of"),
        ({"stride": 7}, "raise keep or stride"),
    ],
)
def test_what_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_plan("tomesd", CONFIG.layout, **options)


def test_all_kept_is_dense():
    assert make_plan("tomesd", CONFIG.layout, keep=1.0) == Plan(name="tomesd")
