"""Router-Tuning: the threshold, its loss, and the forms in which tokens skip a branch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.methods import around
from tests.methods.around import CONFIG, GENERATED, IDS, PROMPT, VALID, N, Setting, close, forward
from tokred.methods import make_plan
from tokred.methods.router_tuning import NORMED, SITES, RouterTuning
from tokred.nn.routers import TokenRouter
from tokred.tokens import make_tokens

ROOMY = {"room": 1.0, "layers": (1, 3)}
SETTINGS = {site: Setting("router_tuning", {"site": site, **ROOMY}) for site in SITES}
ATTENTION, MLP = SETTINGS["around_attention"], SETTINGS["around_mlp"]
TIGHT = Setting("router_tuning", {"keep": 0.3, "layers": (1, 3)})
SEQUENCE = Setting("router_tuning", {"per": "sequence"}, {"generated": GENERATED})


@functools.partial(jax.jit, static_argnames="site")
def by_hand(model, ids, entered, site):
    """All layers; in 1 and 3 only those that enter `site` see each other."""
    place = jnp.broadcast_to(1.0 * jnp.arange(N), ids.shape)[..., None]
    tokens = lambda x, valid: make_tokens(x, position=place).replace(valid=valid)  # noqa: E731
    x = model.embed(ids)
    for layer, block in enumerate(model.blocks):
        enters = entered.get(layer, jnp.ones(ids.shape, bool))
        keys = VALID if site == "around_mlp" else VALID & enters
        q, k, v = block.project(tokens(x, VALID))
        u = x + block.attend(q, k, v, tokens(x, VALID), tokens(x, keys))
        u = u if site == "around_mlp" else jnp.where(enters[..., None], u, x)
        y = u + block.feed(u)
        x = y if site == "around_attention" else jnp.where(enters[..., None], y, u)
    return model.embed.attend(model.norm(x))


@pytest.mark.parametrize("site", SITES)
def test_skipping_by_hand(site):
    setting = SETTINGS[site]
    got, report = setting.run("causal")
    entered = {i: report.aux[f"{site}_{i}"]["entered"] for i in (1, 3)}
    for i in (1, 3):
        share = entered[i].sum() / VALID.sum()
        assert 0 < share < 1
        close(report.aux[f"{site}_{i}"]["share"], share)
    close(got[VALID], by_hand(setting.model, IDS, entered, site)[VALID])


def test_packed_with_room_is_causal():
    packed, report = ATTENTION.run("packed")
    close(packed[VALID], ATTENTION.run("causal")[0][VALID])
    assert not report.aux["around_attention_1"]["overflow"].any()


def test_soft_is_packed_around_the_mlp_alone():
    packed, soft = (MLP.run(twin)[0] for twin in ("packed", "soft"))
    close(packed[VALID], soft[VALID])
    packed, soft = (ATTENTION.run(twin)[0] for twin in ("packed", "soft"))
    assert jnp.abs(packed - soft)[VALID].max() > 1e-3  # its keys are all visible


def test_without_room_the_best_enter_and_the_others_are_counted():
    _, report = TIGHT.run("packed")
    assert report.counts[1].queries == 6 and report.counts[1].mlp == N
    aux = report.aux["around_attention_1"]
    chosen = np.where(VALID, aux["score"], -np.inf) >= 0
    for row in range(len(IDS)):
        room = int(np.ceil(0.3 * VALID[row].sum()))
        score = np.where(chosen[row], aux["score"][row], -np.inf)
        best = np.sort(np.argsort(-score)[: min(room, chosen[row].sum())])
        np.testing.assert_array_equal(np.flatnonzero(aux["entered"][row]), best)
        assert aux["overflow"][row] == max(0, chosen[row].sum() - room)
    assert aux["overflow"].any()


def test_padding_changes_nothing():
    around.check_padding(TIGHT)


@pytest.mark.parametrize("site", ["around", "around_attention", "around_mlp"])
def test_decoding(site):
    around.check_decoding(SETTINGS[site])


def test_decoding_by_sequences():
    """The prompt by its own mean, then every token alone."""
    around.check_decoding(SEQUENCE, told=True)
    _, report = SEQUENCE.run("causal")
    entered = report.aux["around_attention_1"]["entered"]
    for row in range(len(IDS)):
        assert len(set(np.asarray(entered[row, : PROMPT[row]]))) == 1
    assert len(set(np.asarray(entered[0, PROMPT[0] :]))) == 2


def test_a_whole_sequence_enters_or_none():
    for twin in ("packed", "soft"):
        logits, report = SEQUENCE.run(twin)
        entered = report.aux["around_attention_3"]["entered"]
        assert all(len(set(np.asarray(e[v]))) == 1 for e, v in zip(entered, VALID, strict=True))
        assert jnp.isfinite(logits[VALID]).all()


@pytest.mark.parametrize("setting", [ATTENTION, MLP], ids=["attention", "mlp"])
def test_gradients_reach_the_routers(setting):
    graph, routers, rest = nnx.split(setting.model, nnx.PathContains("reductions"), ...)

    @jax.jit
    def grads(routers, ids):
        def loss(routers):
            model, plan = nnx.merge(graph, routers, rest), setting.plan.with_twin("soft")
            logits, report = model(ids, plan=plan, valid=VALID)
            fit = jnp.where(VALID, jax.nn.log_softmax(logits)[..., 0], 0).mean()
            return fit, report.losses

        return jax.grad(loss, has_aux=True)(routers)

    task, losses = grads(routers, IDS)
    for grad in jax.tree.leaves(task):
        assert jnp.isfinite(grad).all() and grad.any()
    assert set(losses) == {f"{site}/loss_capacity" for site in around.sites(setting.plan)}


def test_capacity_loss_by_hand():
    x = jnp.array([[[2.0], [1.0], [-1.0], [9.0]]])
    tokens = make_tokens(x, valid=jnp.array([[True, True, True, False]]))
    graph, state = nnx.split(TokenRouter(1, rngs=nnx.Rngs(0)))

    def loss(weight, target):
        router = nnx.merge(graph, jax.tree.map(lambda _: weight[None, None], state))
        method = RouterTuning(target, scale=3.0)
        return method(tokens, {NORMED.name: x}, module=router, twin="soft")[3]["loss_capacity"]

    close(loss(jnp.array(1.0), 0.5), 3 * (2 / 3 - 0.5))
    close(loss(jnp.array(1.0), 0.7), 0)
    slope = lambda r: float(jax.nn.sigmoid(r) * jax.nn.sigmoid(-r) * r)  # noqa: E731
    wanted = 3 * np.mean([slope(2.0), slope(1.0), slope(-1.0)])
    close(jax.grad(loss)(jnp.array(1.0), 0.5), wanted)


def test_the_threshold_itself_enters():
    router = TokenRouter(4, rngs=nnx.Rngs(0))
    call = functools.partial(RouterTuning(0.5, room=1.0), module=router)
    tokens = make_tokens(jnp.zeros((1, 3, 4)))
    _, _, _, aux = call(tokens, {NORMED.name: tokens.x})
    assert aux["entered"].all()


def test_a_share_of_one_is_dense():
    around.check_dense("router_tuning")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "mid"}, "site='mid' must be one of"),
        ({"per": "row"}, "per='row' must be one of"),
        ({"room": 1.5}, r"room=1.5 must lie in \(0, 1\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan("router_tuning", CONFIG.layout, **options)


def test_sequences_are_decoded_with_their_places():
    plan = SEQUENCE.plan.with_twin("causal")
    with pytest.raises(ValueError, match="needs the per-token array 'generated'"):
        forward(SEQUENCE.model, IDS, plan=plan)
