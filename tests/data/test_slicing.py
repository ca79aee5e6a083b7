"""Slicing plans of large images, the pixels of their views, and batches of several sizes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tokred.data.augment import resize
from tokred.data.conversations import ConversationFormat, make_example
from tokred.data.slicing import (
    ANYRES,
    SlicePlan,
    best_grid,
    bucket_by_grid,
    plan_anyres,
    plan_slices,
    room_for,
    slice_image,
    stack_views,
)
from tokred.models import VLM, DecoderConfig, ViT, ViTConfig, VLMConfig

RNG = np.random.default_rng(0)
sides = st.integers(1, 3000)


def picture(y: int, x: int, channels: int = 3) -> np.ndarray:
    return RNG.standard_normal((y, x, channels)).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "grid", "overview", "part"),
    [
        ((336, 336), (0, 0), (336, 336), (0, 0)),
        ((200, 300), (0, 0), (266, 406), (0, 0)),
        ((1088, 672), (3, 2), (420, 252), (336, 322)),
        ((300, 2000), (1, 7), (126, 854), (336, 322)),
        ((1024, 1024), (3, 3), (336, 336), (336, 336)),
    ],
)
def test_plans(size, grid, overview, part):
    plan = plan_slices(size)
    assert (plan.grid, plan.overview, plan.slice) == (grid, overview, part)
    assert plan.canvas == plan.content == (grid[0] * part[0], grid[1] * part[1])


@given(sides, sides, st.integers(8, 500), st.integers(1, 20), st.integers(1, 12))
def test_any_plan_holds_its_promises(y, x, base, patch, limit):
    plan = plan_slices((y, x), base=base, patch=patch, limit=limit)
    assert plan.count <= limit and plan.count != 1
    assert (plan.count == 0) == (y * x <= base**2 or limit == 1)
    for side in (*plan.overview, *plan.slice):
        assert side % patch == 0
    assert min(plan.overview) >= patch and math.prod(plan.overview) <= max(
        base**2, patch * max(plan.overview)
    )
    assert len(plan.separators) == plan.count == plan.prompt().count("<image>") - 1


@given(sides, sides)
def test_a_turned_image_has_the_turned_grid(y, x):
    """But where two grids are equally near, the first is taken."""
    plan, turned = plan_slices((y, x)), plan_slices((x, y))
    if plan.grid[::-1] != turned.grid:
        far = [abs(math.log(x / y) - math.log(g[1] / g[0])) for g in (plan.grid, turned.grid[::-1])]
        assert far[0] == pytest.approx(far[1])


def test_separators_and_prompts():
    plan = plan_slices((672, 1088))
    assert plan.grid == (2, 3) and "".join(plan.separators) == ",,\n,,\n"
    assert plan.prompt("#") == "#,#,#\n#,#,#\n#"
    assert plan_slices((9, 9)).prompt() == "<image>"
    assert plan_anyres((300, 500)).prompt("#") == "###"


def test_the_best_of_a_few_grids():
    assert best_grid((300, 600)) == (1, 2)
    assert best_grid((600, 300)) == (2, 1)
    assert best_grid((672, 672)) == (2, 2)
    assert best_grid((200, 2000)) == (1, 3)
    assert best_grid((100, 100)) == (2, 1)  # all show all of it: the first that wastes least
    assert best_grid((100, 100), grids=((2, 2), (1, 1))) == (1, 1)
    assert best_grid((1000, 10), base=500) == (2, 1)


@given(sides, sides)
def test_anyres_keeps_the_shape_of_the_image(y, x):
    plan = plan_anyres((y, x), base=336)
    assert plan.grid in ANYRES and plan.slice == plan.overview == (336, 336)
    (a, b), canvas = plan.content, plan.canvas
    assert (a == canvas[0] or b == canvas[1]) and a <= canvas[0] and b <= canvas[1]
    scale = min(canvas[0] / y, canvas[1] / x)
    assert abs(a - y * scale) <= 1 and abs(b - x * scale) <= 1


def test_slices_are_the_resized_image_in_parts():
    image = picture(40, 100)
    plan = plan_slices(image.shape[:2], base=32, patch=4, limit=4)
    overview, slices = slice_image(image, plan)
    assert plan.grid == (1, 3) and slices.shape == (3, *plan.slice, 3)
    np.testing.assert_array_equal(overview, resize(image, *plan.overview))
    whole = np.concatenate([*slices], axis=1)
    np.testing.assert_array_equal(whole, resize(image, *plan.canvas))
    rows = plan_slices((90, 60), base=32, patch=4, limit=6)
    tall = picture(90, 60)
    _, slices = slice_image(tall, rows)
    (r, c), (y, x) = rows.grid, rows.slice
    canvas = resize(tall, *rows.canvas)
    for n, (i, j) in enumerate(itertools.product(range(r), range(c))):
        np.testing.assert_array_equal(slices[n], canvas[i * y : i * y + y, j * x : j * x + x])


def test_the_content_of_anyres_is_in_the_middle():
    image = np.ones((20, 60, 1), np.float32)
    plan = plan_anyres(image.shape[:2], base=16)
    overview, slices = slice_image(image, plan)
    assert plan.grid == (1, 3) and plan.content == (16, 48)
    np.testing.assert_allclose(slices, 1, rtol=1e-6)
    plan = plan_anyres((20, 40), base=16, grids=((2, 2),))
    _, slices = slice_image(image[:, :40], plan)
    whole = np.concatenate([np.concatenate([*row], 1) for row in slices.reshape(2, 2, 16, 16, 1)])
    np.testing.assert_allclose(whole[8:24], 1, rtol=1e-6)
    assert not whole[:8].any() and not whole[24:].any() and overview.shape == (16, 16, 1)


def test_an_image_that_needs_no_slices():
    overview, slices = slice_image(picture(8, 8, 1), plan_slices((8, 8), base=16, patch=4))
    assert overview.shape == (16, 16, 1) and slices.shape == (0, 16, 16, 1)


def test_pixels_of_a_byte_stay_bytes():
    image = RNG.integers(0, 255, (40, 40, 3), np.uint8)
    overview, slices = slice_image(image, plan_slices((40, 40), base=20, patch=4))
    assert overview.dtype == slices.dtype == np.uint8 and len(slices) == 4


SIZES = [(40, 40), (10, 12), (20, 90), (44, 38), (60, 25)]
HOW = {"base": 16, "patch": 4, "limit": 6}


def test_buckets_hold_images_of_one_grid():
    plans = [plan_slices(size, **HOW) for size in SIZES]
    buckets = bucket_by_grid(plans)
    assert sorted(i for bucket in buckets.values() for i in bucket.indices) == list(range(5))
    for grid, bucket in buckets.items():
        assert bucket.places == 1 + grid[0] * grid[1]
        for i in bucket.indices:
            assert plans[i].grid == grid
            views = stack_views(
                picture(*SIZES[i]), plans[i], places=bucket.places, size=bucket.size, patch=4
            )
            assert views.image_valid.all() and views.image.shape[1:3] == bucket.size
    assert buckets[(0, 0)].indices == (1,)


def test_images_of_several_sizes_make_one_batch():
    plans = [plan_slices(size, **HOW) for size in SIZES]
    places, size = room_for(plans)
    assert places == 7
    for plan, shape in zip(plans, SIZES, strict=True):
        image = picture(*shape)
        views = stack_views(image, plan, places=places, size=size, patch=4)
        overview, slices = slice_image(image, plan)
        assert views.image.shape == (places, *size, 3) and views.image.dtype == np.float32
        assert views.image_valid.sum() == plan.count + 1 and views.image_valid[: plan.count].all()
        y, x = plan.overview
        np.testing.assert_array_equal(views.image[plan.count, :y, :x], overview)
        for n, part in enumerate(slices):
            np.testing.assert_array_equal(views.image[n, : part.shape[0], : part.shape[1]], part)
        real = views.patch_valid.reshape(places, size[0] // 4, size[1] // 4)
        shown = real.repeat(4, 1).repeat(4, 2)
        assert not views.image[~shown].any() and shown.sum() == overview[..., 0].size + (
            slices[..., 0].size
        )
        assert not views.patch_valid[~views.image_valid].any()


def test_the_overview_of_anyres_comes_first():
    image = picture(20, 70)
    plan = plan_anyres((20, 70), base=16)
    views = stack_views(image, plan, places=4, size=(16, 16), patch=4)
    overview, slices = slice_image(image, plan)
    np.testing.assert_array_equal(views.image, [overview, *slices])
    assert views.patch_valid.all()


def test_an_encoder_sees_nothing_of_the_padding():
    plan = plan_slices((20, 90), **HOW)
    places, size = room_for([plan])
    views = stack_views(picture(20, 90), plan, places=places, size=size, patch=4)
    config = ViTConfig(
        image_size=size, patch=(4, 4), width=16, depth=1, heads=2, classes=2, pool="mean",
        class_token=False,
    )  # fmt: skip
    graph, state = nnx.split(ViT(config, rngs=nnx.Rngs(0)))
    run = jax.jit(lambda s, x, valid: nnx.merge(graph, s)(x, valid=valid)[0])
    shown = views.patch_valid.reshape(places, size[0] // 4, size[1] // 4)
    hidden = ~shown.repeat(4, 1).repeat(4, 2)[..., None]
    first = run(state, views.image, views.patch_valid)
    second = run(state, np.where(hidden, 9.0, views.image), views.patch_valid)
    assert hidden.any()
    np.testing.assert_allclose(first[views.image_valid], second[views.image_valid], atol=1e-6)


def test_a_language_model_reads_images_of_several_sizes():
    """Those of fewer slices have absent ones, which change nothing."""
    form = ConversationFormat(24, images=5)
    vision = ViTConfig(
        image_size=(16, 16), patch=(8, 8), channels=1, width=16, depth=1, heads=2, classes=0,
        pool="mean", class_token=False,
    )  # fmt: skip
    decoder = DecoderConfig(vocab=260, width=16, depth=1, heads=2, context=64)
    model = VLM(VLMConfig(vision=vision, decoder=decoder, images=5), rngs=nnx.Rngs(0))
    rows = []
    for shape in ((20, 70), (40, 40)):
        plan = plan_anyres(shape, base=16)
        views = stack_views(picture(*shape, 1), plan, places=5, size=(16, 16), patch=8)
        row = make_example(views.image[views.image_valid], [(plan.prompt() + "?", "no")], form)
        np.testing.assert_array_equal(row["image_valid"], views.image_valid)
        rows.append(row)
    batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    assert batch["image_valid"].sum(-1).tolist() == [4, 5]
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, image):
        given = batch["image_valid"]
        model = nnx.merge(graph, state)
        return model(batch["input"], image, valid=batch["input_valid"], image_valid=given)[0]

    logits = run(state, batch["image"])
    other = run(state, batch["image"].at[0, 4].set(9.0))
    valid = batch["input_valid"]
    np.testing.assert_allclose(logits[valid], other[valid], atol=1e-5)
    assert jnp.abs(logits - run(state, batch["image"].at[0, 3].set(9.0))).max() > 1e-4


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: plan_slices((0, 4)),
            r"^size must be an image's height and width, .* got \(0, 4\)",
        ),
        (lambda: plan_slices((4, 4), base=0), "^base must be at least 1, got 0: change base"),
        (lambda: plan_slices((4, 4), patch=0), "^patch must be at least 1, got 0"),
        (lambda: plan_slices((4, 4), limit=0), "^limit must be at least 1, got 0"),
        (lambda: plan_anyres((4, 4), grids=()), "^grids must be pairs of rows and columns"),
        (lambda: plan_anyres((4, 4), base=0), "^base must be at least 1, got 0"),
        (lambda: room_for([]), "^plans must be at least one"),
    ],
)
def test_bad_plans(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"places": 2}, "^places must be at least 5 for this image, got 2: change places"),
        ({"size": (8, 16)}, r"^size must be at least \(16, 16\) for this image, got \(8, 16\)"),
        ({"patch": 3}, "^patch must be a divisor of the 16 pixels of a view, got 3"),
        ({"patch": 0}, "^patch must be at least 1, got 0"),
    ],
)
def test_bad_stacks(change, match):
    plan = SlicePlan((16, 16), (2, 2), (16, 16), (32, 32), ("",) * 4)
    how = {"places": 5, "size": (16, 16), "patch": 4, **change}
    with pytest.raises(ValueError, match=match):
        stack_views(picture(40, 40), plan, **how)
