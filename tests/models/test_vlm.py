"""A vision-language model against its parts put together by hand, under plans in all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.cost import expected_macs, macs
from tokred.methods import make_plan
from tokred.models import VLM, DecoderConfig, Prompted, ViTConfig, VLMConfig, vlm_config
from tokred.models.generate import generate
from tokred.plan import Plan
from tokred.report import Call
from tokred.tokens import make_tokens

IMAGE = 12
VISION = ViTConfig(
    image_size=(16, 16), patch=(4, 4), channels=1, width=16, depth=3, heads=2, classes=0
)
DECODER = DecoderConfig(vocab=13, width=24, depth=2, heads=3, head_dim=8, hidden=32, context=64)
CONFIG = VLMConfig(vision=VISION, decoder=DECODER, images=2, image_id=IMAGE)
IDS = jnp.asarray([[1, IMAGE, 2, 3, IMAGE, 4, 5], [IMAGE, IMAGE, 6, 7, 8, 0, 0]])
VALID = jnp.asarray([[True] * 7, [True] * 5 + [False] * 2])
DENSE = Plan()


@functools.cache
def pictures():
    return jax.random.normal(jax.random.key(3), (2, 2, 16, 16, 1))


def build(plan=DENSE, config=CONFIG):
    return VLM(config, plan=plan, rngs=nnx.Rngs(0))


def run(model, plan=DENSE, ids=IDS, valid=VALID, call=None, **how):
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state, ids, images, valid):
        merged = nnx.merge(graph, state)
        return merged(ids, images, plan=plan, call=call, valid=valid, **how)

    return forward(state, ids, pictures(), valid)


def vision_plan(name, **options):
    return make_plan(name, CONFIG.layout, **options)


def test_logits_are_those_of_the_parts_by_hand():
    model = build()
    logits, report = run(model)
    flat = pictures().reshape(4, 16, 16, 1)
    seen, _ = model.vision.encode(model.vision.tokens(flat))
    images = model.projector(seen.x[:, 1:]).reshape(2, 2, 16, 24)
    words = model.decoder.embed(IDS)
    row = jnp.concatenate([words[0, :1], images[0, 0], words[0, 2:4], images[0, 1], words[0, 5:]])
    place = jnp.arange(len(row), dtype=jnp.float32)[None, :, None]
    tokens, _, _ = model.decoder.decode(make_tokens(row[None], position=place))
    want = model.decoder.logits(tokens)[0, np.asarray([0, 16, 17, 18, 34, 35, 36])]
    np.testing.assert_allclose(logits[0], want, atol=2e-5)
    assert report.tokens.n == 7 + 2 * 15


def test_padding_on_either_side_changes_nothing():
    model = build()
    logits, _ = run(model)
    ids = jnp.roll(IDS, 2, axis=1).at[1].set(jnp.asarray([0, 0, IMAGE, IMAGE, 6, 7, 8]))
    ids, valid = ids.at[0].set(IDS[0]), VALID.at[1].set(jnp.asarray([False] * 2 + [True] * 5))
    left, _ = run(model, ids=ids, valid=valid)
    np.testing.assert_allclose(logits[0], left[0], atol=2e-5)
    np.testing.assert_allclose(logits[1, :5], left[1, 2:], atol=2e-5)


@pytest.mark.parametrize("length", [1, 5, 16])
def test_any_length_of_a_matryoshka_model_hides_what_it_would_leave_out(length):
    plan = vision_plan("mqt", length=length)
    model = build(plan)
    packed, report = run(model, plan)
    soft, masked = run(model, plan.with_twin("soft"))
    np.testing.assert_allclose(packed[VALID], soft[VALID], atol=2e-5)
    assert report.tokens.n == 7 + 2 * (length - 1)
    assert masked.tokens.n == 7 + 2 * 15


def test_the_loss_reaches_the_used_queries_alone():
    plan = vision_plan("mqt", length=5)
    graph, params, rest = nnx.split(build(plan), nnx.Param, ...)

    def loss(params):
        logits, _ = nnx.merge(graph, params, rest)(IDS, pictures(), plan=plan, valid=VALID)
        return jnp.square(logits[VALID]).mean()

    table = jax.grad(loss)(params)["vision"]["reductions"]["output"]["table"][...]
    assert (jnp.abs(table[:5]).max(-1) > 0).all()
    assert not table[5:].any()


def test_lengths_are_drawn_for_each_example_in_training():
    plan = vision_plan("mqt", rule="pow2").with_twin("soft")
    model, call = build(plan), Call(key=jax.random.key(1), train=True)
    _, report = run(model, plan, call=call)
    counts = report.maps["vision/output"].n, report.tokens.valid.sum(-1)
    assert counts[0] == 17
    _, again = run(model, plan, call=Call(key=jax.random.key(1), train=True))
    np.testing.assert_array_equal(counts[1], again.tokens.valid.sum(-1))
    assert report.aux["vision/output"]["length"].shape == (4,)
    assert expected_macs(CONFIG, plan, report, tokens=7) == macs(CONFIG, plan, tokens=7)
    drawn = np.asarray(counts[1]) - np.asarray(VALID.sum(-1)) + 2
    assert (drawn >= 2).all() and (drawn <= 32).all()


def test_reductions_act_in_all_three_parts_at_once():
    seen = vision_plan("tome", r=[2, 2, 2])
    inner = make_plan("mod", CONFIG.decoder_layout(7, seen), keep=0.5)
    plan = seen + inner
    model = build(plan)
    logits, report = run(model, plan)
    assert logits.shape == (2, 7, 13)
    assert CONFIG.image_tokens(plan) == 10
    assert {name.partition("/")[0] for name in report.maps} == {"vision", "decoder"}
    assert jnp.isfinite(logits).all()


def test_decoding_with_a_cache_is_the_full_forward_pass():
    plan = vision_plan("mqt", length=4)
    model = build(plan)
    made = generate(Prompted(model, pictures(), plan), IDS, steps=3, valid=VALID)
    for row, (ids, n) in enumerate(zip(np.asarray(IDS), (7, 5), strict=True)):
        whole = np.concatenate([ids[:n], np.asarray(made.ids)[row]])[None]
        logits, _ = model(jnp.asarray(whole), pictures()[row : row + 1], plan=plan)
        got, want = made.logits[row], logits[0, n - 1 : n + 2]
        np.testing.assert_allclose(got[:, :IMAGE], want[:, :IMAGE], atol=5e-5)
        assert (got[:, IMAGE] == -jnp.inf).all()


def test_connectors_that_read_the_text_read_no_answers():
    plan = vision_plan("quecc", window=4, levels=(1, 2), heads=2, text_width=24)
    model = build(plan)
    question = jnp.zeros(IDS.shape, bool).at[:, 2:4].set(True)
    first, _ = run(model, plan, question=question)
    second, _ = run(model, plan, ids=IDS.at[:, -1].set(3), question=question)
    np.testing.assert_allclose(first[0, :6], second[0, :6], atol=1e-6)
    other, _ = run(model, plan, ids=IDS.at[:, 2].set(3), question=question)
    assert jnp.abs(other[0, 1] - first[0, 1]).max() > 1e-6
    with pytest.raises(ValueError, match="pass question="):
        run(model, plan)


def test_the_same_connector_without_the_text_needs_no_question():
    plan = vision_plan("quecc", window=4, levels=(1, 2), heads=2, conditioned=False)
    logits, _ = run(build(plan), plan)
    assert jnp.isfinite(logits).all()


def test_absent_images_leave_no_trace():
    model = build()
    ids, given = IDS.at[1, 0].set(6), jnp.asarray([[True, True], [True, False]])
    first, _ = run(model, ids=ids, image_valid=given)
    graph, state = nnx.split(model)
    images = pictures().at[1, 1].add(1.0)
    second, _ = nnx.merge(graph, state)(ids, images, valid=VALID, image_valid=given)
    np.testing.assert_allclose(first[1], second[1], atol=2e-5)


def test_patches_that_only_fill_up_leave_no_trace():
    """As of images of several sizes in one batch."""
    plan = vision_plan("perceiver", count=3, depth=1)
    model, real = build(plan), jnp.arange(16) < 12
    real = jnp.broadcast_to(real, (2, 2, 16))
    first, _ = run(model, plan, patch_valid=real)
    graph, state = nnx.split(model)
    images = pictures().at[:, :, 12:].add(5.0)
    second, _ = nnx.merge(graph, state)(IDS, images, plan=plan, valid=VALID, patch_valid=real)
    np.testing.assert_allclose(first[VALID], second[VALID], atol=2e-5)


def test_sizes_have_names():
    assert vlm_config("vlm_1m", images=2).images == 2
    assert vlm_config("llava15_7b").image_tokens() == 576
    with pytest.raises(ValueError, match="did you mean 'vlm_30m'"):
        vlm_config("vlm_3m")
    with pytest.raises(ValueError, match="has no field 'image'"):
        vlm_config("vlm_1m", image=2)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no image token"):
        build()(IDS.at[1].set(1), pictures())
    with pytest.raises(ValueError, match="length=17 must lie in"):
        vision_plan("mqt", length=17)
    with pytest.raises(ValueError, match="length=0 must lie in"):
        vision_plan("mqt", length=0)
    with pytest.raises(ValueError, match="the nearest that does is 2"):
        vision_plan("tokenpacker", window=3).of("vision").counts(CONFIG.layout)
    with pytest.raises(ValueError, match="image_id=13 lies outside"):
        dataclasses.replace(CONFIG, image_id=13)


def test_tokens_that_are_left_may_stand_where_they_were():
    """Whole images as they are counted; behind a cell of each 2 x 2 patches, text goes on behind
    the whole image, in one pass and step by step."""
    placed = build(config=dataclasses.replace(CONFIG, image_positions="place"))
    np.testing.assert_allclose(run(placed)[0], run(build())[0], atol=2e-5)
    plan = vision_plan("uniform", keep=0.25, site="output")
    ids, images = IDS[:1, :5], pictures()[:1]
    spliced, _ = placed.read(ids, images, plan=plan)
    assert spliced.tokens.n == 3 + 2 * 4 and spliced.tokens.position.max() == 3 + 2 * 16 - 1 - 5
    out = generate(Prompted(placed, images, plan), ids, steps=2)
    longer = jnp.concatenate([ids, out.ids[:, :1]], 1)
    want, _ = placed(longer, images, plan=plan)
    np.testing.assert_allclose(out.logits[0, 1, :12], want[0, -1, :12], atol=2e-4)


@pytest.mark.parametrize("behind", [(), ("restore", "mqt")])
def test_what_a_policy_hides_in_the_encoder_stays_hidden(behind):
    """Its twins agree in all that follows, and both reach the predictors."""
    plan = vision_plan("dynamicvit", keep=0.6, layers=(1,), eps=0.0)
    for name in behind:
        plan += vision_plan(name)
    soft = plan.with_twin("soft")
    model = build(plan, dataclasses.replace(CONFIG, image_positions="place"))
    packed, _ = run(model, plan)
    masked, report = run(model, soft)
    np.testing.assert_allclose(packed[VALID], masked[VALID], atol=2e-5)
    assert (report.aux["vision/before_1"]["decision"] == 0).any()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        logits, _ = nnx.merge(graph, params, rest)(
            IDS, pictures(), plan=soft, valid=VALID, call=Call(key=jax.random.key(0), train=True)
        )
        return jnp.square(logits[VALID]).mean()

    slopes = jax.grad(loss)(params)["vision"]["reductions"]["before_1"]
    assert all(jnp.abs(slope).max() > 0 for slope in jax.tree.leaves(slopes))


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_what_a_policy_hides_takes_no_position(step):
    plan = vision_plan("dynamicvit", keep=0.6, layers=(1,))
    model = build(plan, dataclasses.replace(CONFIG, image_step=step))
    packed, _ = model.read(IDS, pictures(), plan=plan, valid=VALID)
    masked, _ = model.read(IDS, pictures(), plan=plan.with_twin("soft"), valid=VALID)
    np.testing.assert_array_equal(packed.after, masked.after)
    of_text = lambda s: s.tokens.position[~s.tokens.extra["vision"] & s.tokens.valid]  # noqa: E731
    np.testing.assert_array_equal(of_text(packed), of_text(masked))
    logits, _ = run(model, plan.with_twin("soft"))
    assert jnp.isfinite(logits[VALID]).all()


def test_positions_of_images_are_named():
    with pytest.raises(ValueError, match="must be 'count' or 'place'"):
        dataclasses.replace(CONFIG, image_positions="both")
    with pytest.raises(ValueError, match="leave one of them as it is"):
        dataclasses.replace(CONFIG, image_positions="place", image_step=0.5)
