"""KARL: who halts, what the head learns from, conditioning, and what it says of bad options."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.methods.karl import (
    ERRORS,
    Karl,
    Target,
    active_labels,
    bin_up,
    blocked_pairs,
    halting_loss,
)
from tokred.models import ViT, ViTConfig
from tokred.nn.routers import ErrorEmbedding
from tokred.ops import attention
from tokred.plan import Site
from tokred.report import Call
from tokred.tokens import make_tokens

CONFIG = ViTConfig(image_size=(12, 12), patch=(4, 4), width=16, depth=4, heads=2, classes=3)
B, N, T = 2, 10, 6  # a class token, three tokens that never halt, six latent ones
X = jax.random.normal(jax.random.key(0), (B, N, 1))
LOGITS = jnp.array([[2.0, -1.0, 3.0, 0.0, 1.0, 1.2], [5.0, 4.0, 3.0, 2.0, 1.5, 1.3]])


def head(x: jax.Array) -> jax.Array:
    return LOGITS


def halt(reduction: Karl, twin="packed", train=False, **fields):
    tokens = make_tokens(X, prefix=1, **fields)
    return reduction(tokens, {}, module=head, twin=twin, train=train)


def kept(tokens) -> list[list[int]]:
    return [np.flatnonzero(row >= 0).tolist() for row in np.asarray(tokens.sources())]


def test_who_halts():
    """Above 0.75, a logit of 1.0986; one latent token stays."""
    tokens, map_, _, aux = halt(Karl(T, T))
    assert kept(tokens) == [[0, 1, 2, 3, 5, 7, 8], [0, 1, 2, 3, 9]]
    np.testing.assert_array_equal(aux["overflow"], [0, 0])
    assert map_.k == N and float(aux["share"]) == pytest.approx(4 / 12)
    soft, _, _, _ = halt(Karl(T, T), "soft")
    np.testing.assert_array_equal(soft.valid[0], np.isin(np.arange(N), [0, 1, 2, 3, 5, 7, 8]))


def test_too_few_slots_go_to_the_least_halted():
    tokens, _, _, aux = halt(Karl(T, 2))
    assert tokens.n == 6 and kept(tokens) == [[0, 1, 2, 3, 5, 7], [0, 1, 2, 3, 9]]
    np.testing.assert_array_equal(aux["overflow"], [1, 0])
    assert kept(halt(Karl(T, 2), "soft")[0]) == kept(tokens)


def test_padding_never_stays():
    valid = jnp.arange(N)[None] < jnp.array([[8], [4]])
    tokens, _, _, aux = halt(Karl(T, T), valid=valid)
    assert kept(tokens) == [[0, 1, 2, 3, 5, 7], [0, 1, 2, 3]]
    assert float(aux["share"]) == pytest.approx(2 / 4)


def test_removing_halted_tokens_is_blocking_them():
    """To every other token in the decoder's attention."""
    halted = jnp.arange(N)[None] == jnp.array([[4], [7]])
    q, k, v = jax.random.normal(jax.random.key(1), (3, B, N, 1, 8))
    blocked = attention(q, k, v, mask=~blocked_pairs(halted))
    gone = attention(q, k, v, valid=~halted)
    np.testing.assert_allclose(blocked[~halted], gone[~halted], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(blocked[halted], v[halted], rtol=1e-5, atol=1e-6)


def test_errors_are_binned_up():
    error = jnp.array([[0.0, 0.005, 0.0051], [0.2, 0.37, 0.9]])
    np.testing.assert_array_equal(bin_up(error, jnp.asarray(ERRORS)), [[0, 0, 1], [14, 18, 18]])


def test_phases_of_training():
    """First all should stay, and do; then the labels say who, and the head decides who does."""
    tokens, map_, _, aux = halt(Karl(T, 3), "soft", train=True)
    assert map_ is None and tokens.valid is None
    nats = lambda target: optax.sigmoid_binary_cross_entropy(LOGITS, target)  # noqa: E731
    np.testing.assert_allclose(aux["loss_halting"], nats(0.0).mean(), rtol=1e-6)
    active = active_labels(jnp.array([2, 2]), T)
    np.testing.assert_array_equal(active.sum(-1), [2, 2])
    extra = {"active": jnp.pad(active, ((0, 0), (N - T, 0)))}
    tokens, _, _, aux = halt(Karl(T, T), "soft", train=True, extra=extra)
    assert kept(tokens) == kept(halt(Karl(T, T))[0])
    wanted = nats(0.0)[:, :2].mean() + nats(1.0)[:, 2:].mean()
    np.testing.assert_allclose(aux["loss_halting"], wanted, rtol=1e-6)
    assert "loss_halting" not in halt(Karl(T, 3), train=True)[3]
    all_active = halting_loss(LOGITS, jnp.ones((B, T), bool))
    np.testing.assert_allclose(all_active, nats(0.0).mean(), rtol=1e-6)


def test_the_head_learns_from_labels_alone():
    plan = make_plan("karl", CONFIG.layout, error=0.05, keep=0.6).with_twin("soft")
    model = nnx.jit(lambda: ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0)))()
    graph, state = nnx.split(model)
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))

    @jax.jit
    def grads(state, weight):
        def loss(state):
            model = nnx.merge(graph, state)
            tokens = model.tokens(images)
            labels = active_labels(jnp.array([10, 5]), 10)
            tokens = tokens.replace(extra={"active": labels})
            tokens, report = model.encode(tokens, plan=plan, call=Call(train=True))
            return model.classify(tokens).var() + weight * sum(report.losses.values())

        return jax.grad(loss)(state)

    with_loss, without = (grads(state, weight)["reductions"] for weight in (1.0, 0.0))
    assert all(g.any() for g in jax.tree.leaves(with_loss["after_1"]))
    assert not any(g.any() for g in jax.tree.leaves(without["after_1"]))
    assert without["input"]["table"][...].any(-1).tolist() == [e == 0.05 for e in ERRORS]


