"""Learners, their gate, the reduction made of them, and their distillation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokred.gates import GumbelChoice
from tokred.methods.acm import (
    ACM,
    NORMED,
    acm,
    budget_loss,
    diversity_loss,
    entropy_loss,
    even_shares,
    joint_losses,
    measure_shares,
)
from tokred.nn.learners import BIASES, CountGate, Learners, learner_width
from tokred.nn.mlp import Mlp
from tokred.plan import Layout
from tokred.tokens import make_tokens
from tokred.train.acm import count_errors, count_labels, distill_loss, gate_loss

B, N, D, n, d = 2, 7, 8, 3, 5
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
X = jax.random.normal(jax.random.key(0), (B, N, D))
COUNT = jax.random.randint(jax.random.key(1), (B, N), 0, n + 1)


def learners(bias: str = "all", activation: str = "gelu") -> Learners:
    return Learners(D, n, d, bias=bias, activation=activation, rngs=nnx.Rngs(2))


def at(outputs, count):
    return jnp.take_along_axis(outputs, count[..., None, None], axis=-2)[..., 0, :]


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("activation", ["gelu", "identity"])
def test_three_forms_agree(bias, activation):
    layer = learners(bias, activation)
    wanted = at(layer.all(X), COUNT)
    close(layer.masked(X, jax.nn.one_hot(COUNT, n + 1)), wanted)
    packed, overflow = layer.packed(X, COUNT, (N, N, N))
    close(packed, wanted)
    assert not overflow.any()


def test_outputs_by_hand():
    layer = learners()
    assert layer.b1 is not None and layer.b2 is not None
    y = jnp.broadcast_to(layer.b2[0], X.shape)
    found = layer.all(X)
    for k in range(n + 1):
        close(found[..., k, :], y)
        if k < n:
            part = slice(k * d, (k + 1) * d)
            hidden = jnp.einsum("bnd,de->bne", X, layer.w1[:, part]) + layer.b1[part][None, None]
            y = y + jax.nn.gelu(hidden, approximate=False) @ layer.w2[part]
            y = y + layer.b2[k + 1][None, None]


def test_soft_choice_mixes_the_outputs_and_has_a_gradient():
    layer = learners()
    choice = jax.nn.softmax(jax.random.normal(jax.random.key(3), (B, N, n + 1)))
    close(layer.masked(X, choice), jnp.einsum("bnk,bnkd->bnd", choice, layer.all(X)))
    grad = jax.grad(lambda c: layer.masked(X, c).sum())(choice)
    close(grad, layer.all(X).sum(-1), atol=1e-5)


def test_without_room_a_token_gets_the_learners_that_have_room():
    layer, capacities = learners(), (5, 2, 1)
    y, overflow = jax.jit(lambda x, c: layer.packed(x, c, capacities))(X, COUNT)
    order = np.argsort(-np.asarray(COUNT), axis=-1, kind="stable")
    given = np.zeros((B, N), int)
    for b in range(B):
        for rank, token in enumerate(order[b]):
            given[b, token] = min(COUNT[b, token], sum(rank < c for c in capacities))
    close(y, at(layer.all(X), jnp.asarray(given)))
    np.testing.assert_array_equal(overflow, (given < np.asarray(COUNT)).sum(-1))
    assert overflow.any()


def test_official_rule_takes_a_learner_from_the_largest_count_of_the_batch():
    layer = learners()
    y, _ = layer.packed(X, COUNT, (N, N, N), rule="official")
    close(y, at(layer.all(X), jnp.minimum(COUNT, COUNT.max() - 1)))
    nothing, _ = layer.packed(X, jnp.zeros_like(COUNT), (N, N, N), rule="official")
    close(nothing, layer.all(X)[..., 0, :])


def test_own_gradient_trains_one_learner_per_output():
    layer = learners()
    close(layer.all(X, own_gradient=True), layer.all(X))
    graph, state = nnx.split(layer)
    second = lambda s: nnx.merge(graph, s).all(X, own_gradient=True)[..., 2, :].sum()  # noqa: E731
    grad = jax.grad(second)(state)["w2"][...].reshape(n, d, D)
    assert grad[1].any() and not grad[0].any() and not grad[2].any()


def test_widths_of_vit_b():
    assert learner_width(768, 4, hidden=3072) == 768
    assert learner_width(768, 4) == 96
    assert learner_width(768, 8, hidden=3072, factor=0.5) == 192


@pytest.mark.parametrize(
    "call",
    [
        lambda: learner_width(4, 9),
        lambda: Learners(D, n, d, bias="some", rngs=nnx.Rngs(0)),
        lambda: Learners(D, n, d, activation="some", rngs=nnx.Rngs(0)),
        lambda: learners().packed(X, COUNT, (3, 4, 1)),
        lambda: learners().packed(X, COUNT, (N, N)),
        lambda: learners().packed(X, COUNT, (N + 1, N, N)),
        lambda: learners().packed(X, COUNT, (0, 0, 0)),
        lambda: learners().packed(X, COUNT, (N, N, N), rule="some"),
        lambda: count_labels(jnp.ones((B, N, n + 1)), rule="some"),
        lambda: acm(LAYOUT, shares=(1.0,)),
    ],
)
def test_bad_input(call, unchecked):
    with pytest.raises(ValueError, match=r"change|raise"):
        call()


@pytest.mark.parametrize("depth", [1, 3])
def test_gate_never_offers_less_than_least(depth):
    gate = CountGate(D, n, least=1, depth=depth, rngs=nnx.Rngs(0))
    logits = gate(X)
    assert logits.shape == (B, N, n + 1)
    assert jnp.isneginf(logits[..., 0]).all()
    choose = functools.partial(GumbelChoice(0.8).update, key=jax.random.key(1), train=True)
    choice = choose(logits)[0]
    assert not choice[..., 0].any()
    close(choice.sum(-1), jnp.ones((B, N)))
    graph, state = nnx.split(gate)
    values = jnp.arange(n + 1.0)
    grads = jax.grad(lambda s: (choose(nnx.merge(graph, s)(X))[0] @ values).sum())(state)
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))


def test_choices_follow_their_chances():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    many = jnp.broadcast_to(logits, (4000, 3))
    drawn = GumbelChoice(0.8).update(many, key=jax.random.key(0), train=True)[0]
    close(drawn.mean(0), jnp.array([0.5, 0.3, 0.2]), atol=0.03)
    close(GumbelChoice(0.8).update(many)[0], jax.nn.one_hot(jnp.zeros(4000, int), 3))
    with pytest.raises(ValueError, match="key"):
        GumbelChoice().update(many, train=True)


LAYOUT = Layout(depth=2, tokens=N, prefix=1, grid=(2, 3), class_token=True, width=D, heads=2)


def reduction(**changes) -> ACM:
    return ACM(hidden=d, **{"shares": (1.0,) * n, **changes})


def reduce(how: ACM, x=X, **options):
    tokens = make_tokens(x, prefix=1, valid=options.pop("valid", None))
    module = how.build(D, 2, nnx.Rngs(5))
    return how(tokens, {NORMED.name: 0.7 * tokens.x}, module=module, **options), module


@pytest.mark.parametrize("twin", ["packed", "soft", "causal"])
def test_the_branch_is_replaced(twin):
    (inner, map_, _, aux), module = reduce(reduction(), twin=twin)
    count = jnp.argmax(module.gate(0.7 * X), axis=-1)
    assert inner.n == map_.k == 0
    np.testing.assert_array_equal(aux["choice"], count)
    close(aux["cost"], count.mean(-1) / n)
    close(aux["combine"].fill, X + at(module.learners.all(0.7 * X), count))


def test_padding_changes_nothing():
    valid = jnp.arange(N + 3)[None] < jnp.array([[N], [N]])
    padded = jnp.concatenate([X, jnp.ones((B, 3, D))], axis=1)
    for twin in ("soft", "packed"):
        (_, _, _, plain), _ = reduce(reduction(), twin=twin)
        (_, _, _, aux), _ = reduce(reduction(), padded, valid=valid, twin=twin)
        close(aux["combine"].fill[:, :N], plain["combine"].fill)
        for name in ("cost", "loss_budget", "loss_entropy", "loss_diversity"):
            if name in plain:
                close(aux[name], plain[name])


def test_training_draws_counts_and_reaches_the_gate():
    how = reduction(target=0.25)
    with pytest.raises(ValueError, match="key"):
        reduce(how, twin="soft", train=True)
    graph, state = nnx.split(how.build(D, 2, nnx.Rngs(5)))

    def loss(state):
        module = nnx.merge(graph, state)
        _, _, _, aux = how(
            make_tokens(X), {NORMED.name: X}, module=module, key=jax.random.key(0), train=True,
            twin="soft",
        )  # fmt: skip
        return sum(aux[f"loss_{name}"] for name in ("budget", "entropy", "diversity"))

    grads = jax.grad(loss)(state)
    assert all(g.any() for g in jax.tree.leaves(grads["gate"]))
    assert not any(g.any() for g in jax.tree.leaves(grads["learners"]))
    (_, _, _, aux), _ = reduce(reduction(diversity=0.0), twin="soft")
    assert "loss_diversity" not in aux


def test_losses_by_hand():
    hot = jax.nn.one_hot(COUNT, n + 1)
    costs = [COUNT.mean(-1) / n, jnp.array([0.1, 0.9])]
    close(budget_loss(costs, 0.3), abs(np.mean(costs) - 0.3))
    share = np.asarray(hot.mean(1))
    entropy = -(share * np.log(share + 1e-20)).sum(-1) / np.log(n + 1)
    close(entropy_loss(hot), -entropy.mean())
    even = jax.nn.one_hot(jnp.arange(2 * (n + 1)) % (n + 1), n + 1)[None]
    close(entropy_loss(even), -1.0)
    c = np.mean(costs, axis=0) * n / (n + 1)
    close(diversity_loss(costs, n), -2 * np.abs(c[:, None] - c[None]).mean())


def test_joint_losses_are_over_all_sites():
    plan = acm(LAYOUT, keep=0.4, learners=n)
    aux = {"around_mlp_0": {"cost": jnp.array([0.2, 0.4])},
           "around_mlp_1": {"cost": jnp.array([0.6, 0.4])}}  # fmt: skip
    joint = joint_losses(aux, plan)
    close(joint["loss_budget"], 0.1 * abs(0.4 - 0.4))
    close(joint["loss_diversity"], 0.0)
    with pytest.raises(ValueError, match="acm"):
        joint_losses(aux, acm(LAYOUT, layers=()))


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_plan_costs_its_target(keep):
    plan = acm(LAYOUT, keep=keep, learners=4)
    [(site, how), _] = plan.steps
    assert isinstance(how, ACM)
    assert (site.kind, how.learners, how.hidden) == ("around_mlp", 4, D)
    close(np.mean(how.shares), keep)
    assert how.capacities(100) == tuple(sorted(how.capacities(100), reverse=True))
    gate = D * 16 + 16 * 16 + 16 * 5
    assert how.macs(100, LAYOUT) == 100 * gate + 2 * sum(how.capacities(100)) * D * D


def test_measured_shares_leave_no_overflow():
    shares = measure_shares(COUNT, n)
    how = reduction(shares=shares)
    assert even_shares(n, 1.0) == (1.0,) * n
    layer = learners()
    y, overflow = layer.packed(X, COUNT, how.capacities(N))
    assert not overflow.any()
    close(y, at(layer.all(X), COUNT))


def test_labels():
    errors = jnp.array(
        [
            [9.0, 4.0, 3.9, 3.8],  # the second learner does not help: 1 + 1
            [9.0, 8.9, 2.0, 1.0],  # the first does not
            [9.0, 5.0, 2.0, 1.0],  # all help
            [9.0, 5.0, 2.0, 1.9],
        ]
    )
    np.testing.assert_array_equal(count_labels(errors), [2, 3, 3, 3])
    np.testing.assert_array_equal(count_labels(errors, rule="correct"), [2, 1, 3, 3])


def fit(loss, state, steps: int, rate: float):
    optimizer = optax.adam(rate)

    def step(carry, key):
        state, moments = carry
        value, grads = jax.value_and_grad(loss)(state, key)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(state, updates), moments), value

    keys = jax.random.split(jax.random.key(7), steps)
    (state, _), values = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
        (state, optimizer.init(state))
    )
    return state, values


def draw(key):
    """Tokens of two kinds, apart in the first channel; the second kind varies less."""
    x = jax.random.normal(key, (4, 16, D))
    kind = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (4, 16, 1))
    apart = 2.0 * (jnp.arange(D) == 0)[None, None]
    return jnp.where(kind, x + apart, 0.3 * x - apart)


def test_distillation_of_a_random_mlp():
    mlp = Mlp(D, 4 * D, param_dtype=jnp.float32, rngs=nnx.Rngs(11))
    graph, state = nnx.split(Learners(D, n, 12, bias="all", rngs=nnx.Rngs(2)))

    def distill(state, key):
        x = draw(key)
        return distill_loss(nnx.merge(graph, state).all(x), mlp(x))

    state, values = fit(distill, state, 400, 1e-2)
    assert values[-20:].mean() < 0.5 * values[:20].mean()
    layer, x = nnx.merge(graph, state), draw(jax.random.key(99))
    errors = count_errors(layer.all(x), mlp(x))
    means = errors.mean((0, 1))
    assert (means[1:] < means[:-1]).all()

    rule = functools.partial(count_labels, factor=1.5, rule="correct")
    gate_graph, gate = nnx.split(CountGate(D, n, rngs=nnx.Rngs(3)))

    def pretrain(state, key):
        x = draw(key)
        labels = rule(count_errors(layer.all(x), mlp(x)))
        return gate_loss(nnx.merge(gate_graph, state)(x), labels)

    gate, values = fit(pretrain, gate, 300, 1e-2)
    assert values[-20:].mean() < 0.8 * values[:20].mean()
    guess = jnp.argmax(nnx.merge(gate_graph, gate)(x), axis=-1)
    labels = rule(errors)
    common = max(np.mean(labels == k) for k in range(n + 1))
    assert np.mean(guess == labels) > common + 0.1
