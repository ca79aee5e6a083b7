"""Duo-LLM: three ways to choose between two MLPs and none, and the oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.methods import around
from tests.methods.around import CONFIG, IDS, VALID, B, N, Setting, close, forward
from tokred.gates import GumbelChoice
from tokred.methods import make_plan
from tokred.methods.duo_llm import (
    BIG,
    BYPASS,
    NORMED,
    SMALL,
    DuoLLM,
    budget_patterns,
    joint_budget_loss,
    random_assignment,
    search_oracle,
)
from tokred.models import Decoder, DecoderConfig
from tokred.nn.routers import DuoMlp
from tokred.report import Call
from tokred.tokens import make_tokens

KEY = jax.random.key(3)
ROOMY = Setting("duo_llm", {"big": 1.0, "hidden": 8})
TIGHT = Setting("duo_llm", {"big": 0.2, "small": 0.25, "hidden": 8})
CHOICES = jax.random.randint(KEY, (B, N, CONFIG.depth), 0, 3)
ASSIGNED = Setting(
    "duo_llm", {"big": 1.0, "hidden": 8, "choice": "assigned"}, {"assignment": CHOICES}
)


@jax.jit
def by_hand(model, ids, choices):
    """All layers, with the choice of each token [B N L]."""
    place = jnp.broadcast_to(1.0 * jnp.arange(N), ids.shape)[..., None]
    x = model.embed(ids)
    for layer, block in enumerate(model.blocks):
        tokens = make_tokens(x, position=place).replace(valid=VALID)
        x = x + block.attend(*block.project(tokens), tokens, tokens)
        choice = choices[..., layer, None]
        small = model.reductions[f"around_mlp_{layer}"].small(block.norm2(x))
        x = x + jnp.where(choice == BIG, block.feed(x), jnp.where(choice == SMALL, small, 0.0))
    return model.embed.attend(model.norm(x))


def choices_of(report):
    sites = [f"around_mlp_{layer}" for layer in range(CONFIG.depth)]
    return jnp.stack([report.aux[site]["choice"] for site in sites], -1)


@pytest.mark.parametrize("twin", ["packed", "soft", "causal"])
@pytest.mark.parametrize("setting", [ROOMY, ASSIGNED], ids=["router", "assigned"])
def test_forms_by_hand(setting, twin):
    got, report = setting.run(twin)
    choices = choices_of(report)
    assert {BYPASS, SMALL, BIG} == set(np.asarray(choices[VALID]).ravel())
    if setting is ASSIGNED:
        np.testing.assert_array_equal(choices[VALID], CHOICES[VALID])
    close(got[VALID], by_hand(setting.model, IDS, choices)[VALID])
    share = (choices == BIG)[VALID].mean(0)
    close([report.aux[f"around_mlp_{i}"]["share"] for i in range(CONFIG.depth)], share)


def test_without_room_tokens_bypass_and_are_counted():
    got, report = TIGHT.run("packed")
    assert report.counts[0].mlp == 4
    choices = np.array(choices_of(report))
    for layer in range(CONFIG.depth):
        over = np.asarray(report.aux[f"around_mlp_{layer}"]["overflow"])
        entered = report.maps[f"around_mlp_{layer}"].source >= 0
        for row in range(B):
            n = int(VALID[row].sum())
            mine = choices[row, :n, layer]
            big, small = (np.flatnonzero(mine == choice) for choice in (BIG, SMALL))
            took = np.flatnonzero(entered[row])
            assert set(took) <= set(big) and len(took) == min(len(big), -(-n // 5))
            rest = np.concatenate([np.setdiff1d(big, took), small[-(-n // 4) :]])
            assert over[row] == len(rest)
            choices[row, rest, layer] = BYPASS
    assert (choices != np.array(choices_of(report))).any()
    close(got[VALID], by_hand(TIGHT.model, IDS, jnp.asarray(choices))[VALID])


def test_padding_changes_nothing():
    around.check_padding(TIGHT)


def test_decoding():
    around.check_decoding(ROOMY)


@functools.partial(jax.jit, static_argnames=("plan", "train"))
def draw(model, ids, key, plan, train=True):
    return model(ids, plan=plan, valid=VALID, call=Call(key=key, train=train))


def test_random_training_assigns_big_or_small():
    plan = make_plan("duo_llm", CONFIG.layout, hidden=8, choice="random").with_twin("soft")
    logits, report = draw(ROOMY.model, IDS, KEY, plan)
    choices = choices_of(report)
    assert {SMALL, BIG} == set(np.asarray(choices).ravel())
    close(logits[VALID], by_hand(ROOMY.model, IDS, choices)[VALID])
    assert not report.losses
    _, other = draw(ROOMY.model, IDS, jax.random.key(4), plan)
    assert (choices_of(other) != choices).any()
    with pytest.raises(ValueError, match="choice='random' draws the choices"):
        forward(ROOMY.model, IDS, plan=plan)


def test_random_assignment():
    drawn = random_assignment(KEY, (2000, 20), 6)
    assert drawn.shape == (2000, 20, 6) and {SMALL, BIG} == set(np.asarray(drawn).ravel())
    share = np.asarray((drawn == BIG).mean((1, 2)))
    close(np.quantile(share, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.05)  # of whole examples


def test_gradients_reach_routers_and_both_mlps():
    graph, state = nnx.split(ROOMY.model)
    plan = ROOMY.plan.with_twin("soft")

    @jax.jit
    def grads(state, ids):
        def loss(state):
            model = nnx.merge(graph, state)
            logits, report = model(ids, plan=plan, valid=VALID, call=Call(key=KEY, train=True))
            fit = jnp.where(VALID, jax.nn.log_softmax(logits)[..., 0], 0).mean()
            return fit + sum(report.losses.values()), report.losses

        return jax.grad(loss, has_aux=True)(state)

    found, losses = grads(state, IDS)
    assert len(losses) == CONFIG.depth
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(found))


def test_straight_through_by_hand():
    """The soft form's gradient is that of gate-weighed updates."""
    x, cotangent, big = jax.random.normal(KEY, (3, 1, 5, 6))
    graph, state = nnx.split(DuoMlp(6, 4, rngs=nnx.Rngs(0)))
    method, tokens = DuoLLM(0.5, budget=0.0), make_tokens(x)

    def ours(state):
        duo = nnx.merge(graph, state)
        _, map_, _, aux = method(
            tokens, {NORMED.name: x}, module=duo, key=KEY, train=True, twin="soft"
        )
        return (aux["combine"].put_back(x, x, x + big, map_) * cotangent).sum()

    def wanted(state):
        duo = nnx.merge(graph, state)
        gate = GumbelChoice(1.0).update(duo(x), key=KEY, train=True)[0]
        y = x + gate[..., BIG, None] * big + gate[..., SMALL, None] * duo.small(x)
        return (y * cotangent).sum()

    jax.tree.map(close, jax.jit(jax.grad(ours))(state), jax.jit(jax.grad(wanted))(state))


