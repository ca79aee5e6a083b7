"""Restore: every patch again, between what reduced them and what needs them all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred import Prompted, generate
from tokred.cost import macs
from tokred.methods import make_plan
from tokred.methods.restore import Restore
from tokred.models import VLM, DecoderConfig, ViT, ViTConfig, VLMConfig
from tokred.plan import Plan, Site
from tokred.report import Call
from tokred.tokens import make_tokens

VISION = ViTConfig(
    image_size=(16, 16), patch=(4, 4), channels=1, width=16, depth=3, heads=2, classes=0,
)  # fmt: skip
DECODER = DecoderConfig(vocab=13, width=16, depth=2, heads=2, hidden=24, context=64)
CONFIG = VLMConfig(vision=VISION, decoder=DECODER, images=1, image_id=12)
IMAGES = jax.random.normal(jax.random.key(1), (2, 16, 16, 1))
BEFORE = {
    "tome": {"r": 3},
    "evit": {"keep": 0.5, "fuse": False},
    "diffrate": {"prune": [12, 12, 9], "merge": [10, 8, 7]},
    "uniform": {"keep": 0.25},
}


@pytest.mark.parametrize("method", BEFORE)
def test_patches_are_copies_of_what_they_became(method: str):
    layout = VISION.layout
    plan = make_plan(method, layout, **BEFORE[method])
    model = ViT(VISION, rngs=nnx.Rngs(0))
    encode = lambda plan, **how: model.encode(model.tokens(IMAGES, **how), plan=plan)[0]  # noqa: E731
    left, whole = encode(plan), encode(plan + make_plan("restore", layout))
    assert left.n < whole.n == layout.tokens and whole.prefix == 1
    source = np.asarray(left.sources())
    rows = np.take_along_axis(np.asarray(left.x), np.maximum(source, 0)[..., None], axis=1)
    np.testing.assert_array_equal(whole.valid, source >= 0)
    np.testing.assert_allclose(whole.x, np.where(source[..., None] >= 0, rows, whole.x), atol=1e-5)
    np.testing.assert_array_equal(whole.sources(), np.where(source >= 0, np.arange(17), -1))
    assert bool((whole.valid.all()) == (method == "tome"))


def test_padding_stays_padding():
    valid = jnp.arange(16)[None] % 4 < jnp.array([[4], [3]])
    model = ViT(VISION, rngs=nnx.Rngs(0))
    plan = make_plan("tome", VISION.layout, r=3) + make_plan("restore", VISION.layout)
    tokens, _ = model.encode(model.tokens(IMAGES, valid), plan=plan)
    np.testing.assert_array_equal(tokens.valid[:, 1:], valid)
    np.testing.assert_array_equal((tokens.position >= 0).all(-1)[:, 1:], valid)


def test_where_nothing_was_reduced_the_input_comes_back():
    tokens = make_tokens(jnp.ones((2, 17, 4)), prefix=1)
    assert Restore((4, 4))(tokens, {})[0] is tokens
    plan = make_plan("restore", VISION.layout)
    assert plan.counts(VISION.layout)[-1].out == 17
    assert macs(VISION, plan) == macs(VISION)


def test_what_belongs_to_a_token_comes_back_with_it():
    tokens = make_tokens(
        jnp.arange(3.0)[None, :, None],
        prefix=1,
        source=jnp.array([[0, 2, 1, 2, -1]]),
        extra={"level_0": jnp.array([[[7.0], [8.0], [9.0]]])},
        size=jnp.array([[1.0, 1.0, 2.0]]),
        policy=jnp.ones((1, 3)),
    )
    whole, map_, _, _ = Restore((2, 2))(tokens, {})
    assert map_ is None and whole.size is None and whole.policy is None
    np.testing.assert_array_equal(whole.x[0, :, 0], [0, 2, 1, 2, 0])
    np.testing.assert_array_equal(whole.extra["level_0"][0, :4, 0], [7, 9, 8, 9])
    np.testing.assert_array_equal(whole.position[0, 1:4], [[0, 0], [0, 1], [1, 0]])


def test_another_grid_is_refused():
    tokens = make_tokens(jnp.ones((1, 3, 4)), source=jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match=r"restore: 9 tokens entered .* change grid"):
        Restore((2, 2))(tokens, {})


def whole_plan() -> Plan:
    """Merging in the encoder, Matryoshka queries, depths in the decoder, and a smaller cache."""
    layout = CONFIG.layout
    plan = make_plan("tome", layout, r=4) + make_plan("restore", layout)
    plan += make_plan("mqt", layout, length=4)
    plan += make_plan("mod", CONFIG.decoder_layout(plan=plan), keep=0.5, gate="predictor")
    return plan + make_plan("tova", CONFIG.decoder_layout(plan=plan), budget=6)


def test_four_families_in_one_model():
    plan = whole_plan()
    model = VLM(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    ids = jnp.array([[12, 1, 2, 3], [1, 12, 4, 5]])
    logits, report = model(ids, IMAGES[:, None], plan=plan)
    assert logits.shape == (2, 4, 13) and bool(jnp.isfinite(logits).all())
    assert report.parts["vision"].counts[-1].out == 17  # all of them again
    assert report.parts["vision"].counts[-1].mlp == 17 - 3 * 4
    alone = [make_plan("tome", CONFIG.layout, r=4), make_plan("mqt", CONFIG.layout, length=4)]
    assert macs(CONFIG, plan) < min(macs(CONFIG, each) for each in alone)
    text = generate(Prompted(model, IMAGES[:, None], plan), ids, steps=3)
    assert text.ids.shape == (2, 3) and text.cache.layers[0].k.shape[-2] < 7 + 3
    graph, state = nnx.split(model)

    def loss(state, images):
        model = nnx.merge(graph, state)
        return model(ids, images, plan=plan, call=Call(train=True))[0].sum()

    to_state, to_images = jax.grad(loss, argnums=(0, 1), allow_int=True)(state, IMAGES[:, None])
    assert bool((to_images != 0).any((1, 2, 3, 4)).all())
    blocks = to_state["vision"]["blocks"][0]["attn"]["query"]["kernel"]
    assert bool((blocks[...] != 0).any())


def test_the_soft_twin_gives_patches_back_too():
    layout = VISION.layout
    rates = make_plan("diffrate", layout).with_twin("soft")
    model = ViT(VISION, plan=rates, rngs=nnx.Rngs(0))
    left, report = model.encode(model.tokens(IMAGES), plan=rates)
    whole, after = model.encode(model.tokens(IMAGES), plan=rates + make_plan("restore", layout))
    assert after.counts[-1].out == whole.n == 17
    assert left.policy is not None and whole.policy is None
    want = jnp.where(whole.valid[..., None], report.restore(left.x), whole.x)
    np.testing.assert_allclose(whole.x, want, atol=1e-5)


def test_the_site():
    assert make_plan("restore", VISION.layout).steps == ((Site("after", 2), Restore((4, 4))),)
    assert make_plan("restore", VISION.layout, layer=1).steps[0][0] == Site("after", 1)
