"""DPC-KNN, k-medoids: what becomes of a cluster's features, weights, and bad options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.maps import Assign
from tokred.methods import make_plan
from tokred.methods.dpc_knn import DPCKNN, shares
from tokred.methods.k_medoids import RECEIVED, KMedoids
from tokred.models import ViT, ViTConfig
from tokred.tokens import make_tokens

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
B, N, D, P, K = 2, 12, 6, 2, 3
X = jax.random.normal(jax.random.key(0), (B, N, D))
SIZE = jnp.asarray(np.random.default_rng(0).integers(1, 5, (B, N)), jnp.float32)
BARE = ViTConfig(
    image_size=(12, 12), patch=(4, 4), width=8, depth=2, heads=2, classes=3, class_token=False,
    pool="mean",
)  # fmt: skip


def by_hand(map_, weight: np.ndarray, eps: float) -> np.ndarray:
    """Means behind the prefix."""
    rows = np.zeros((B, K, D))
    for b in range(B):
        for k in range(K):
            own = np.flatnonzero(np.asarray(map_.target[b]) == P + k)
            mass = weight[b, own].sum() + eps
            rows[b, k] = (weight[b, own, None] * np.asarray(X[b, own])).sum(0) / mass
    return rows


@pytest.mark.parametrize("weight", ["equal", "size", "score"])
def test_a_cluster_is_a_weighted_mean(weight):
    reduction = DPCKNN(K, weight=weight, eps=0.25)
    score = reduction.build(D, 1, nnx.Rngs(0))
    tokens = make_tokens(X, prefix=P, size=SIZE)
    moved, map_, _, _ = jax.jit(lambda t, m: reduction(t, {}, module=m))(tokens, score)
    wanted = {
        "equal": lambda: np.ones((B, N)),
        "size": lambda: np.asarray(SIZE),
        "score": lambda: np.exp(score(X)[..., 0]),
    }[weight]()
    close(moved.x[:, P:], by_hand(map_, wanted, 0.25))
    np.testing.assert_array_equal(moved.x[:, :P], X[:, :P])
    close(moved.sizes().sum(-1), SIZE.sum(-1))


def test_the_score_learns():
    reduction = DPCKNN(K, weight="score")
    score, tokens = reduction.build(D, 1, nnx.Rngs(0)), make_tokens(X, prefix=P)

    graph, state = nnx.split(score)

    @jax.jit
    @jax.grad
    def slope(state):
        return jnp.square(reduction(tokens, {}, module=nnx.merge(graph, state))[0].x).sum()

    assert slope(state)["kernel"][...].all()


def test_shares_of_a_group_that_nobody_wants_are_finite():
    map_ = Assign(jnp.zeros((B, N), jnp.int32), 1)
    assert not shares(map_, jnp.zeros((B, N)), eps=0.0).any()


def test_a_cluster_is_its_medoid():
    weight = jax.random.uniform(jax.random.key(1), (B, N))
    tokens = make_tokens(X, prefix=P, size=SIZE)
    run = jax.jit(lambda t, w: KMedoids(K)(t, {RECEIVED.name: w}))
    moved, map_, _, _ = run(tokens, weight)
    rows = jnp.take_along_axis(X, map_.index[..., None], axis=1)
    np.testing.assert_array_equal(moved.x, rows)
    close(moved.sizes().sum(-1), SIZE.sum(-1))
    again = run(tokens, weight.at[:, :P].set(9.0))[1]  # what the prefix received does not count
    np.testing.assert_array_equal(again.index, map_.index)


def test_attention_of_the_layer_before():
    """From all queries: no class token is needed, but a layer is."""
    plan = make_plan("k_medoids", BARE.layout, keep=0.5, layers=(1,))
    model = ViT(BARE, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (B, 12, 12, 3))
    _, report = jax.jit(lambda x: model(x, plan=plan))(images)
    received = report.evidence["before_1"][RECEIVED.name]
    close(received.sum(-1), 1.0)
    before = make_tokens(model.encode(model.tokens(images), layers=1)[0].x)
    want = KMedoids(4).select(before, {RECEIVED.name: received}, key=None)
    np.testing.assert_array_equal(report.maps["before_1"].target, want.target)
    first = make_plan("k_medoids", BARE.layout, keep=0.5, layers=(0,))
    with pytest.raises(ValueError, match="column_mean"):
        model(images, plan=first)
    alike = make_plan("k_medoids", BARE.layout, keep=0.5, layers=(0,), weighted=False)
    assert model(images, plan=alike)[1].tokens.n == 4


def test_bad_options():
    with pytest.raises(ValueError, match="dpc_knn: weight='attention' must be one of"):
        make_plan("dpc_knn", BARE.layout, weight="attention")
    with pytest.raises(ValueError, match="has no module for this site"):
        DPCKNN(K, weight="score")(make_tokens(X), {})
    with pytest.raises(ValueError, match="neighbours=0 must lie in"):
        DPCKNN(K, neighbours=0)(make_tokens(X), {})