def test_budget_losses():
    _, report = ROOMY.run("soft")
    aux, plan = report.aux, ROOMY.plan
    share = np.array([aux[site]["share"] for site in around.sites(plan)])
    close(
        [aux[site]["loss_budget"] for site in around.sites(plan)],
        (share - 0.5) ** 2 / CONFIG.depth,
        atol=1e-6,
    )
    close(joint_budget_loss(aux, plan, weight=3.0), 3 * (share.mean() - 0.5) ** 2)
    with pytest.raises(ValueError, match="has no DuoLLM"):
        joint_budget_loss(aux, make_plan("dense", CONFIG.layout))


def test_patterns():
    rng = np.random.default_rng(0)
    for budget, count in ((0, 1), (1, 12), (2, 66), (6, 100), (12, 1)):
        patterns = budget_patterns(12, budget, rng)
        assert patterns.shape == (count, 12)
        assert ((patterns == BIG).sum(1) == budget).all() and (patterns >= SMALL).all()
    assert len(np.unique(budget_patterns(12, 2, rng), axis=0)) == 66
    with pytest.raises(ValueError, match=r"budget=13 must lie in \[0, 12\]"):
        budget_patterns(12, 13, rng)


def test_oracle():
    """Against every pattern of every token, one at a time."""
    config = DecoderConfig(vocab=11, width=8, depth=2, heads=1, hidden=16, context=8)
    plan = make_plan("duo_llm", config.layout, choice="assigned", hidden=4).with_twin("soft")
    model = Decoder(config, plan=plan, rngs=nnx.Rngs(0))
    ids = jax.random.randint(KEY, (2, 5), 0, 11)
    base = random_assignment(KEY, (2, 4), 2)
    patterns = budget_patterns(2, 1, np.random.default_rng(0))

    def token_loss(model, assignment):
        logits, _ = model(ids[:, :-1], plan=plan, extra={"assignment": assignment})
        chance = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(chance, ids[:, 1:, None], -1)[..., 0]

    search = jax.jit(lambda m: search_oracle(functools.partial(token_loss, m), base, patterns))
    once = jax.jit(token_loss)
    found = search(model)
    assert found.pattern.shape == (2, 4, 2)
    for row, i in itertools.product(range(2), range(4)):
        losses = [
            once(model, base.at[row, i].set(jnp.asarray(pattern)))[row, i] for pattern in patterns
        ]
        close(found.loss[row, i], min(losses))
        np.testing.assert_array_equal(found.pattern[row, i], patterns[int(np.argmin(losses))])


def test_a_share_of_one_is_dense():
    around.check_dense("duo_llm")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choice": "oracle"}, "choice='oracle' must be one of"),
        ({"big": 0.0}, r"big=0.0 must lie in \(0, 1\]"),
        ({"small": 2.0}, r"small=2.0 must lie in \(0, 1\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan("duo_llm", CONFIG.layout, **options)


def test_assignments_are_needed():
    with pytest.raises(ValueError, match="needs the per-token array 'assignment'"):
        forward(ASSIGNED.model, IDS, plan=ASSIGNED.plan)


def test_small_is_a_quarter_of_the_default():
    for width in (128, 512, 768):
        default = DecoderConfig(width=width).hidden
        assert default is not None and DuoLLM(0.5).width(width) * 4 == default