def test_the_wanted_error_conditions_the_first_token():
    levels = ErrorEmbedding(jnp.asarray(ERRORS), 1)
    tokens, map_, _, _ = Target(0.11)(make_tokens(X, prefix=1), {}, module=levels)
    np.testing.assert_allclose(tokens.x[:, 0], X[:, 0] + 0.12, rtol=1e-6)
    np.testing.assert_array_equal(tokens.x[:, 1:], X[:, 1:])
    assert map_ is None
    own = {"error": jnp.array([[0.3] * N, [0.01] * N])}
    tokens, _, _, _ = Target(0.11)(make_tokens(X, prefix=1, extra=own), {}, module=levels)
    np.testing.assert_allclose(tokens.x[:, 0, 0] - X[:, 0, 0], [0.32, 0.01], rtol=1e-4)


def test_the_output_of_an_encoder():
    plan = make_plan("karl", CONFIG.layout, site="output", keep=0.4, latents=5)
    assert plan.steps == ((Site("output"), Karl(5, 2)),)
    model = nnx.jit(lambda: ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0)))()
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
    _, report = jax.jit(lambda x: model(x, plan=plan))(images)
    assert report.tokens.n == 1 + 4 + 2 and report.counts[-1].out == 10


def test_nobody_halts_above_a_threshold_of_one():
    tokens = make_tokens(X, prefix=1)
    assert Karl(T, T, threshold=1.0)(tokens, {})[0] is tokens


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"latents": 10}, r"latents=10 must lie in \[1, 9\]"),
        ({"site": "mid"}, "site='mid' must be one of"),
        ({"threshold": 0.0}, r"threshold=0\.0 must be above 0"),
        ({"layer": 4}, "lies outside a model of 4 layers"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        make_plan("karl", CONFIG.layout, **options)


def test_bad_settings():
    bare = ViTConfig(image_size=(12, 12), patch=(4, 4), width=16, class_token=False, pool="mean")
    with pytest.raises(ValueError, match=r"error=0\.1 conditions the first token"):
        make_plan("karl", bare.layout, error=0.1)
    with pytest.raises(ValueError, match=r"capacity=7 must lie in \[1, latents=6\]"):
        Karl(T, 7)
    with pytest.raises(ValueError, match="build it with plan="):
        Karl(T, 3)(make_tokens(X, prefix=1), {})
