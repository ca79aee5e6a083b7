"""MrT5: its twins, edges, controls, controller, buckets, and what it says of bad input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.gates import RateController
from tokred.methods import make_plan
from tokred.methods.mrt5 import MrT5
from tokred.models import EncoderDecoder, EncoderDecoderConfig
from tokred.models.buckets import encode_in_buckets
from tokred.plan import Plan, Site
from tokred.report import Call

CONFIG = EncoderDecoderConfig(
    vocab=40, width=32, depth=4, decoder_depth=2, heads=2, head_dim=8, hidden=48, context=24,
    target_context=8, sink=True,
)  # fmt: skip
B, N, M = 4, 24, 6
IDS = jax.random.randint(jax.random.key(0), (B, N), 3, CONFIG.vocab)
TARGET = jax.random.randint(jax.random.key(1), (B, M), 3, CONFIG.vocab).at[:, 0].set(0)
VALID = jnp.arange(N)[None] < jnp.array([N, 15, 1, 9])[:, None]


def plan_of(**options) -> Plan:
    return make_plan("mrt5", CONFIG.layout, **options)


def build(plan: Plan, bias: float = 0.0) -> EncoderDecoder:
    """A model whose gates are spread out; bias: of their logits."""
    model = EncoderDecoder(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    for gate in model.reductions.values():
        gate.score.kernel[...] = 4 * gate.score.kernel[...]
        gate.score.bias[...] = jnp.full((1,), bias)
    return model


def forward(model, plan, valid: Any = VALID, call=None, ids=IDS, target=TARGET):
    run = jax.jit(lambda m, v: m(ids, target, plan=plan, valid=v, call=call))
    return run(model, valid)


def close(got, want, atol=2e-5):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("bias", [0.0, 50.0, -50.0])
def test_corrected_twins_agree(bias: float, positions: str):
    """Some, none and all but one of the tokens deleted, in rows of 24, 15, 1 and 9."""
    plan = plan_of(corrected=True, capacity=1.0, positions=positions)
    model = build(plan, bias)
    packed, report = forward(model, plan)
    soft, _ = forward(model, plan.with_twin("soft"))
    close(packed, soft)
    kept = report.aux["before_2"]["entered"].sum(-1)
    assert (kept >= 1).all()
    if bias:
        assert (kept == (VALID.sum(-1) if bias > 0 else 1)).all()
    else:
        assert 2 < kept[0] < N - 2


def test_the_official_twins_differ_by_the_gate_of_what_is_kept():
    plan = plan_of(capacity=1.0)
    model = build(plan)
    packed, soft = (forward(model, plan.with_twin(twin))[0] for twin in ("packed", "soft"))
    corrected = forward(model, plan_of(capacity=1.0, corrected=True))[0]
    assert np.abs(packed - soft).max() > 1e-3
    close(corrected, soft, atol=2e-3)  # all that is left: what soft deletion lets through


def test_renumbering_changes_what_follows():
    model = build(plan_of(capacity=1.0))
    one, other = (
        forward(model, plan_of(capacity=1.0, positions=p))[0] for p in ("keep", "renumber")
    )
    assert np.abs(one - other).max() > 1e-3


def test_slots_overflow_by_logit_and_are_counted():
    plan = plan_of(capacity=0.25)
    model = build(plan, 50.0)
    _, report = forward(model, plan)
    aux, map_ = report.aux["before_2"], report.maps["before_2"]
    assert aux["overflow"].tolist() == [N - 6, 15 - 6, 0, 9 - 6]
    assert map_.valid.sum(-1).tolist() == [6, 6, 1, 6]
    best = jnp.argsort(-jnp.where(VALID, aux["score"], -jnp.inf), axis=-1)[0, :6]
    assert sorted(best.tolist()) == map_.index[0].tolist()
    assert aux["padding"] == pytest.approx(5 / 24)


def test_padding_does_not_vote():
    plan = plan_of(coefficient=0.1)
    model = build(plan)
    call = Call(train=True)
    _, report = forward(model, plan.with_twin("soft"), call=call)
    alone = [
        forward(model, plan.with_twin("soft"), None, call, IDS[b : b + 1, :n], TARGET[b : b + 1])[1]
        for b, n in enumerate(VALID.sum(-1).tolist())
    ]
    weights = np.array(VALID.sum(-1)) / VALID.sum()
    losses = [r.losses["before_2/loss_delete"] for r in alone]
    close(report.losses["before_2/loss_delete"], (weights * np.array(losses)).sum())
    shares = [r.aux["before_2"]["share"] for r in alone]
    close(report.aux["before_2"]["share"], (weights * np.array(shares)).sum())


@pytest.mark.parametrize("gate", ["random", "stride"])
@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_controls_delete_as_much_as_asked(gate: str, keep: float):
    plan = plan_of(keep=keep, gate=gate, capacity=keep)
    model = build(plan)
    assert not model.reductions
    call = Call(key=jax.random.key(3))
    packed, report = forward(model, plan, call=call)
    kept = report.aux["before_2"]["entered"]
    assert kept.sum(-1).tolist() == [max(1, int(keep * n + 1e-6)) for n in VALID.sum(-1).tolist()]
    assert not report.aux["before_2"]["overflow"].any()
    assert not (kept & ~VALID).any()
    soft, _ = forward(model, plan.with_twin("soft"), call=call)
    close(packed, soft, atol=1e-3)
    if gate == "stride":
        gaps = np.diff(np.flatnonzero(kept[0]))
        assert gaps.max() - gaps.min() <= 1


def test_gradients_reach_the_gate_and_noise_needs_a_key():
    plan = plan_of(noise=True).with_twin("soft")
    model = build(plan)
    states = plan.init()
    call = Call(states=states, train=True, key=jax.random.key(0))
    loss = lambda m: m(IDS, TARGET, plan=plan, valid=VALID, call=call)[0].mean()  # noqa: E731
    grads = nnx.state(jax.jit(nnx.grad(loss))(model)["reductions"])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="key"):
        model(IDS, TARGET, plan=plan, call=Call(states=states, train=True))


def test_the_controller_moves_in_training_alone():
    plan = plan_of(keep=0.2).with_twin("soft")
    model, states = build(plan), plan.init()
    _, report = forward(model, plan, call=Call(states=states, train=True))
    moved = report.states["before_2"]
    deleted = 1 - report.aux["before_2"]["share"]
    want = RateController(0.8).update(deleted, states["before_2"])
    jax.tree.map(close, moved, want)
    assert report.losses["before_2/loss_delete"] == 0  # the coefficient of the step before
    _, rests = forward(model, plan, call=Call(states=states))
    assert rests.states["before_2"] == states["before_2"] and not rests.losses
    with pytest.raises(ValueError, match=r"plan\.init"):
        model(IDS, TARGET, plan=plan, call=Call(train=True))


def test_the_controller_may_begin_late():
    controller = RateController(0.5, integral=0.1, delay=2)
    state, told = controller.init(), []
    for _ in range(4):
        state = controller.update(jnp.asarray(0.1), state)
        told.append(float(state["coefficient"]))
    assert told[:2] == [0, 0] and 0 < told[2] < told[3]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_the_controller_holds_a_rate(target: float):
    """Of a gate that follows its coefficient: logits fall with it, as training makes them."""
    controller = RateController(target, proportional=0.5, integral=0.02)

    def step(carry, _):
        state, shift = carry
        rate = jax.nn.sigmoid(shift)
        shift = shift + 0.3 * (state["coefficient"] - 0.1)
        return (controller.update(rate, state), shift), rate

    _, rates = jax.lax.scan(step, (controller.init(), -1.0), length=4000)
    np.testing.assert_allclose(rates[-500:], target, atol=0.02)


@pytest.mark.parametrize("bias", [0.0, 50.0, -50.0])
def test_buckets_give_what_enough_slots_give(bias: float):
    plan = plan_of(capacity=1.0, corrected=True)
    model = build(plan, bias)
    want, report = forward(model, plan)

    @jax.jit
    def run(model):
        then = lambda memory: model.decode(TARGET, memory)  # noqa: E731
        return encode_in_buckets(model, IDS, (4, 12), then, plan=plan, valid=VALID)

    out = run(model)
    close(out.value, want)
    most = int(report.aux["before_2"]["entered"].sum(-1).max())
    assert int(out.slots) == next(k for k in (4, 12, N) if k >= most)
    kept = int(report.aux["before_2"]["entered"].sum())
    assert out.padding == pytest.approx(1 - kept / (B * int(out.slots)))


def test_nothing_to_delete_is_the_dense_model():
    plan = plan_of(keep=1.0)
    model = build(plan)
    assert (forward(model, plan)[0] == forward(model, Plan())[0]).all()
    assert not plan.init() and not model.reductions


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MrT5(target=1.0), r"deletion rate in \[0, 1\)"),
        (lambda: MrT5(target=-0.1), r"deletion rate in \[0, 1\)"),
        (lambda: MrT5(capacity=0.0), "capacity=0.0"),
        (lambda: MrT5(scale=3.0), "scale=3.0 must be below 0"),
        (lambda: MrT5(gate="lerned"), "gate='lerned'"),
        (lambda: MrT5(positions="new"), "positions='new'"),
        (lambda: plan_of(layer=4), "outside a model of 4 layers"),
        (lambda: forward(build(Plan()), plan_of()), "built without|build it with"),
        (lambda: forward(build(Plan()), plan_of(gate="random")), "Call\\(key="),
        (
            lambda: encode_in_buckets(build(plan_of()), IDS, (0, 4), id, plan=plan_of()),
            "bucket",
        ),
        (
            lambda: encode_in_buckets(build(Plan()), IDS, (4,), id, plan=Plan()),
            "before a layer",
        ),
    ],
)
def test_bad_input(make, match: str):
    with pytest.raises(ValueError, match=match) as error:
        make()
    assert "\n" not in str(error.value)


def test_prefix_tokens_are_never_deleted():
    plan = Plan(((Site("before", 2), MrT5(capacity=0.1)),))
    counts = plan.counts(dataclasses.replace(CONFIG.layout, prefix=3))
    assert counts[2].queries == 3 + 2


def test_a_source_without_any_token_stays_finite():
    plan = plan_of(corrected=True)
    model = build(plan)
    empty = VALID.at[1].set(False)
    for twin in ("packed", "soft"):
        logits, report = forward(model, plan.with_twin(twin), empty)
        assert np.isfinite(logits).all()
        assert not report.aux["before_2"]["entered"][1].any()
    alone, _ = forward(model, plan, None, ids=IDS[:1], target=TARGET[:1])
    close(forward(model, plan, empty)[0][:1], alone)


def test_one_example_alone_is_the_same_as_in_a_batch():
    plan = plan_of(capacity=1.0)
    model = build(plan)
    together, _ = forward(model, plan)
    for b, n in enumerate(VALID.sum(-1).tolist()):
        alone, _ = forward(model, plan, None, ids=IDS[b : b + 1, :n], target=TARGET[b : b + 1])
        close(together[b : b + 1], alone)
