"""Selections of tokens that skip a layer, and how updates are put back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.algebra.random_maps import normal
from tokred.combine import RULES, Combine
from tokred.maps import Assign, Keep
from tokred.select import keep_top_k, keep_where, rank_within

B, N, K, D = 3, 8, 4, 2
seeds = st.integers(0, 2**31)
few = settings(max_examples=8)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def drawn(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores with ties, valid, and how many each example may keep."""
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.0, 1.0, 2.0, 3.0], (B, N))
    return (
        jnp.asarray(scores, jnp.float32),
        jnp.asarray(rng.random((B, N)) < 0.6),
        jnp.asarray(rng.integers(0, K + 2, (B,)), jnp.int32),
    )


limited = jax.jit(
    lambda scores, valid, limit, order: keep_top_k(
        scores, K, valid=valid, order=order, limit=limit
    ),
    static_argnums=3,
)


@pytest.mark.parametrize("order", ["score", "position"])
@given(seed=seeds)
@few
def test_every_example_has_its_own_limit(order: str, seed: int):
    scores, valid, limit = drawn(seed)
    map_ = limited(scores, valid, limit, order)
    for b in range(B):
        alive = np.flatnonzero(valid[b])
        best = alive[np.argsort(-np.asarray(scores[b])[alive], kind="stable")]
        best = best[: min(K, int(limit[b]))]
        wanted = np.sort(best) if order == "position" else best
        assert map_.valid[b].tolist() == [slot < len(wanted) for slot in range(K)]
        np.testing.assert_array_equal(map_.index[b][: len(wanted)], wanted)
        np.testing.assert_array_equal(np.flatnonzero(map_.source[b] >= 0), np.sort(best))


def test_limits_spare_the_prefix():
    scores = jnp.array([[9.0, 1.0, 3.0, 2.0]])
    map_ = keep_top_k(scores, 2, prefix=1, limit=jnp.array([1]), order="position")
    assert map_.index[0, :2].tolist() == [0, 2]
    assert map_.valid.tolist() == [[True, True, False]]


chosen_in = jax.jit(lambda chosen, scores, valid: keep_where(chosen, K, scores=scores, valid=valid))


@pytest.mark.parametrize("ranked", [False, True])
@given(seed=seeds)
@few
def test_chosen_tokens_take_their_slots_in_order(ranked: bool, seed: int):
    scores, valid, _ = drawn(seed)
    chosen = jnp.asarray(np.random.default_rng(seed + 1).random((B, N)) < 0.7)
    map_, overflow = chosen_in(chosen, scores if ranked else None, valid)
    for b in range(B):
        here = np.flatnonzero(chosen[b] & valid[b])
        level = np.asarray(scores[b])[here] if ranked else np.zeros(len(here))
        wanted = np.sort(here[np.argsort(-level, kind="stable")][:K])
        assert map_.valid[b].tolist() == [slot < len(wanted) for slot in range(K)]
        np.testing.assert_array_equal(map_.index[b][: len(wanted)], wanted)
        assert overflow[b] == max(0, len(here) - K)


@given(seed=seeds)
@few
def test_ranks_are_counted_within_groups(seed: int):
    scores, _, _ = drawn(seed)
    group = jnp.asarray(np.random.default_rng(seed).integers(-1, 3, (B, N)), jnp.int32)
    found = jax.jit(rank_within)(scores, group)
    for b, i in np.ndindex(B, N):
        s, g = np.asarray(scores[b]), np.asarray(group[b])
        before = (s > s[i]) | ((s == s[i]) & (np.arange(N) < i))
        assert found[b, i] == (before & (g == g[i])).sum()


@pytest.mark.parametrize("partly", [False, True])
def test_a_masked_choice_is_the_same_choice(partly: bool):
    index = jnp.array([[2, 0, 3], [1, 2, 0]])
    valid = jnp.array([[True, False, True], [True, True, True]]) if partly else None
    map_ = Keep(index, 5, valid)
    masked = map_.masked()
    assert masked.k == masked.n == 5
    np.testing.assert_array_equal(masked.index, np.broadcast_to(np.arange(5), (2, 5)))
    np.testing.assert_array_equal(masked.valid, np.asarray(map_.source) >= 0)
    x, y = normal(np.random.default_rng(0), 2, 5, D), normal(np.random.default_rng(1), 2, 5, D)
    np.testing.assert_array_equal(
        map_.restore(map_.apply(x), y), masked.restore(masked.apply(x), y)
    )


def around(rule: str, weighed: bool, filled: bool, valid: bool = False):
    """x, what enters and leaves the layer, a map, and a Combine."""
    rng = np.random.default_rng(4)
    x, y = normal(rng, B, N, D), normal(rng, B, K, D)
    alive = jnp.asarray(rng.random((B, K)) < 0.6) if valid else None
    map_ = Keep(jnp.asarray(rng.random((B, N)).argsort(-1)[:, :K], jnp.int32), N, alive)
    weight = normal(rng, B, K) if weighed else None
    fill = normal(rng, B, N, D) if filled else None
    return x, map_.apply(x), y, map_, Combine(weight, fill, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("valid", [False, True])
def test_rules_token_by_token(rule: str, weighed: bool, filled: bool, valid: bool):
    x, before, after, map_, combine = around(rule, weighed, filled, valid)
    found = combine.put_back(x, before, after, map_)
    wanted = np.array(x if combine.fill is None else combine.fill)
    for b, k in np.ndindex(B, K):
        if map_.valid is not None and not map_.valid[b, k]:
            continue
        w = float(combine.weight[b, k]) if weighed else 1.0
        old, new = np.asarray(before[b, k]), np.asarray(after[b, k])
        plain = {"residual": old + w * (new - old), "scale_all": w * new, "mlp_branch": new}
        wanted[b, int(map_.index[b, k])] = plain[rule]
    close(found, wanted)
    assert (combine.mlp_weight is combine.weight) == (rule == "mlp_branch" or not weighed)


def test_merged_tokens_share_their_update():
    target = jnp.array([[0, 0, 1, 2]])
    map_, x = Assign(target, 2), jnp.arange(4.0).reshape(1, 4, 1)
    before = map_.apply(x)
    found = Combine().put_back(x, before, before + jnp.array([[[10.0], [20.0]]]), map_)
    assert found[0, :, 0].tolist() == [10, 11, 22, 3]


def test_nobody_enters():
    x, fill = jnp.ones((1, 3, 2)), jnp.full((1, 3, 2), 5.0)
    nobody, none = Keep(jnp.zeros((1, 0), jnp.int32), 3), jnp.zeros((1, 0, 2))
    np.testing.assert_array_equal(Combine(fill=fill).put_back(x, none, none, nobody), fill)
    np.testing.assert_array_equal(Combine().put_back(x, none, none, nobody), x)


def test_without_a_map_all_enter():
    x, y = jnp.ones((1, 3, 2)), jnp.full((1, 3, 2), 3.0)
    weight = jnp.array([[0.0, 0.5, 1.0]])
    assert Combine(weight).put_back(x, x, y, None)[0, :, 0].tolist() == [1, 2, 3]


def test_weights_and_fills_get_gradients():
    x, before, after, map_, combine = around("residual", True, True)

    def loss(weight, fill):
        return Combine(weight, fill).put_back(x, before, after, map_).var()

    weight, fill = jax.jit(jax.grad(loss, (0, 1)))(combine.weight, combine.fill)
    assert np.asarray(weight).all()
    np.testing.assert_array_equal(np.asarray(fill).any(-1), np.asarray(map_.source) < 0)


def test_an_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="rule='sum' must be one of"):
        Combine(rule="sum")
