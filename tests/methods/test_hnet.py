"""H-Net: against loops over tokens and chunks, what it may know, and where gradients flow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.methods import around
from tests.methods.around import CONFIG, IDS, VALID, B, N, Setting, close, forward
from tokred.methods import make_plan
from tokred.methods.hnet import CLIP, HNet
from tokred.models import ViTConfig
from tokred.nn.routers import BoundaryRouter
from tokred.plan import Site
from tokred.report import Call
from tokred.tokens import make_tokens

ONE = Setting("hnet", {"keep": 0.8, "positions": "renumber"}, spread=0.3)
TIGHT = Setting("hnet", {"keep": 0.3}, spread=0.3)
TWO = Setting("hnet", {"keep": 0.7, "spans": [(0, 3), (1, 2)]}, spread=0.3)
SETTINGS = pytest.mark.parametrize("setting", [ONE, TIGHT, TWO], ids=["one", "tight", "two"])
DOCUMENT = jnp.broadcast_to((jnp.arange(N) >= 9).astype(jnp.int32), (B, N))


@pytest.mark.parametrize("setting", [ONE, TIGHT], ids=["one", "tight"])
def test_twins_agree(setting):
    around.check_twins_agree(setting)


def test_nested_twins_agree():
    """The inner stage has the slots of its share of the outer's chunks."""
    (packed, report), (soft, masked) = TWO.run(), TWO.run("soft")
    close(packed[VALID], soft[VALID])
    assert [count.mlp for count in report.counts] == [14, 10, 10, 14]
    assert {count.mlp for count in masked.counts} == {N}
    for site in around.sites(TWO.plan):
        close(report.aux[site]["loss_ratio"], masked.aux[site]["loss_ratio"])
        np.testing.assert_array_equal(report.aux[site]["overflow"], masked.aux[site]["overflow"])


@SETTINGS
def test_padding_changes_nothing(setting):
    around.check_padding(setting)


@SETTINGS
def test_gradients_reach_the_routers(setting):
    around.check_gradients(setting)


def run_layers(model, layers, x, place):
    for layer in layers:
        block = model.blocks[layer]
        tokens = make_tokens(x, position=jnp.asarray(place, jnp.float32)[None, :, None])
        x = x + block.attend(*block.project(tokens), tokens, tokens)
        x = x + block.feed(x)
    return x


def by_hand(setting, ids) -> np.ndarray:
    """One sequence, token by token."""
    model, places = setting.model, np.arange(len(ids))
    router, reduction = model.reductions["around_1_2"], setting.plan.steps[0][1]
    x = run_layers(model, [0], model.embed(ids)[None], places)
    q, k = np.asarray(router.query(x)[0]), np.asarray(router.key(x)[0])
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    chance = [1.0] + [(1 - cosine(q[t - 1], k[t])) / 2 for t in range(1, len(ids))]
    starts = [t for t in places if chance[t] > 0.5][: reduction.counts(len(ids), 0)]
    where = np.arange(len(starts)) if reduction.positions == "renumber" else starts
    y = run_layers(model, [1, 2], x[:, jnp.asarray(starts)], where)[0]
    smooth, average = [], np.zeros(x.shape[-1])
    for j, t in enumerate(starts):
        p = np.clip(chance[t], CLIP, 1 - CLIP)
        average = p * np.asarray(y[j]) + (1 - p) * average
        smooth.append(average)
    back = np.stack([smooth[np.searchsorted(starts, t, "right") - 1] for t in places])
    x = jnp.asarray(back, jnp.float32)[None] + router.residual(x)
    return np.asarray(model.embed.attend(model.norm(run_layers(model, [3], x, places))))[0]


@pytest.mark.parametrize("setting", [ONE, TIGHT], ids=["renumbered", "kept places, too few slots"])
def test_forward_by_hand(setting):
    logits, report = setting.run()
    for b in range(B):
        length = int(VALID[b].sum())
        close(logits[b, :length], by_hand(setting, IDS[b, :length]), rtol=1e-3, atol=1e-4)
    overflow = np.asarray(report.aux["around_1_2"]["overflow"])
    assert overflow.any() == (setting is TIGHT)
    entered = np.asarray(report.entered["around_1_2"]).sum(-1)
    counts = [setting.plan.steps[0][1].counts(int(n), 0) for n in VALID.sum(-1)]
    assert (entered <= counts).all() and (
        entered[overflow > 0] == np.array(counts)[overflow > 0]
    ).all()


@pytest.mark.parametrize("twin", ["packed", "soft"])
@SETTINGS
def test_no_token_knows_a_later_one(setting, twin):
    plan = setting.plan.with_twin(twin)
    logits, _ = forward(setting.model, IDS, plan=plan)
    for t in (2, 8, 15):
        later = jnp.arange(N)[None] > t
        changed, _ = forward(setting.model, jnp.where(later, (IDS + 3) % 31, IDS), plan=plan)
        np.testing.assert_array_equal(changed[:, : t + 1], logits[:, : t + 1])
        assert (changed[:, t + 1 :] != logits[:, t + 1 :]).any()


@functools.partial(jax.jit, static_argnames="plan")
def with_documents(model, ids, *, plan):
    place = jnp.concatenate([jnp.arange(9), jnp.arange(N - 9)])
    place = jnp.broadcast_to(place, ids.shape)
    return model(ids, plan=plan, position=place, document=DOCUMENT)


