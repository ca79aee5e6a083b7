"""TokenLearner: both versions by hand, the way back, padding, and bad options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.methods.tokenlearner import LearnAndFuse, MapLearner, TokenLearner
from tokred.models import ViT, ViTConfig
from tokred.nn.run import Here, run_block
from tokred.plan import Plan, Site
from tokred.report import Call
from tokred.tokens import make_tokens

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
GRID, D, P, K = (3, 4), 8, 1, 5
X = jax.random.normal(jax.random.key(0), (2, P + 12, D))
CONFIG = ViTConfig(image_size=(12, 16), patch=(4, 4), width=16, depth=4, heads=2, classes=5)
IMAGES = jax.random.normal(jax.random.key(1), (2, 12, 16, 3))


def built(reduction, width=D):
    """Its module, moved away from the start."""
    graph, state = nnx.split(reduction.build(width, 1, nnx.Rngs(0)))
    draw = lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(draw, state))


def layer_norm(x, norm):
    y = np.asarray(x, np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    return y * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def linear(x, layer):
    y = np.asarray(x, np.float64) @ np.asarray(layer.kernel[...])
    return y if layer.bias is None else y + np.asarray(layer.bias[...])


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def conv_by_hand(x, kernel):
    """[h w C] -> [h w S], zeros around."""
    h, w, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((h, w, kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            out += padded[i : i + h, j : j + w] @ np.asarray(kernel[i, j], np.float64)
    return out


@functools.partial(jax.jit, static_argnums=0)
def learn(reduction, module, tokens):
    return reduction(tokens, {}, module=module)


@pytest.mark.parametrize("mean", [False, True])
def test_version_1_0(mean):
    reduction = MapLearner(K, GRID, mean)
    module = built(reduction)
    got = learn(reduction, module, make_tokens(X, prefix=P))[0].x
    np.testing.assert_array_equal(got[:, :P], X[:, :P])
    for b in range(2):
        y = layer_norm(X[b, P:], module.norm).reshape(*GRID, D)
        for i, conv in enumerate(module.convs):
            y = conv_by_hand(tanh_gelu(y) if i else y, conv.kernel[...])
        weights = 1 / (1 + np.exp(-y.reshape(12, K).T))
        close(got[b, P:], weights @ np.asarray(X[b, P:]) / (12 if mean else 1))


def test_version_1_1():
    """A softmax over tokens, which are not normalised when they are summed."""
    reduction = TokenLearner(K, 7)
    module = built(reduction)
    got = learn(reduction, module, make_tokens(X, prefix=P))[0].x
    for b in range(2):
        y = linear(layer_norm(X[b, P:], module.norm), module.fc1)
        logits = linear(tanh_gelu(y), module.fc2).T
        close(got[b, P:], jax.nn.softmax(logits, -1) @ X[b, P:])


def test_version_1_0_sees_zeros_where_there_is_padding():
    """In all four convolutions, as beyond the border."""
    reduction, short = MapLearner(K, GRID, True), MapLearner(K, (2, 4), True)
    module, valid = built(reduction), jnp.broadcast_to(jnp.arange(P + 12) < P + 8, (2, P + 12))
    wild = jnp.where(valid[..., None], X, 50.0)
    tokens = make_tokens(X, valid=valid, prefix=P).replace(x=wild)
    alone = short.build(D, 1, nnx.Rngs(0))
    alone.norm, alone.convs = module.norm, module.convs
    got = learn(reduction, module, tokens)[0]
    want = learn(short, alone, make_tokens(X[:, : P + 8], prefix=P))[0]
    close(got.x, want.x)
    close(got.sizes(), want.sizes())


def test_the_way_back():
    """All patches get a share of what the layer made of the few; the prefix comes back as is."""
    valid = jnp.ones((2, P + 12), bool).at[:, 10:].set(False)
    tokens = make_tokens(X, valid=valid, prefix=P)
    reduction = LearnAndFuse(TokenLearner(K, 7), 6)
    module = built(reduction)
    entered, _, _, aux = learn(reduction, module, tokens)
    y = entered.x + 1.0
    back = aux["combine"].put_back(tokens.x, entered.x, y, None)
    np.testing.assert_array_equal(back[:, :P], y[:, :P])
    fuser = module.fuser
    for b in range(2):
        few = linear(layer_norm(y[b, P:], fuser.norm1).T, fuser.mix).T
        hidden = linear(layer_norm(tokens.x[b, P:], fuser.norm_original), fuser.mlp.fc1)
        weights = 1 / (1 + np.exp(-linear(tanh_gelu(hidden), fuser.mlp.fc2)))
        wanted = np.asarray(tokens.x[b, P:]) + weights @ layer_norm(few, fuser.norm2)
        close(back[b, P:10], wanted[:9])
    assert not back[:, 10:].any()


def test_a_model_with_fusers_starts_as_one_whose_patches_skip():
    """Officially the fuser's mix starts at 0, and so does what it adds."""
    plan = make_plan("tokenlearner", CONFIG.layout, tokens=3, layer=2, fuse=True)
    learner = TokenLearner(3)
    both = LearnAndFuse(learner)
    assert plan.steps == ((Site("around", 2), both), (Site("around", 3), both))
    model = nnx.jit(lambda: ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0)))()
    tokens, report = jax.jit(lambda m, x: m.encode(m.tokens(x), plan=plan))(model, IMAGES)
    before = model.encode(model.tokens(IMAGES), layers=2)[0]
    close(tokens.x[:, 1:], model.norm(before.x)[:, 1:])
    entered = learner(before, {}, module=model.reductions["around_2"].learner)[0]
    here = Here(dict(enumerate(model.blocks)), 2, Plan(), Call())
    first = run_block(here, entered).tokens.x[:, :1]
    assert report.counts[2].queries == 4 and tokens.n == 13
    third = before.replace(x=jnp.concatenate([first, before.x[:, 1:]], axis=1))
    entered = learner(third, {}, module=model.reductions["around_3"].learner)[0]
    last = run_block(Here(here.blocks, 3, Plan(), Call()), entered).tokens.x
    close(tokens.x[:, :1], model.norm(last)[:, :1])


def test_both_ways_learn():
    plan = make_plan("tokenlearner", CONFIG.layout, tokens=3, layer=2, fuse=True, version="1.0")
    graph, state = nnx.split(nnx.jit(lambda: ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0)))())
    draw = lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape)  # noqa: E731
    state["reductions"] = jax.tree.map(draw, state["reductions"])

    @jax.jit
    @jax.grad
    def slope(state):
        model = nnx.merge(graph, state)
        return jnp.square(model.encode(model.tokens(IMAGES), plan=plan)[0].x[..., 0]).mean()

    found = jax.tree.leaves(slope(state)["reductions"])
    assert all(np.isfinite(g).all() and np.any(g) for g in found)


def test_bad_options():
    layout = CONFIG.layout
    with pytest.raises(ValueError, match=r"version='1\.2' must be one of"):
        make_plan("tokenlearner", layout, version="1.2")
    with pytest.raises(ValueError, match="would leave 14 of 13 tokens"):
        make_plan("tokenlearner", layout, tokens=13)
    with pytest.raises(ValueError, match="expected the 12 tokens of grid"):
        MapLearner(K, GRID)(make_tokens(X[:, :9], prefix=P), {})
    with pytest.raises(ValueError, match="has no module for this site"):
        LearnAndFuse(TokenLearner(K))(make_tokens(X, prefix=P), {})
    assert make_plan("tokenlearner", layout).steps == ((Site("before", 2), TokenLearner(1)),)
