"""Anyres: an overview and crops as one image whose rows end in newlines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred import Prompted, generate
from tokred.cost import macs
from tokred.data.slicing import plan_anyres
from tokred.methods import make_plan
from tokred.methods.anyres import anyres_index, unpadded
from tokred.models import VLM, DecoderConfig, ViTConfig, VLMConfig
from tokred.plan import Layout
from tokred.tokens import make_tokens

GRID, WIDTH = (2, 3), 16
LAYOUT = Layout(2, 6, 0, GRID, False, WIDTH, 2)
VISION = ViTConfig(
    image_size=(8, 8), patch=(4, 4), channels=1, width=16, depth=1, heads=2, classes=0,
    class_token=False, pool="mean",
)  # fmt: skip
DECODER = DecoderConfig(vocab=13, width=16, depth=1, heads=2, hidden=24, context=64)
CONFIG = VLMConfig(vision=VISION, decoder=DECODER, images=3, image_id=12, newline=True)


def reduction(**options):
    return make_plan("anyres", LAYOUT, **options).of("connector").steps[0][1]


def plan_of(**options):
    return make_plan("anyres", CONFIG.layout, crops=(1, 2), **options)


def run(x, **options):
    line = jnp.full((*x.shape[:-3], x.shape[-1]), -1.0)
    return reduction(**options)(make_tokens(x), {"given_newline": line})[0].x


def test_crops_are_one_map_whose_rows_end():
    """Two crops of 2 x 3 side by side, behind an overview of 6 tokens; 18 is the newline."""
    want = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 18, 9, 10, 11, 15, 16, 17, 18]
    np.testing.assert_array_equal(anyres_index(GRID, (1, 2), (2, 6)), want)


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((10, 60), (1, 3), (0, 6)),  # one row of four, but borders are equal
        ((60, 10), (0, 4), (3, 3)),  # two thirds of a column are none
        ((20, 30), (0, 4), (0, 6)),
        ((21, 30), (0, 4), (0, 6)),  # 5.7 columns: borders of half a token are none
    ],
)
def test_what_padding_leaves(size, rows, columns):
    found = unpadded((4, 6), size)
    assert [(s.start, s.stop) for s in found] == [rows, columns]


def test_images_of_a_batch_and_their_views_do_not_mix():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, WIDTH))  # two images of 3 views each
    out = run(x, crops=(1, 2))
    assert out.shape == (2, 2, 20, WIDTH)
    np.testing.assert_array_equal(out[:, 1:], run(x[:, 3:], crops=(1, 2)))
    np.testing.assert_array_equal(out[::-1], run(x[::-1], crops=(1, 2)))


def test_every_token_and_the_newline_get_a_gradient_each_time_they_stand():
    def total(x, line):
        given = {"given_newline": line}
        return reduction(crops=(2, 1))(make_tokens(x), given)[0].x.sum()

    x, line = jnp.ones((1, 3, 6, WIDTH)), jnp.ones((1, WIDTH))
    to_x, to_line = jax.grad(total, argnums=(0, 1))(x, line)
    assert (to_x == 1).all()
    assert (to_line == 4).all()  # four rows


def test_a_vlm_reads_writes_and_counts_one_image():
    plan = plan_of(size=plan_anyres((300, 800)).content)
    model = VLM(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[1, 12, 2]])
    images = jax.random.normal(jax.random.key(1), (1, 3, 8, 8, 1))
    logits, report = model(ids, images, plan=plan)
    count = CONFIG.image_tokens(plan)
    assert logits.shape == (1, 3, 13)
    assert report.tokens.n == 2 + count == CONFIG.decoder_layout(3, plan).tokens
    assert macs(CONFIG, plan, tokens=3) < macs(CONFIG, tokens=3) + 10**6
    out = generate(Prompted(model, images, plan), ids, steps=2)
    assert out.ids.shape == (1, 2)


def test_what_reduces_tokens_stands_in_front_or_behind():
    """Pooled views are grids too; the decoder drops tokens behind."""
    pooled = make_plan("pooling", CONFIG.layout, keep=0.25, site="output")
    whole = pooled + plan_of(grid=(1, 1))
    assert CONFIG.image_tokens(whole) == 1 + 3
    whole += make_plan("uniform", CONFIG.decoder_layout(3, whole), keep=0.5, site="output")
    model = VLM(CONFIG, plan=whole, rngs=nnx.Rngs(0))
    images = jnp.ones((1, 3, 8, 8, 1))
    assert model(jnp.asarray([[1, 12, 2]]), images, plan=whole)[1].tokens.n == 3


@pytest.mark.parametrize(
    ("options", "views", "message"),
    [
        ({"crops": (1, 2)}, 2, "expected .* with 3 views of every image"),
        ({"crops": (1, 2), "grid": (3, 3)}, 3, "expected all tokens of 3x3 grids, got 6"),
        ({"crops": (0, 2)}, 3, "crops=\\(0, 2\\) must be at least 1"),
        ({"crops": (1, 2), "size": (0, 5)}, 3, "size=\\(0, 5\\) must be at least 1"),
    ],
)
def test_other_views_are_refused(options, views, message):
    with pytest.raises(ValueError, match=message):
        run(jnp.ones((1, views, 6, WIDTH)), **options)


def test_a_model_without_a_newline_says_so():
    config = VLMConfig(vision=VISION, decoder=DECODER, images=3, image_id=12)
    model = VLM(config, plan=plan_of(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="nothing is given as 'newline'"):
        model(jnp.asarray([[1, 12, 2]]), jnp.ones((1, 3, 8, 8, 1)), plan=plan_of())


def test_views_that_make_no_whole_image_are_refused():
    model = VLM(CONFIG, plan=plan_of(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="joins 3 views of every image, which 4 images"):
        model(jnp.asarray([[1, 12, 2]]), jnp.ones((1, 4, 8, 8, 1)), plan=plan_of())
