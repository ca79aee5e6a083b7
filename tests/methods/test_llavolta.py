"""LLaVolta: runs of tokens against a loop over them, within a VLM, in decoding, bad options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods.llavolta import VisualPool, llavolta, stages
from tokred.models import VLM, DecoderConfig, Prompted, ViTConfig, VLMConfig
from tokred.models.generate import generate
from tokred.plan import Layout, Plan, Site
from tokred.tokens import Tokens, make_tokens

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
N, D = 17, 3
LAYOUT = Layout.of_sequence(4, N, 16, 2)
# Rows of the numbers of images; - text, . padding. The second image of the first is a token short.
ROWS = ("--00000.11111---.", "..-0000011111----", "00000-11111--....", "---00000---------")
FRAME = jnp.asarray([[int(c) if c.isdigit() else -1 for c in row] for row in ROWS])
VALID = jnp.asarray([[c != "." for c in row] for row in ROWS])
SHORT = VALID.at[0, 8].set(False)


def sequence(valid=SHORT) -> Tokens:
    frame = jnp.where(valid, FRAME, -1)
    x = jax.random.normal(jax.random.key(0), (*valid.shape, D))
    extra = {"vision": frame >= 0, "frame": frame, "score": x[..., 0], "place": 10 + frame}
    place = jnp.cumsum(valid, -1)[..., None] - 1.0
    return make_tokens(x, valid=valid, position=place, extra=extra)


def pool_by_hand(tokens: Tokens, row: int, stride: int) -> list[tuple[np.ndarray, float, bool]]:
    """(features, place, whether of an image) of what a row becomes."""
    x, place = np.asarray(tokens.x[row]), np.asarray(tokens.position[row, :, 0])
    runs: list[tuple[int, list[int]]] = []  # image, slots
    for n in np.flatnonzero(tokens.valid[row]):
        image = int(tokens.extra["frame"][row, n])
        if image < 0 or not runs or runs[-1][0] != image or len(runs[-1][1]) == stride:
            runs.append((image, []))
        runs[-1][1].append(int(n))
    whole = [(image, slots) for image, slots in runs if image < 0 or len(slots) == stride]
    return [(x[slots].mean(0), place[slots].mean(), image >= 0) for image, slots in whole]


@pytest.mark.parametrize("stride", [2, 3, 5])
@pytest.mark.parametrize("twin", ["packed", "soft", "causal"])
def test_every_image_by_itself(stride, twin):
    tokens = sequence()
    out, map_, _, aux = VisualPool(stride, (2, 5))(tokens, {}, twin=twin)
    assert out.n == map_.k == (N - 2 * (5 - 5 // stride) if twin == "packed" else N)
    for row in range(len(ROWS)):
        alive = np.flatnonzero(out.valid[row])
        wanted = pool_by_hand(tokens, row, stride)[: out.n]
        assert len(alive) == len(wanted)
        for slot, (x, place, vision) in zip(alive, wanted, strict=True):
            close(out.x[row, slot], x)
            close(out.position[row, slot, 0], place)
            assert out.extra["vision"][row, slot] == vision
        assert (out.position[row, :, 0] >= 0).sum() == len(alive)
    if twin == "packed":
        lost = [max(len(pool_by_hand(tokens, r, stride)) - out.n, 0) for r in range(len(ROWS))]
        np.testing.assert_array_equal(aux["overflow"], lost)
        assert lost[:3] == [0, 0, 0]


def test_text_and_order_stay_bit_for_bit():
    tokens = sequence(VALID)
    out, map_, _, _ = VisualPool(2, (2, 5))(tokens, {})
    text = (VALID & (FRAME < 0)).at[3].set(False)  # more of it than slots
    np.testing.assert_array_equal(map_.restore(out.x)[text], tokens.x[text])
    np.testing.assert_array_equal(map_.restore(out.position)[text], tokens.position[text])
    for place, valid in zip(out.position[..., 0], out.valid, strict=True):
        assert (np.diff(place[valid]) > 0).all()


def test_extras_keep_their_kinds():
    tokens = sequence(VALID)
    out, map_, _, _ = VisualPool(2, (2, 5))(tokens, {})
    for name in ("vision", "frame", "place"):
        assert out.extra[name].dtype == tokens.extra[name].dtype
    back = map_.restore(out.extra["frame"], -1)
    there = (map_.source >= 0) & VALID
    np.testing.assert_array_equal(back[there], FRAME[there])
    close(out.extra["score"], out.x[..., 0])


def test_what_is_over_is_dropped():
    tokens = sequence(VALID)
    _, map_, _, _ = VisualPool(2, (2, 5))(tokens, {}, twin="soft")
    last = (FRAME >= 0) & (jnp.roll(FRAME, -1, 1) != FRAME)
    np.testing.assert_array_equal(map_.source < 0, last | ~VALID)


def test_the_gradient_is_that_of_a_mean():
    tokens = sequence(VALID)
    pooled = lambda x: VisualPool(5, (2, 5))(tokens.replace(x=x), {})[0].x.sum()  # noqa: E731
    wanted = jnp.where(FRAME >= 0, 0.2, 1.0) * VALID
    wanted = wanted.at[3].set(jnp.where(jnp.cumsum(VALID[3]) > 13, 0.0, wanted[3]))  # overflow
    close(jax.grad(pooled)(tokens.x), np.broadcast_to(wanted[..., None], tokens.x.shape))


@pytest.mark.parametrize("start", [0, 3001])
def test_positions(start):
    """Half precision knows no odd numbers beyond 2048."""
    place = start + jnp.arange(8.0)[None, :, None]
    extra = {"vision": jnp.arange(8)[None] < 6, "frame": jnp.zeros((1, 8), int)}
    tokens = make_tokens(jnp.zeros((1, 8, D)), position=place, extra=extra)
    places = {
        rule: VisualPool(2, (1, 6), rule)(tokens, {})[0].position[0, :, 0] - start
        for rule in ("mean", "official")
    }
    np.testing.assert_array_equal(places["mean"], [0.5, 2.5, 4.5, 6, 7])
    half = np.arange(start, start + 6).astype(np.float16).astype(np.float32).reshape(3, 2).mean(1)
    half = np.trunc(half.astype(np.float16).astype(np.float32)) - start
    np.testing.assert_array_equal(places["official"], [*half, 6, 7])
    assert (half == [0, 2, 4]).all() == (start == 0)


def test_stages():
    assert stages("4stage") == ((2, 8), (2, 2), (16, 2), (0, 1))
    assert stages("4stage", 8) == ((0, 8), (0, 2), (4, 2), (0, 1))
    assert stages("heavy") == ((2, 8),) and stages("light", 16) == ((8, 8),)
    plans = [llavolta(LAYOUT, layer=i, stride=s, images=(1, 8)) for i, s in stages("4stage", 4)]
    left = [plan.counts(LAYOUT)[-1].out for plan in plans]
    assert left == [N - 7, N - 4, N - 4, N]
    tokens = sequence()
    assert plans[-1].steps[0][1](tokens, {})[0] is tokens


def test_keep_is_a_share_of_the_image():
    for keep, stride in ((1.0, 1), (0.3, 4), (0.25, 4)):
        plan = llavolta(LAYOUT, keep=keep, images=(1, 9))
        assert plan.steps == ((Site("before", 2), VisualPool(stride, (1, 9))),)
    layout = CONFIG.decoder_layout(6)
    assert llavolta(layout, keep=0.125, layer=1).steps[0][1] == VisualPool(8, (2, 16))


# Within a vision-language model.
IMAGE, STEPS = 12, 3
VISION = ViTConfig(
    image_size=(16, 16), patch=(4, 4), channels=1, width=8, depth=1, heads=2, classes=0
)
DECODER = DecoderConfig(vocab=13, width=16, depth=3, heads=2, hidden=24, context=64)
CONFIG = VLMConfig(vision=VISION, decoder=DECODER, images=2, image_id=IMAGE)
IDS = jnp.asarray([[IMAGE, 1, 2, IMAGE, 3, 4], [0, 0, IMAGE, IMAGE, 5, 6], [7, IMAGE, 8, 9, 0, 0]])
REAL = jnp.asarray([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 4 + [0] * 2], bool)
THERE = jnp.asarray([[True, True], [True, True], [True, False]])
PICTURES = jax.random.normal(jax.random.key(3), (3, 2, 16, 16, 1))
STRIDE = 4


@functools.cache
def model():
    return VLM(CONFIG, rngs=nnx.Rngs(0))


def plan_of(n: int, **options) -> Plan:
    layout = CONFIG.decoder_layout(n)
    return llavolta(layout, layer=1, **{"stride": STRIDE, **options}).within("decoder")


def run(plan, ids=IDS, valid=REAL, rows=slice(None)):
    graph, state = nnx.split(model())

    @jax.jit
    def forward(state, ids, valid):
        how = {"valid": valid, "image_valid": THERE[rows]}
        return nnx.merge(graph, state)(ids, PICTURES[rows], plan=plan, **how)

    return forward(state, ids, valid)


@pytest.mark.parametrize("positions", ["mean", "official"])
def test_twins_agree_in_a_model(positions):
    plan = plan_of(6, positions=positions)
    packed, report = run(plan)
    soft, masked = run(plan.with_twin("soft"))
    close(packed[REAL], soft[REAL])
    assert report.tokens.n == 6 + 2 * (16 // STRIDE - 1) and masked.tokens.n == 6 + 2 * 15
    np.testing.assert_array_equal(report.aux["decoder/before_1"]["overflow"], [0, 0, 0])
    np.testing.assert_array_equal(report.tokens.valid.sum(-1), [12, 10, 7])
    dense, _ = run(Plan())
    assert (jnp.abs(packed - dense).max(-1) > 1e-4)[:, 4:6][REAL[:, 4:6]].all()


def test_a_row_does_not_know_the_others():
    plan = plan_of(6)
    together, _ = run(plan)
    for row in range(3):
        alone, _ = run(plan, IDS[row : row + 1], REAL[row : row + 1], slice(row, row + 1))
        close(alone[0][REAL[row]], together[row][REAL[row]])


@pytest.mark.parametrize("prefill", ["causal", "packed"])
def test_prefill_and_decoding_are_the_full_forward_pass(prefill):
    prompted = Prompted(model(), PICTURES, plan_of(6), THERE)

    @jax.jit
    def sample(ids, valid):
        return generate(prompted, ids, steps=STEPS, valid=valid, prefill=prefill)

    made = sample(IDS, REAL)
    for row, ids in enumerate(np.asarray(IDS)):
        prompt = ids[np.asarray(REAL[row])]
        whole = jnp.asarray(np.concatenate([prompt, made.ids[row]]))[None]
        n = whole.shape[1]
        valid, rows = jnp.ones((1, n), bool), slice(row, row + 1)
        logits, _ = run(plan_of(n), whole, valid, rows)
        seen = slice(len(prompt) - 1, len(prompt) - 1 + STEPS)
        close(made.logits[row, :, :IMAGE], logits[0, seen, :IMAGE], atol=1e-4)
    held = np.asarray(made.cache.occupancy()) - STEPS
    np.testing.assert_array_equal(held, [[36, 12, 12], [34, 10, 10], [19, 7, 7]])
    assert not np.any([layer.dropped for layer in made.cache.layers])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"images=\(0, 0\) leave nothing to pool; take the layout from VLMConfig.decoder_lay"),
        ({"images": (2, 5), "stride": 6}, r"stride=6 must lie in \[1, 5\]"),
        ({"images": (2, 5), "stride": 0}, r"stride=0 must lie in \[1, 5\]"),
        ({"images": (2, 8), "positions": "half"}, "positions='half' must be one of"),
        ({"images": (2, 20)}, r"images=\(2, 20\) have no room in a sequence of 17"),
        ({"images": (1, 8), "layer": 4}, "lies outside a model of 4 layers"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match) as error:
        llavolta(LAYOUT, **options).counts(LAYOUT)
    assert "\n" not in str(error.value)


def test_bad_calls():
    with pytest.raises(ValueError, match="needs the per-token array 'vision'"):
        VisualPool(2, (1, 4))(sequence().replace(extra={}), {})
    with pytest.raises(ValueError, match="stages '4stages' are unknown; did you mean '4stage'"):
        stages("4stages")
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        stages("heavy", 0)
