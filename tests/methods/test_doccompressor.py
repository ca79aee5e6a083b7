"""DocCompressor in a model of pages: the whole view first, then its crops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.models import VLM, DecoderConfig, ViTConfig, VLMConfig
from tokred.nn.regions import group_crops
from tokred.plan import Layout
from tokred.tokens import make_tokens

GRID, WIDTH = (2, 3), 16
LAYOUT = Layout(2, 6, 0, GRID, False, WIDTH, 2)
VISION = ViTConfig(
    image_size=(8, 8), patch=(4, 4), channels=1, width=16, depth=1, heads=2, classes=0,
    class_token=False, pool="mean",
)  # fmt: skip
DECODER = DecoderConfig(vocab=13, width=16, depth=1, heads=2, hidden=24, context=32)


@functools.cache
def reduction(crops=(1, 2)):
    return make_plan("doccompressor", LAYOUT, crops=crops).of("connector").steps[0][1]


def module(crops=(1, 2)):
    return reduction(crops).build(WIDTH, 2, nnx.Rngs(0))


def pages(seed=0, crops=2):
    return make_tokens(jax.random.normal(jax.random.key(seed), (2, 1 + crops, 6, WIDTH)))


def test_groups_lie_where_the_whole_view_does():
    """Two crops side by side make one map of 2 x 6; cell (i, j) of the view has its 1 x 2 block."""
    page = jnp.arange(12.0).reshape(2, 6)
    crops = jnp.stack([page[:, :3], page[:, 3:]])[None, :, :, :, None]
    groups = group_crops(crops)[..., 0]
    want = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    np.testing.assert_array_equal(groups, want)


def test_a_token_sees_its_own_crops_tokens_alone():
    run = jax.jit(lambda x: reduction()(make_tokens(x), {}, module=module())[0].x)
    x = pages().x
    before, after = run(x), run(x.at[:, 1, 0, 0].add(1.0))
    changed = np.flatnonzero(np.abs(after - before).max((0, 1, 3)) > 1e-6)
    np.testing.assert_array_equal(changed, [0])
    assert before.shape == (2, 1, 6, WIDTH)


def test_pages_of_a_batch_do_not_mix():
    run = jax.jit(lambda x: reduction()(make_tokens(x), {}, module=module())[0].x)
    x = pages().x
    np.testing.assert_allclose(run(x)[::-1], run(x[::-1]), atol=1e-6)


def test_gradients_are_finite_and_reach_view_and_crops():
    loss = lambda x: jnp.square(reduction()(make_tokens(x), {}, module=module())[0].x).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(pages().x)
    assert jnp.isfinite(gradient).all()
    assert (jnp.abs(gradient).max((0, 2, 3)) > 0).all()


def test_a_vlm_reads_one_image_of_a_page():
    config = VLMConfig(vision=VISION, decoder=DECODER, images=3, image_id=12)
    plan = make_plan("doccompressor", config.layout, crops=(1, 2), heads=2)
    model = VLM(config, plan=plan, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[1, 12, 2]])
    images = jax.random.normal(jax.random.key(1), (1, 3, 8, 8, 1))
    logits, report = model(ids, images, plan=plan)
    assert logits.shape == (1, 3, 13)
    assert report.tokens.n == 2 + 4


def test_other_images_than_a_page_are_refused():
    with pytest.raises(ValueError, match="expected the 3 images of a page and its 1x2 crops"):
        reduction()(pages(crops=3), {}, module=module())
    with pytest.raises(ValueError, match="expected all tokens of 2x3 grids"):
        short = pages()
        short = dataclasses.replace(short, x=short.x[:, :, :5])
        reduction()(short, {}, module=module())
