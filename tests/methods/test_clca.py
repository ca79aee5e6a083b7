"""CLCA: what is written to the cache, when it comes back, the head over states, bad options."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.methods.clca import MEMO, CrossLayer, class_states, with_cache
from tokred.models import ViT, ViTConfig
from tokred.nn.cross_layer import StatesHead
from tokred.plan import Plan
from tokred.report import Call, make_report
from tokred.tokens import make_tokens

CONFIG = ViTConfig(image_size=(16, 16), patch=(4, 4), width=16, depth=6, heads=2, classes=3)
B, N, D = 2, 6, 4
X = jax.random.normal(jax.random.key(0), (B, N, D))


def held(tokens) -> np.ndarray:
    return np.asarray(tokens.memo[MEMO])


def test_the_mean_and_the_last_tokens_are_written():
    tokens, map_, _, _ = CrossLayer(0, False, True, apart=2)(make_tokens(X, prefix=1), {})
    assert map_ is None
    np.testing.assert_allclose(held(tokens)[:, 0], X[:, 1:4].mean(1), rtol=1e-6)
    np.testing.assert_array_equal(held(tokens)[:, 1], X[:, -1])
    again, _, _, _ = CrossLayer(2, False, True, apart=2)(tokens.replace(x=2 * X), {})
    np.testing.assert_array_equal(held(again)[:, :2], held(tokens))
    np.testing.assert_allclose(held(again)[:, 2:], 2 * held(tokens), rtol=1e-6)


def test_padding_is_not_in_the_mean():
    valid = jnp.arange(N)[None] < jnp.array([[4], [1]])
    tokens = make_tokens(X, valid=valid, prefix=1)
    tokens, _, _, _ = CrossLayer(0, False, True, last=0)(tokens, {})
    np.testing.assert_allclose(held(tokens)[0, 0], X[0, 1:4].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(held(tokens)[1], 0)


def test_entries_come_back_before_new_ones_are_written():
    """Then the last token is an entry, and the mean leaves out what came back."""
    entries = jnp.full((B, 2, D), 7.0)
    tokens = make_tokens(X, prefix=1).replace(memo={MEMO: entries, "other": jnp.ones(B)})
    step = CrossLayer(2, True, True, apart=2, tells=True)
    out, map_, _, aux = step(tokens, {})
    np.testing.assert_array_equal(out.x, jnp.concatenate([X, entries], 1))
    np.testing.assert_allclose(held(out)[:, 0], X[:, 1:].mean(1), rtol=1e-6)
    np.testing.assert_array_equal(held(out)[:, 1], 7)
    np.testing.assert_array_equal(aux["class_state"], X[:, 0])
    assert map_ is not None and map_.k == N + 2 == step.counts(N, 1)
    last, _, _, _ = CrossLayer(2, True, False)(tokens, {})
    assert set(last.memo) == {"other"}


def test_the_plan_of_the_released_code():
    """Reductions in layers 1 and 3 of 6: entries come back there and in layer 4."""
    plan = make_plan("clca", CONFIG.layout, keep=0.6, layers=(1, 3))
    steps = [step for _, step in plan.steps if isinstance(step, CrossLayer)]
    assert [s.recovers for s in steps] == [False, True, False, True, True, False]
    assert [s.held for s in steps] == [0, 2, 2, 4, 2, 0]
    assert [s.writes for s in steps] == [True] * 4 + [False] * 2
    assert [s.apart for s in steps[:4]] == [1, 2, 2, 4]
    assert [s.tells for s in steps] == [False, True, False, True, False, True]
    out = [count.out for count in plan.counts(CONFIG.layout)]
    assert out == [18, 1 + 11 + 1 + 2, 15, 1 + 9 + 1 + 4, 17, 17]


@pytest.mark.parametrize("base", ["topk", "tome", "dynamicvit"])
def test_any_reducing_method_can_be_wrapped(base):
    plan = with_cache(make_plan(base, CONFIG.layout, keep=0.5), CONFIG.layout)
    model = nnx.jit(lambda: ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0)))()
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    logits, report = jax.jit(lambda x: model(x, plan=plan, call=Call()))(images)
    assert np.isfinite(logits).all()
    assert report.tokens.n == plan.counts(CONFIG.layout)[-1].out
    assert class_states(report).shape == (2, len(class_layers(plan)), 16)


def class_layers(plan: Plan) -> set[Any]:
    return {site.layer for site, step in plan.steps if isinstance(step, CrossLayer) and step.tells}


def test_states_are_in_the_order_of_layers():
    """Also where a compiled function has sorted their names."""
    report = make_report(make_tokens(X), (), (), ())
    aux = {f"after_{i}": {"class_state": jnp.full((B, D), float(i))} for i in (10, 11, 2, 9)}
    told = class_states(dataclasses.replace(report, aux=aux))
    np.testing.assert_array_equal(told[0, :, 0], [2, 9, 10, 11])


def test_the_head_is_a_grouped_convolution_over_states():
    head = StatesHead(D, 3, 5, kernels=2, rngs=nnx.Rngs(0))
    states = jax.random.normal(jax.random.key(2), (4, 3, D))
    head.norm1.mean[...] = jnp.ones(D)
    got = head(states)
    x = (np.asarray(states) - 1) / np.sqrt(1 + 1e-5)
    wide = np.zeros((4, D * 2), np.float32)
    for d in range(D):
        for g in range(2):
            wide[:, 2 * d + g] = x[:, :, d] @ np.asarray(head.mix[...])[d, g]
    wide = jax.nn.gelu(wide / np.sqrt(1 + 1e-5), approximate=False)
    np.testing.assert_allclose(got, head.out(wide), rtol=1e-4, atol=1e-5)
    before = np.asarray(head.norm1.mean[...])
    head(states, train=True)
    assert (np.asarray(head.norm1.mean[...]) != before).all()


def test_nothing_to_bring_back():
    assert make_plan("clca", CONFIG.layout, keep=1.0).steps == ()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"own": 0, "mean": False}, "own=0 and mean=False write nothing"),
        ({"base": "pooling"}, "plan 'pooling' reduces in no layer"),
        ({"base": "evitt"}, "did you mean 'evit'"),
        ({"base": "tome", "layers": (1,)}, "method 'tome' has no option 'layers'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        make_plan("clca", CONFIG.layout, keep=0.5, **options)
