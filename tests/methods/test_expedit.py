"""Expedit: who may meet, what comes back, windows, one cluster, and bad options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.fold import fold, unfold, window_order
from tokred.methods import make_plan
from tokred.methods.expedit import Expedit, near_pairs
from tokred.models import ViT, ViTConfig
from tokred.nn.run import Here, run_block
from tokred.ops import gather
from tokred.plan import Plan, Site
from tokred.report import Call
from tokred.tokens import make_tokens

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
GRID, CELLS = (4, 6), (2, 3)
X = jax.random.normal(jax.random.key(0), (2, 1 + 24, 5))
CONFIG = ViTConfig(image_size=(16, 24), patch=(4, 4), width=16, depth=4, heads=2, classes=5)
IMAGES = jax.random.normal(jax.random.key(1), (2, 16, 24, 3))


@functools.partial(jax.jit, static_argnums=0)
def cluster(reduction: Expedit, tokens):
    return reduction(tokens, {})


def test_near_pairs():
    """Seven places on three cells are home in 0 0 0 1 1 2 2; a window of 3 reaches one further."""
    near = near_pairs((1, 7), (1, 3), 3)
    assert near.astype(int).tolist() == [[1] * 5 + [0] * 2, [1] * 7, [0] * 3 + [1] * 4]
    alone = near_pairs((4, 6), (2, 3), 1)
    assert alone.sum(0).tolist() == [1] * 24 and alone[4].nonzero()[0].tolist() == [14, 15, 20, 21]


def test_decisive_clusters_of_one_window_are_pooling():
    """window=1: each token belongs to its own cell alone; the nearest centre comes back."""
    tokens = make_tokens(X, prefix=1)
    moved, map_, _, aux = cluster(Expedit(GRID, CELLS, window=1, back="label"), tokens)
    cells = X[:, 1:].reshape(2, 2, 2, 3, 2, 5).mean((2, 4)).reshape(2, 6, 5)
    close(moved.x[:, 1:], cells)
    np.testing.assert_array_equal(moved.x[:, 0], X[:, 0])
    close(moved.sizes(), jnp.broadcast_to(jnp.array([1.0] + [4.0] * 6), (2, 7)))
    back = aux["combine"].restore.restore(moved.x)
    gap = np.linalg.norm(np.asarray(X[:, 1:, None] - cells[:, None]), axis=-1)
    close(back[:, 1:], np.take_along_axis(np.asarray(cells), gap.argmin(-1)[..., None], 1))
    close(map_.restore(moved.x)[:, 0], X[:, 0])


def test_what_comes_back_has_weights_of_length_or_sum_one():
    tokens = make_tokens(X, prefix=1)
    for norm, order in (("l2", 2), ("sum", 1)):
        _, map_, _, _ = cluster(
            Expedit(GRID, CELLS, temperature=1.0, neighbours=2, norm=norm), tokens
        )
        close(np.linalg.norm(map_.back, order, axis=-1), 1.0)
        assert ((map_.back[:, 1:] > 0).sum(-1) == 2).all()
        assert not map_.back[:, 1:, 0].any()
    _, cold, _, _ = cluster(Expedit(GRID, CELLS, temperature=1.0, back_temperature=50.0), tokens)
    _, label, _, _ = cluster(Expedit(GRID, CELLS, temperature=1.0, back="label"), tokens)
    np.testing.assert_array_equal(cold.back.argmax(-1), label.back.argmax(-1))


def test_padding_rows_have_no_cluster():
    valid = jnp.ones((2, 25), bool).at[:, 13:].set(False)  # the lower half
    tokens = make_tokens(X, valid=valid, prefix=1)
    moved, map_, _, _ = cluster(Expedit(GRID, CELLS, temperature=1.0), tokens)
    assert moved.valid.tolist() == [[True] * 4 + [False] * 3] * 2
    upper = cluster(Expedit((2, 6), (1, 3), temperature=1.0), make_tokens(X[:, :13], prefix=1))
    close(moved.x[:, :4], upper[0].x)
    close(map_.restore(moved.x)[:, :13], upper[1].restore(upper[0].x))
    assert not map_.restore(moved.x)[:, 13:].any()


def test_windows_lead():
    """Clusters inside each window of a grid, as for models with windowed attention."""
    order = jnp.broadcast_to(window_order((4, 6), (2, 3)), (2, 24))
    windows = fold(gather(X[:, 1:], order, axis=1), 4)
    reduction = Expedit((2, 3), (1, 2), temperature=1.0)
    moved, map_, _, _ = cluster(reduction, make_tokens(windows))
    assert moved.x.shape == (2, 4, 2, 5)
    alone = cluster(reduction, make_tokens(windows[:, 2]))
    close(moved.x[:, 2], alone[0].x)
    close(unfold(map_.restore(moved.x))[:, 12:18], alone[1].restore(alone[0].x))


def test_a_frozen_model():
    """Layers 2 and 3 run on clusters; what they give comes back by the map's own matrix."""
    plan = make_plan("expedit", CONFIG.layout, keep=0.3, layer=2)
    reduction = Expedit((4, 6), (2, 3))
    assert plan.steps == ((Site("around", 2, 3), reduction),)
    model = nnx.jit(lambda: ViT(CONFIG, rngs=nnx.Rngs(0)))()
    tokens, report = jax.jit(lambda m, x: m.encode(m.tokens(x), plan=plan))(model, IMAGES)
    assert tokens.n == 25 and report.counts[2].queries == 7
    before = model.encode(model.tokens(IMAGES), layers=2)[0]
    inside, map_, _, _ = cluster(reduction, before)
    for layer in (2, 3):
        here = Here(dict(enumerate(model.blocks)), layer, Plan(), Call())
        inside = run_block(here, inside).tokens
    close(tokens.x, model.norm(map_.restore(inside.x)), atol=1e-4)


def test_one_cluster_and_none():
    one = make_plan("expedit", CONFIG.layout, keep=0.01, layer=1)
    assert one.counts(CONFIG.layout)[1].queries == 2
    assert make_plan("expedit", CONFIG.layout, keep=1.0) == Plan(name="expedit")
    default = make_plan("expedit", CONFIG.layout)
    assert default.steps[0][0] == Site("around", 1, 3)


def test_means_have_gradients_and_distances_none():
    reduction = Expedit(GRID, CELLS)
    tokens = make_tokens(X, prefix=1)
    _, map_, _, _ = cluster(reduction, tokens)
    slope = lambda f: jax.jit(jax.grad(lambda x: jnp.square(f(x)).sum()))(X)  # noqa: E731
    found = slope(lambda x: reduction(make_tokens(x, prefix=1), {})[0].x)
    close(found, slope(lambda x: map_.apply(x, "mean")))


def test_bad_options():
    layout = CONFIG.layout
    for options, message in (
        ({"back": "nearest"}, "back='nearest' must be one of"),
        ({"norm": "l1"}, "norm='l1' must be one of"),
        ({"neighbours": 0}, "neighbours=0 must be at least 1"),
        ({"neighbours": -1}, "neighbours=-1 must be at least 1"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"layer": 4}, "must be a layer from"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan("expedit", layout, **options)
    with pytest.raises(ValueError, match="expected the 24 tokens of grid"):
        Expedit(GRID, CELLS)(make_tokens(X[:, :20], prefix=1), {})