@pytest.mark.parametrize("setting", [ONE, TIGHT], ids=["one", "tight"])
def test_documents_do_not_see_each_other(setting):
    """Nor, where the second one finds no slot, its chunks."""
    logits, report = with_documents(setting.model, IDS, plan=setting.plan)
    assert report.aux["around_1_2"]["chance"][:, 9].min() == 1
    other = jnp.where(DOCUMENT == 0, (IDS + 3) % 31, IDS)
    changed, again = with_documents(setting.model, other, plan=setting.plan)
    starts = [r.entered["around_1_2"][:, 9:] for r in (report, again)]
    alike = np.asarray((starts[0] == starts[1]).all(-1))  # where as many slots were left
    close(changed[alike, 9:], logits[alike, 9:])
    if setting is ONE:
        assert alike.all()
        alone, _ = forward(setting.model, IDS[:, 9:], plan=setting.plan)
        close(alone, logits[:, 9:])


def test_a_document_without_a_slot_has_what_passes_by():
    reduction, x = HNet(0.3), jax.random.normal(jax.random.key(0), (1, 6, 4))
    router = BoundaryRouter(4, rngs=nnx.Rngs(0))
    router.residual.kernel[...] = jnp.eye(4)
    x = x.at[:, 1::2].set(-x[:, :-1:2])  # unlike the token before it
    document = jnp.array([[0, 0, 0, 1, 1, 1]])
    position = jnp.stack([jnp.arange(6)[None], document], -1).astype(jnp.float32)
    reduced, map_, _, aux = reduction(make_tokens(x, position=position), {}, module=router)
    assert map_.k == 2 and aux["overflow"][0] > 0
    back = aux["combine"].put_back(x, reduced.x, reduced.x, map_)
    close(back[:, 3:], x[:, 3:])
    assert (back[:, :3] != x[:, :3]).any(-1).all()


def test_at_first_the_span_alone_speaks():
    """The projection of the stream is 0, and equal tokens begin no chunk."""
    plan = make_plan("hnet", CONFIG.layout)
    router = plan.build(CONFIG.layout, nnx.Rngs(0))["around_1_2"]
    np.testing.assert_array_equal(router.query.kernel[...], jnp.eye(16))
    assert not router.pass_by(jnp.ones((1, 2, 16))).any()
    reduction, tokens = HNet(0.25), make_tokens(jnp.ones((1, 8, 16)))
    reduced, _, _, aux = reduction(tokens, {}, module=router)
    np.testing.assert_array_equal(aux["entered"], [[True] + [False] * 7])
    close(aux["share"], 1 / 8)
    close(aux["combine"].put_back(tokens.x, reduced.x, reduced.x, None), 1 - CLIP)
    assert reduced.n == 2  # a quarter


def test_the_loss_asks_for_a_length():
    reduction = HNet(1.0, chunk=3.0, loss_weight=0.5)
    router = BoundaryRouter(4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 4))
    _, _, _, aux = reduction(make_tokens(x), {}, module=router)
    starts, likely = aux["entered"].mean(), aux["chance"].mean()
    wanted = 0.5 * 1.5 * (2 * starts * likely + (1 - starts) * (1 - likely))
    close(aux["loss_ratio"], wanted)
    plan = make_plan("hnet", CONFIG.layout, spans=[(0, 3), (1, 2)])
    assert {reduction for _, reduction in plan.steps} == {HNet(0.25, chunk=3.0)}


def test_bfloat16_averages_in_float32():
    half = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
    model = type(ONE.model)(half, plan=ONE.plan, rngs=nnx.Rngs(0))
    logits, report = forward(model, IDS, VALID, plan=ONE.plan)
    combine = report.aux["around_1_2"]["combine"]
    assert combine.fill.dtype == combine.restore.weight.dtype == jnp.float32
    assert report.tokens.x.dtype == jnp.bfloat16 and jnp.isfinite(logits).all()


def test_a_cache_is_refused():
    cache = ONE.model.make_cache(B, N, plan=ONE.plan)
    for twin in ("packed", "causal"):
        with pytest.raises(
            ValueError, match=r"HNet at around_1_2 .*decode by full passes"
        ) as error:
            ONE.model.extend(IDS, cache, plan=ONE.plan.with_twin(twin), call=Call())
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"spans": [(0, 2), (1, 3)]}, "overlap"),
        ({"spans": [(2, 4)]}, "lies outside a model of 4 layers"),
        ({"chunk": 1.0}, r"chunk=1\.0 must be above 1 token"),
        ({"positions": "kept"}, "positions='kept' must be one of"),
        ({"keep": 1.5}, r"keep=1\.5 must lie in"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        make_plan("hnet", CONFIG.layout, **options)


def test_bad_models():
    for config in (ViTConfig(), ViTConfig(class_token=False, pool="mean")):
        with pytest.raises(ValueError, match="hnet: cuts a sequence"):
            make_plan("hnet", config.layout)
    with pytest.raises(ValueError, match="build it with plan="):
        HNet(0.5)(make_tokens(jnp.ones((1, 3, 2))), {})


def test_default_span():
    layout = dataclasses.replace(CONFIG.layout, depth=9)
    assert make_plan("hnet", layout).steps[0][0] == Site("around", 2, 6)
