"""The options of the one step: parts, averages, controllers, remat, mixing, a teacher, faults."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.models.vit import ViT, ViTConfig
from tokred.nn.skeleton import split_model
from tokred.plan import Plan, Reduction, Site
from tokred.report import Call
from tokred.train.losses import ImageObjective, Teacher
from tokred.train.mixing import Mixing
from tokred.train.optimizer import make_optimizer
from tokred.train.state import init_state, result
from tokred.train.step import FAULTS, make_train_step
from tokred.train.varied import Varied

CONFIG = ViTConfig(
    image_size=(8, 8), patch=(2, 2), channels=1, width=16, depth=3, heads=2, classes=4
)
TX: optax.GradientTransformation = optax.sgd(0.1)


def weights_of(plan=None, seed=0):
    return split_model(ViT(CONFIG, plan=plan or Plan(), rngs=nnx.Rngs(seed)))


def batch(rows=8, seed=0):
    image = np.random.default_rng(seed).normal(size=(rows, 8, 8, 1)).astype(np.float32)
    return {"image": image, "label": np.arange(rows, dtype=np.int32) % 4}


def run(
    objective,
    *,
    steps=1,
    tx: optax.GradientTransformation = TX,
    batches=None,
    frozen=None,
    **options,
):
    """(first state, last state, metrics of all steps)."""
    skeleton, weights = weights_of(objective.plan)
    names, plan = tuple(weights.params), objective.plan
    controllers, ema = plan.init(), bool(options.get("ema"))
    make = lambda: init_state(  # noqa: E731
        jax.tree.map(jnp.copy, weights), tx, names, controllers=controllers, ema=ema
    )
    state, told = make(), []
    step = make_train_step(skeleton, objective, tx, names, **options)
    for rows in batches or [batch(seed=i) for i in range(steps)]:
        state, metrics = step(state, rows, frozen or {})
        told.append(jax.device_get(metrics))
    return make(), state, told


def assert_close(a, b, **tolerance):
    for name, value in a.items():
        np.testing.assert_allclose(b[name], value, err_msg=name, **tolerance)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(parts):
    _, whole, told = run(ImageObjective(label_smoothing=0.1))
    _, split, told_too = run(ImageObjective(label_smoothing=0.1), accumulate=parts)
    assert_close(whole["params"], split["params"], rtol=1e-5, atol=1e-6)
    assert_close(told[0], told_too[0], rtol=1e-5)


def test_averages_follow_the_weights():
    first, last, _ = run(ImageObjective(), steps=3, ema=0.9)
    expected = {k: np.asarray(v) for k, v in first["params"].items()}
    state, step = first, 0
    skeleton, weights = weights_of()
    one = make_train_step(skeleton, ImageObjective(), TX, tuple(weights.params))
    state = init_state(weights, TX, tuple(weights.params))
    for step in range(3):
        state, _ = one(state, batch(seed=step), {})
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {k: decay * v + (1 - decay) * state["params"][k] for k, v in expected.items()}
    assert_close(expected, last["ema"], rtol=1e-5, atol=1e-6)
    assert_close(last["ema"], result(last).params, rtol=0)
    assert_close(state["params"], last["params"], rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class Counting(Reduction):
    """Removes nothing; its running state counts the calls that it got while training."""

    def counts(self, n, prefix):
        return n

    def init(self):
        return jnp.zeros((), jnp.int32)

    def __call__(self, tokens, evidence, state=None, *, train=False, **_):
        state = self.init() if state is None else state
        return tokens, None, state + train, {"loss_count": 0.01 * state.astype(jnp.float32)}


@pytest.mark.parametrize(("parts", "calls"), [(1, 3), (2, 6)])
def test_running_states_of_reductions_go_on(parts, calls):
    plan = Plan(((Site("mid", 1), Counting()),), name="counting")
    _, state, told = run(ImageObjective(plan), steps=3, accumulate=parts)
    assert {k: int(v) for k, v in state["controllers"].items()} == {"mid_1": calls}
    assert told[2]["mid_1/loss_count"] > told[1]["mid_1/loss_count"] > 0


@pytest.mark.parametrize("layers", [1, 3])
def test_remat_changes_no_number(layers):
    plan = make_plan("diffrate", CONFIG.layout).with_twin("soft")
    objectives = [ImageObjective(plan, macs_weight=1.0, target=0.5, remat=n) for n in (0, layers)]
    (_, plain, told), (_, again, told_too) = map(run, objectives)
    assert_close(plain["params"], again["params"], rtol=1e-5, atol=1e-6)
    assert_close(told[0], told_too[0], rtol=1e-5)


def test_remat_computes_again():
    def flops(layers):
        skeleton, weights = weights_of()
        names, objective = tuple(weights.params), ImageObjective(remat=layers)
        state = init_state(weights, TX, names)
        step = make_train_step(skeleton, objective, TX, names)
        return step.lower(state, batch(), {}).compile().cost_analysis()["flops"]

    assert flops(3) > 1.15 * flops(0)


def test_bfloat16_computes_close_to_float32_and_keeps_float32():
    import dataclasses

    half = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
    skeleton, weights = split_model(ViT(half, rngs=nnx.Rngs(0)))
    names = tuple(weights.params)
    step = make_train_step(skeleton, ImageObjective(), TX, names)
    state, metrics = step(init_state(weights, TX, names), batch(), {})
    assert {v.dtype for v in state["params"].values()} == {jnp.dtype("float32")}
    _, _, told = run(ImageObjective())
    np.testing.assert_allclose(metrics["loss"], told[0]["loss"], rtol=2e-2)


def test_mixing_draws_anew_in_every_step():
    objective = ImageObjective(mixing=Mixing(mixup=1.0, cutmix=1.0))
    same = [batch()] * 4
    _, _, told = run(objective, tx=optax.sgd(0.0), batches=same)
    assert len({float(metrics["loss"]) for metrics in told}) == 4
    _, _, plain = run(ImageObjective(), tx=optax.sgd(0.0), batches=same)
    assert len({float(metrics["loss"]) for metrics in plain}) == 1


def test_a_teacher_pulls_logits_and_kept_tokens():
    skeleton, theirs = weights_of(seed=1)
    teacher = Teacher(skeleton, logits=20.0, features=20.0, temperature=2.0)
    plan = make_plan("topk", CONFIG.layout, keep=0.5)
    tx = make_optimizer(lr=1e-2, steps=60, warmup=0.0)
    _, _, told = run(
        ImageObjective(plan, teacher=teacher),
        tx=tx,
        batches=[batch()] * 60,
        frozen=jax.tree.map(jnp.copy, theirs._asdict()),
    )
    for name in ("distill_logits", "distill_features"):
        assert told[-1][name] < 0.5 * told[0][name], name


def test_a_dense_student_with_the_teachers_weights_has_nothing_to_learn():
    skeleton, theirs = weights_of()
    teacher = Teacher(skeleton, logits=1.0, features=1.0)
    _, _, told = run(ImageObjective(teacher=teacher), frozen=theirs._asdict())
    np.testing.assert_allclose(
        [told[0]["distill_logits"], told[0]["distill_features"]], 0.0, atol=1e-6
    )


def bad_batch():
    rows = batch(seed=2)
    rows["image"][3, 1, 1, 0] = np.nan
    return rows


def test_from_the_first_fault_on_the_state_stays():
    batches = [batch(seed=0), batch(seed=1), bad_batch(), batch(seed=3)]
    _, state, told = run(ImageObjective(), tx=optax.adam(0.01), batches=batches, ema=0.9)
    _, sound, _ = run(ImageObjective(), tx=optax.adam(0.01), batches=batches[:2], ema=0.9)
    assert int(state["step"]) == 2 and [int(m["fault"]) for m in told] == [0, 0, 7, 7]
    for part in ("params", "ema", "opt"):
        jax.tree.map(np.testing.assert_array_equal, state[part], sound[part])


def test_a_gradient_alone_can_be_at_fault():
    """sqrt has a finite value and an infinite slope at 0."""

    class Steep(ImageObjective):
        def __call__(self, model, rows, key, controllers, frozen):
            loss, rest = super().__call__(model, rows, key, controllers, frozen)
            return loss + jnp.sqrt(0.0 * model.head.kernel[...].sum() ** 2), rest

    _, _, told = run(Steep())
    assert int(told[0]["fault"]) == 1 << FAULTS.index("the gradient norm")


def test_evaluation_knows_nothing_of_training():
    skeleton, weights = weights_of()
    call = Call(key=jax.random.key(0), remat=3)
    images = jnp.asarray(batch()["image"])
    logits = [skeleton.merge(*weights)(images, call=c)[0] for c in (Call(), call)]
    np.testing.assert_array_equal(*logits)


def turns(rule: str) -> tuple[Varied, ImageObjective, list[ImageObjective]]:
    """(plans of few and many tokens that take turns, their objective, those of each alone)."""
    plans = tuple(make_plan("tome", CONFIG.layout, r=r) for r in (1, 3, 5))
    varied = Varied(plans, rule)
    alone = [ImageObjective(plan) for plan in plans]
    return varied, ImageObjective(plans[0], varied=varied), alone


def test_a_step_is_that_of_the_plan_that_it_drew():
    varied, both, alone = turns("draw")
    start, end, _ = run(both)
    key = jax.random.fold_in(start["key"], start["step"])
    _, want, _ = run(alone[int(varied.choose(key, 0))])
    assert_close(end["params"], want["params"], atol=1e-6)


def test_under_all_plans_gradients_are_their_mean():
    _, all_at_once, alone = turns("all")
    start, end, _ = run(all_at_once)
    ends = [run(each)[1]["params"] for each in alone]
    for name, value in end["params"].items():
        want = np.mean([each[name] for each in ends], axis=0)
        np.testing.assert_allclose(value, want, atol=1e-6, err_msg=name)
    kernel = "blocks/0/mlp/fc1/kernel"
    assert not np.array_equal(end["params"][kernel], start["params"][kernel])


def test_plans_that_take_turns_need_the_memory_of_the_largest():
    """What a plan remembers for its gradient is not written where another one runs."""

    def temporary(objective: ImageObjective) -> int:
        skeleton, weights = weights_of()
        names = tuple(weights.params)
        state = init_state(weights, TX, names)
        step = make_train_step(skeleton, objective, TX, names)
        memory = step.lower(state, batch(256), {}).compile().memory_analysis()
        return memory.temp_size_in_bytes

    _, both, alone = turns("draw")
    assert temporary(both) < 1.5 * max(map(temporary, (alone[0], alone[-1])))
