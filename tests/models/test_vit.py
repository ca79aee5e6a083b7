"""The model without any method: sizes, options, pooling."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.models import ViT, ViTConfig, vit_config
from tokred.models.vit import pool_tokens
from tokred.nn.block import drop_path
from tokred.nn.embeddings import sincos_positions
from tokred.nn.mlp import activate
from tokred.report import Call
from tokred.tokens import make_tokens

TINY = ViTConfig(image_size=(8, 12), patch=(4, 4), width=16, depth=2, heads=2, classes=3)
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))


def make(**changes) -> ViT:
    config = dataclasses.replace(TINY, **changes)
    return nnx.jit(lambda: ViT(config, rngs=nnx.Rngs(0)))()


def run(model: ViT, images=IMAGES, *, call: Call | None = None, valid=None):
    graph, state = nnx.split(model)
    return jax.jit(lambda s, x: nnx.merge(graph, s)(x, call=call, valid=valid)[0])(state, images)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_ti16", (192, 12, 3, 16)),
        ("vit_s16", (384, 12, 6, 16)),
        ("vit_b8", (768, 12, 12, 8)),
        ("vit_l16", (1024, 24, 16, 16)),
        ("vit_h14", (1280, 32, 16, 14)),
    ],
)
def test_sizes_by_name(name, expected):
    c = vit_config(name, classes=10)
    assert (c.width, c.depth, c.heads, c.patch[0]) == expected and c.classes == 10


def test_parameters_of_vit_s16():
    model = nnx.eval_shape(lambda: ViT(vit_config("vit_s16"), rngs=nnx.Rngs(0)))
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == 22_050_664  # as timm's vit_small_patch16_224


def test_layout():
    layout = dataclasses.replace(TINY, registers=2).layout
    assert (layout.tokens, layout.prefix, layout.grid) == (9, 3, (2, 3))
    assert ViTConfig(image_size=32, patch=8).grid == (4, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"registers": 3},
        {"position": "sincos"},
        {"position": "learned_sincos"},
        {"class_token": False, "pool": "mean"},
        {"pool": "size_mean", "norm_after_pool": True},
        {"layer_scale": 0.1, "qkv_bias": False},
        {"gelu": "tanh", "patch_kernel": 7},
        {"attention": "reference"},
    ],
    ids=str,
)
def test_options_run(changes):
    out = run(make(**changes))
    assert out.shape == (2, 3) and np.isfinite(out).all()


def test_positions():
    learned, fixed = make(), make(position="sincos")
    start = make(position="learned_sincos")
    assert isinstance(learned.position, nnx.Param) and isinstance(start.position, nnx.Param)
    assert not isinstance(fixed.position, nnx.Param)
    np.testing.assert_allclose(fixed.position[...][1:], sincos_positions((2, 3), 16), atol=1e-6)
    np.testing.assert_allclose(
        start.position[...][1:], sincos_positions((2, 3), 16, temperature=100.0), atol=1e-6
    )


def test_registers_have_no_position_and_follow_the_class_token():
    model = make(registers=2)
    tokens = model.tokens(IMAGES)
    assert model.registers is not None and model.cls is not None
    np.testing.assert_allclose(tokens.x[0, 1:3], model.registers[...], rtol=1e-6)
    np.testing.assert_allclose(
        tokens.x[0, 0], (model.cls[...] + model.position[...][:1])[0], rtol=1e-6
    )
    place = np.asarray(tokens.position[0])
    assert (place[:3] == -1).all() and place[3:].tolist()[:4] == [[0, 0], [0, 1], [0, 2], [1, 0]]


def test_layer_scale_scales_the_updates():
    x = jax.random.normal(jax.random.key(1), (1, 4, 16))
    plain, scaled = make().blocks[0], make(layer_scale=0.25).blocks[0]
    np.testing.assert_allclose(scaled.feed(x), 0.25 * plain.feed(x), rtol=1e-5)
    none = run(make(layer_scale=0.0))
    np.testing.assert_allclose(none[0], none[1], atol=1e-6)  # only the class token is left


def test_pooling():
    x = jnp.array([[[9.0], [1.0], [2.0], [4.0]]])
    valid = jnp.array([[True, True, True, False]])
    size = jnp.array([[1.0, 3.0, 1.0, 0.0]])
    tokens = make_tokens(x, valid=valid, prefix=1, size=size)
    assert [float(pool_tokens(tokens, p)[0, 0]) for p in ("class", "mean", "size_mean")] == [
        9.0, 1.5, 1.25,
    ]  # fmt: skip
    masked = tokens.replace(policy=jnp.array([[1.0, 0.0, 1.0, 1.0]]))
    assert float(pool_tokens(masked, "mean")[0, 0]) == 2.0


def test_size_mean_is_mean_where_nothing_merged():
    mean = run(make(pool="mean"))
    np.testing.assert_allclose(run(make(pool="size_mean")), mean, rtol=1e-6)


def test_norm_after_pool_swaps_the_two():
    inside, after = make(pool="mean"), make(pool="mean", norm_after_pool=True)
    x, _ = after.encode(after.tokens(IMAGES))
    assert after.head is not None
    expected = after.head(after.norm(x.x[:, 1:].mean(1)))
    np.testing.assert_allclose(run(after), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(run(inside), run(after))


def test_valid_patches_alone_count():
    everything = jnp.ones((2, 6), bool)
    model = make(pool="mean")
    np.testing.assert_allclose(run(model, valid=everything), run(model), rtol=1e-5, atol=1e-6)
    assert not np.allclose(run(model, valid=everything.at[:, 2:].set(False)), run(model))


def test_drop_path_acts_in_training_with_a_key_only():
    model = make(drop_path=0.9)
    quiet = run(model)
    np.testing.assert_array_equal(run(model, call=Call(key=jax.random.key(1))), quiet)
    np.testing.assert_array_equal(run(model, call=Call(train=True)), quiet)
    noisy = run(model, call=Call(key=jax.random.key(1), train=True))
    assert not np.allclose(noisy, quiet)
    again = run(model, call=Call(key=jax.random.key(1), train=True))
    np.testing.assert_array_equal(noisy, again)
    assert not np.allclose(run(model, call=Call(key=jax.random.key(2), train=True)), noisy)


def test_drop_path_keeps_the_mean():
    out = drop_path(jnp.ones((4000, 2)), 0.25, jax.random.key(0))
    np.testing.assert_allclose(np.unique(out), [0.0, 4 / 3], rtol=1e-6)
    np.testing.assert_allclose(out.mean(), 1.0, atol=0.03)
    np.testing.assert_array_equal(out[:, 0], out[:, 1])  # one draw per example


def test_gelu_is_the_one_asked_for():
    x = jnp.linspace(-3, 3, 13)
    exact = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in np.asarray(x)])
    np.testing.assert_allclose(activate(x, "gelu"), exact, atol=1e-6)
    difference = np.abs(activate(x, "gelu_tanh") - exact).max()
    assert 1e-4 < difference < 1e-3


def test_scanned_layers_equal_unrolled_ones_in_training_shape():
    deep = {"depth": 4, "drop_path": 0.5}
    np.testing.assert_allclose(
        run(make(**deep, scan=True)), run(make(**deep)), rtol=1e-4, atol=1e-5
    )


def test_compiled_model_is_the_plain_one():
    model = make()
    plan = make_plan("topk", model.config.layout, keep=0.5, layers=(1,))
    graph, state = nnx.split(model)
    plain, report = model(IMAGES, plan=plan)
    logits, jitted = jax.jit(lambda s: nnx.merge(graph, s)(IMAGES, plan=plan))(state)
    np.testing.assert_allclose(logits, plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(jitted.tokens.sources(), report.tokens.sources())
    assert jitted.counts == report.counts == plan.counts(model.config.layout)
