"""FlexTok and One-D-Piece: what stays, what training draws and learns, bad options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.methods.nested_dropout import MaskToken, NestedDropout
from tokred.models import ViT, ViTConfig
from tokred.nested import sample_length
from tokred.plan import Site
from tokred.report import Call
from tokred.tokens import make_tokens

CONFIG = ViTConfig(image_size=(12, 12), patch=(4, 4), width=16, depth=4, heads=2, classes=3)
B, N, T, D = 4, 10, 6, 5  # a class token, three others that stay, six latent ones
X = jax.random.normal(jax.random.key(0), (B, N, D))
KEY = jax.random.key(2)
MASK = MaskToken(D, rngs=nnx.Rngs(0))
HIDE, REPLACE = NestedDropout(T, 2, shared=True), NestedDropout(T, 2, tail="replace")


def drop(reduction: NestedDropout, twin="packed", **how):
    tokens = make_tokens(X, prefix=1, valid=how.pop("valid", None))
    return reduction(tokens, {}, module=MASK, twin=twin, **how)


@pytest.mark.parametrize("reduction", [HIDE, REPLACE])
def test_packed_is_cut_off(reduction):
    tokens, map_, _, aux = drop(reduction, train=True)
    np.testing.assert_array_equal(tokens.x, X[:, :6])
    assert tokens.valid is None and map_.k == 6 and not aux
    valid = jnp.arange(N)[None] != jnp.array([[4], [5], [0], [9]])
    tokens, map_, _, _ = drop(reduction, valid=valid)
    np.testing.assert_array_equal(tokens.valid, valid[:, :6])
    np.testing.assert_array_equal(map_.source >= 0, valid & (jnp.arange(N) < 6)[None])


def test_soft_is_hidden_or_replaced():
    inside = np.arange(N) < 6
    hidden, map_, _, aux = drop(HIDE, "soft")
    np.testing.assert_array_equal(hidden.valid, np.tile(inside, (B, 1)))
    np.testing.assert_array_equal(map_.source[0] >= 0, inside)
    np.testing.assert_array_equal(aux["length"], [2] * B)
    replaced, map_, _, _ = drop(REPLACE, "soft")
    np.testing.assert_array_equal(replaced.x[:, :6], X[:, :6])
    np.testing.assert_array_equal(replaced.x[:, 6:], np.tile(MASK(), (B, 4, 1)))
    assert map_ is None and replaced.valid is None and replaced.source is None


def test_training_draws_lengths():
    """One for all, or one for each, whatever the length outside training."""
    hidden, _, _, aux = drop(HIDE, "soft", train=True, key=KEY)
    wanted = sample_length(KEY, T)
    np.testing.assert_array_equal(aux["length"], [int(wanted)] * B)
    np.testing.assert_array_equal(hidden.valid.sum(-1), [4 + int(wanted)] * B)
    replaced, _, _, aux = drop(REPLACE, "soft", train=True, key=KEY)
    np.testing.assert_array_equal(aux["length"], sample_length(KEY, T, shape=(B,)))
    changed = (replaced.x != X).any(-1).sum(-1)
    np.testing.assert_array_equal(changed, T - aux["length"])
    assert len(set(aux["length"].tolist())) > 1


def test_chosen_lengths():
    chosen = NestedDropout(T, T, rule="choices", values=(1, 4, 6), weights=(0.0, 1.0, 0.0))
    _, _, _, aux = drop(chosen, "soft", train=True, key=KEY)
    np.testing.assert_array_equal(aux["length"], [4] * B)


def test_nothing_dropped_is_the_input():
    tokens = make_tokens(X, prefix=1)
    for twin in ("packed", "soft"):
        assert NestedDropout(T, T)(tokens, {}, twin=twin)[0] is tokens
    trained, _, _, _ = NestedDropout(T, T, rule="pow2")(
        tokens, {}, twin="soft", train=True, key=KEY
    )
    assert not trained.valid.all()


def test_a_model_under_each():
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
    for name in ("flextok", "onedpiece"):
        plan = make_plan(name, CONFIG.layout, site="output", keep=0.4, latents=5)
        assert plan.steps[0][0] == Site("output")
        model = nnx.jit(lambda plan=plan: ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0)))()
        assert list(model.reductions) == (["output"] if name == "flextok" else [])
        _, report = jax.jit(lambda x, plan=plan, model=model: model(x, plan=plan))(images)
        assert report.tokens.n == 1 + 4 + 2 and report.counts[-1].out == 10
    plan = make_plan("onedpiece", CONFIG.layout, rule="choices", values=[3, 9], weights=[1, 2])
    site, reduction = plan.steps[0]
    draws = {"rule": "choices", "values": (3, 9), "weights": (1, 2)}
    assert site == Site("after", 1) and reduction == NestedDropout(9, 5, shared=True, **draws)
    assert isinstance(hash(plan), int)


def test_the_mask_token_learns_where_it_is_seen():
    plan = make_plan("flextok", CONFIG.layout).with_twin("soft")
    model = nnx.jit(lambda: ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0)))()
    graph, state = nnx.split(model)
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))

    def loss(state, key):
        call = Call(key=key, train=key is not None)
        return nnx.merge(graph, state)(images, plan=plan, call=call)[0].var()

    for key in (None, KEY):
        grads = jax.jit(jax.grad(loss))(state, key)
        assert grads["reductions"]["after_1"]["token"][...].any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"latents": 10}, r"flextok: latents=10 must lie in \[1, 9\]"),
        ({"site": "mid"}, "flextok: site='mid' must be one of"),
        ({"layer": 4}, "lies outside a model of 4 layers"),
        ({"rule": "odd"}, "rule='odd' must be one of"),
        ({"rule": "choices", "values": (10,)}, r"integers in \[1, 9\]"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        make_plan("flextok", CONFIG.layout, **options)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"length=7 must lie in \[1, latents=6\]"):
        NestedDropout(T, 7)
    with pytest.raises(ValueError, match="tail='drop' must be one of"):
        NestedDropout(T, 2, tail="drop")
    with pytest.raises(ValueError, match="training draws lengths; pass a key"):
        drop(HIDE, "soft", train=True)
    with pytest.raises(ValueError, match="build it with plan="):
        REPLACE(make_tokens(X, prefix=1), {}, twin="soft")
