"""A mixture of experts in its two forms, and which experts MC-MoE leaves to a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods.mcmoe import MIXTRAL_BETA, prune_experts, token_importance
from tokred.nn.experts import Experts, expert_capacity, per_expert, renormalise, route

B, N, D, F, M, K = 2, 10, 6, 7, 4, 2
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
X = jax.random.normal(jax.random.key(0), (B, N, D))
EXPERTS = Experts(D, F, M, top_k=K, rngs=nnx.Rngs(1))


def test_output_by_hand():
    chance = np.asarray(jax.nn.softmax(X @ EXPERTS.router.kernel[...]))
    y = np.zeros(X.shape)
    for b in range(B):
        for i in range(N):
            best = np.argsort(-chance[b, i])[:K]
            for m in best:
                x = np.asarray(X[b, i])
                gate, up, down = (
                    np.asarray(w[m]) for w in (EXPERTS.gate, EXPERTS.up, EXPERTS.down)
                )
                hidden = np.asarray(jax.nn.silu(x @ gate)) * (x @ up)
                y[b, i] += chance[b, i, m] / chance[b, i, best].sum() * (hidden @ down)
    close(EXPERTS(X), y, atol=1e-5)


def test_packed_is_masked_where_there_is_room():
    weight = EXPERTS.route(X)
    run = jax.jit(EXPERTS.packed, static_argnums=2)
    y, overflow = run(X, weight, N)
    close(y, EXPERTS.masked(X, weight))
    assert overflow.shape == (B, M) and not overflow.any()
    taken = np.asarray((weight > 0).sum(1))
    y, overflow = run(X, weight, int(taken.max()))
    close(y, EXPERTS.masked(X, weight))


def test_a_full_expert_keeps_the_tokens_that_weigh_it_highest():
    weight = EXPERTS.route(X)
    y, overflow = EXPERTS.packed(X, weight, 3)
    third = -np.sort(-np.asarray(weight), axis=1)[:, 2:3]
    close(y, EXPERTS.masked(X, jnp.where(weight >= third, weight, 0.0)))
    np.testing.assert_array_equal(overflow, np.maximum((weight > 0).sum(1) - 3, 0))
    assert overflow.any()


def test_both_forms_have_the_same_gradients():
    def grads(run):
        return jax.grad(lambda x: run(x, EXPERTS.route(x)).sum())(X)

    close(grads(EXPERTS.masked), grads(lambda x, w: EXPERTS.packed(x, w, N)[0]), atol=1e-5)


def test_capacity_is_a_share_with_slack():
    assert expert_capacity(100, 8, 2) == 32
    assert expert_capacity(100, 8, 2, factor=1.0) == 25
    assert expert_capacity(1, 8, 2) == 1
    assert expert_capacity(4, 2, 2, factor=9.0) == 4


def test_routing_weights():
    weight, expert = route(jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]])), 2)
    close(weight, [[0.5, 0.25]])
    np.testing.assert_array_equal(expert, [[1, 3]])
    close(renormalise(weight), [[2 / 3, 1 / 3]])
    close(renormalise(jnp.zeros((1, 2))), [[0.0, 0.0]])
    close(per_expert(weight, expert, 4), [[0.0, 0.5, 0.0, 0.25]])


WEIGHT = jnp.array([[[0.5, 0.3], [0.5, 0.1], [0.5, 0.1], [0.4, 0.3], [0.5, 0.1]]])
SCORE = jnp.array([[1.0, 2.0, 5.0, 0.1, 4.0]])


def experts_left(*args, **options):
    return np.asarray((prune_experts(*args, **options) > 0).sum(-1))


def test_weak_second_experts_leave_and_weights_still_sum_to_one():
    kept = prune_experts(WEIGHT, beta=0.5)
    close(kept[0], [[5 / 8, 3 / 8], [1, 0], [1, 0], [4 / 7, 3 / 7], [1, 0]])


def test_least_important_tokens_lose_all_experts_and_the_most_important_keep_both():
    left = functools.partial(experts_left, WEIGHT, SCORE, beta=0.5)
    np.testing.assert_array_equal(left(tau_low=0.2, tau_high=0.4), [[2, 1, 2, 0, 2]])
    np.testing.assert_array_equal(left(tau_low=0.0, tau_high=0.19), [[2, 1, 1, 2, 1]])
    np.testing.assert_array_equal(left(tau_low=1.0, tau_high=0.2), [[0, 0, 2, 0, 0]])


def test_shares_count_valid_tokens_alone():
    pad = ((0, 0), (0, 4))
    weight = jnp.pad(WEIGHT, (*pad, (0, 0)), constant_values=0.4)
    valid = jnp.arange(9)[None] < 5
    for filler in (9.0, -9.0):
        score = jnp.pad(SCORE, pad, constant_values=filler)
        left = experts_left(weight, score, beta=0.5, tau_low=0.2, tau_high=0.4, valid=valid)
        np.testing.assert_array_equal(left[:, :5], [[2, 1, 2, 0, 2]])


def causal_attention(n=N):
    q, k = jax.random.normal(jax.random.key(4), (2, B, n, 2, 3))
    bias = jnp.where(jnp.tril(jnp.ones((n, n), bool)), 0.0, -1e30)
    logits = jnp.einsum("bnhe,bmhe->bhnm", q, k) + bias[None, None]
    return jax.nn.softmax(logits)


def test_importance():
    norm = np.abs(np.asarray(X)).sum(-1)
    seen_by = np.arange(N, 0, -1.0)
    close(token_importance(X), norm / seen_by)
    attention = causal_attention()
    received = attention.mean((1, 2))
    found = token_importance(X, received, kind="column_mean")
    close(found, np.asarray(attention).mean(1).sum(1) / seen_by * norm)


@pytest.mark.parametrize("kind", ["official", "column_mean"])
def test_padding_does_not_change_importance(kind):
    received = jax.random.uniform(jax.random.key(3), (B, N))
    pad = lambda a: jnp.pad(a, ((0, 0), (0, 3)) + ((0, 0),) * (a.ndim - 2))  # noqa: E731
    valid = pad(jnp.ones((B, N), bool))
    plain = token_importance(X, received, kind=kind)
    close(token_importance(pad(X), pad(received), kind=kind, valid=valid)[:, :N], plain)


@pytest.mark.parametrize(
    "call",
    [
        lambda: token_importance(X, kind="some"),
        lambda: token_importance(X, kind="column_mean"),
        lambda: prune_experts(WEIGHT[..., :1], beta=0.5),
        lambda: Experts(D, F, M, top_k=5, rngs=nnx.Rngs(0)),
        lambda: EXPERTS.packed(X, EXPERTS.route(X), N + 1),
    ],
)
def test_bad_input(call, unchecked):
    with pytest.raises(ValueError, match=r"change|pass|raise|must"):
        call()


def test_published_layers():
    assert len(MIXTRAL_BETA) == 32
