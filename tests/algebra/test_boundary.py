"""Segments of a sequence against loops, and the gates that cut one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.algebra.random_maps import normal
from tokred import boundary
from tokred.gates import Boundary, Halting, one_through
from tokred.tokens import make_tokens

B, N, D, K = 3, 9, 4, 4
seeds = st.integers(0, 2**31)
few = settings(max_examples=8)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def drawn(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Starts, valid and documents."""
    rng = np.random.default_rng(seed)
    starts, valid = rng.random((2, B, N)) < np.array([0.4, 0.7]).reshape(2, 1, 1)
    document = np.sort(rng.integers(0, 3, (B, N)))
    return jnp.asarray(starts), jnp.asarray(valid), jnp.asarray(document, jnp.float32)


@given(seed=seeds)
@few
def test_what_lies_before(seed: int):
    _, valid, document = drawn(seed)
    position = jnp.stack([jnp.zeros((B, N)), document], -1)
    x = normal(np.random.default_rng(seed), B, N, D)
    tokens = make_tokens(x, valid=valid, position=position)
    previous = boundary.previous_slots((B, N), valid)
    first = boundary.find_first(tokens, previous)
    place, before = boundary.places(first, valid), boundary.at_previous(tokens.x, previous)
    for b in range(B):
        last, count = -1, 0
        for t in range(N):
            assert previous[b, t] == last
            close(before[b, t], 0 * tokens.x[b, t] if last < 0 else tokens.x[b, last])
            if not valid[b, t]:
                assert not first[b, t]
                continue
            begins = last < 0 or document[b, t] != document[b, last]
            assert first[b, t] == begins
            count = 0 if begins else count + 1
            assert place[b, t] == count
            last = t


def test_a_sequence_without_padding_or_documents():
    previous = boundary.previous_slots((1, 4))
    np.testing.assert_array_equal(previous, [[-1, 0, 1, 2]])
    tokens = make_tokens(jnp.ones((1, 4, 2)), position=jnp.ones((1, 4, 1)))
    first = boundary.find_first(tokens, previous)
    np.testing.assert_array_equal(first, [[True, False, False, False]])
    np.testing.assert_array_equal(boundary.places(first), [[0, 1, 2, 3]])


@given(seed=seeds)
@few
def test_segments(seed: int):
    starts = drawn(seed)[0]
    limits = jnp.array([0, 2, 4])
    fits, overflow = boundary.limit_starts(starts, limits)
    map_, slots = boundary.keep_starts(starts, K), boundary.start_slots(starts, N + 2)
    for b in range(B):
        where = np.flatnonzero(starts[b])
        np.testing.assert_array_equal(np.flatnonzero(fits[b]), where[: limits[b]])
        assert overflow[b] == max(len(where) - int(limits[b]), 0)
        padded = np.concatenate([where, np.full(N + 2 - len(where), N)])
        np.testing.assert_array_equal(slots[b], padded)
        np.testing.assert_array_equal(map_.index[b][map_.valid[b]], where[:K])
        for t in range(N):
            assert boundary.segments(starts)[b, t] == (where <= t).sum() - 1
            assert boundary.latest(starts)[b, t] == max(where[where <= t], default=-1)
    np.testing.assert_array_equal(boundary.limit_starts(starts, 2)[0].sum(-1).max() <= 2, True)


@given(seed=seeds)
@few
def test_moving_average(seed: int):
    fresh = drawn(seed)[0]
    weight = jnp.asarray(np.random.default_rng(seed).random((B, N)), jnp.float32)
    x = normal(np.random.default_rng(seed), B, N, D)
    found = boundary.moving_average(x, weight, fresh)
    plain = boundary.moving_average(x, weight)
    for b in range(B):
        y, z = np.zeros(D), np.zeros(D)
        for t in range(N):
            w = float(weight[b, t])
            y = w * x[b, t] + (0 if fresh[b, t] else (1 - w) * y)
            z = w * x[b, t] + (1 - w) * z
            close(found[b, t], y)
            close(plain[b, t], z)


def test_chance_of_a_boundary():
    query = jnp.array([[[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 3.0]]])
    key = jnp.array([[[1.0, 0.0], [5.0, 0.0], [-1.0, 0.0], [1.0, 1.0]]])
    previous = jnp.array([[-1, 0, 1, 0]])
    chance = boundary.boundary_chance(query, key, previous, previous < 0)
    close(chance, [[1.0, 0.0, 1.0, (1 - 0.5**0.5) / 2]])
    total = lambda query: boundary.boundary_chance(query, key, previous, previous < 0).sum()  # noqa: E731
    assert jnp.isfinite(jax.grad(total)(query)).all()


def test_ratio_loss():
    """Lowest at the ratio asked for, where it is 1; padding does not count."""
    starts = jnp.arange(12)[None] % 4 == 0
    valid = jnp.arange(12)[None] < 8
    close(boundary.ratio_loss(starts, starts.astype(float), 4.0), 1.0)
    loss = lambda share: boundary.ratio_loss(starts, jnp.full((1, 12), share), 4.0)  # noqa: E731
    close(loss(0.25), 1.0)
    assert abs(jax.grad(loss)(0.3)) < 1e-6  # flat where the share of starts is right
    many = lambda share: boundary.ratio_loss(~starts, jnp.full((1, 12), share), 4.0)  # noqa: E731
    assert jax.grad(many)(0.3) > 0
    odd = jnp.where(valid, 0.25, 0.9)
    close(boundary.ratio_loss(starts, odd, 4.0, valid), 1.0)
    assert jnp.isfinite(boundary.ratio_loss(starts, odd, 4.0, jnp.zeros((1, 12), bool)))
    with pytest.raises(ValueError, match=r"length=1\.0 must be above 1"):
        boundary.ratio_loss(starts, odd, 1.0)


def test_gates():
    chance = jnp.array([0.2, 0.5, 0.7])
    value, _, told = Boundary().update(chance)
    np.testing.assert_array_equal(told["starts"], [False, False, True])
    np.testing.assert_array_equal(value, jnp.ones(3))
    slope = jax.grad(lambda p: Boundary().update(p)[0].sum())(chance)
    np.testing.assert_array_equal(slope, [-1.0, -1.0, 1.0])
    np.testing.assert_array_equal(one_through(chance), jnp.ones(3))
    logits = jnp.array([-3.0, 1.09, 1.11])  # 0.75 is the sigmoid of 1.0986
    value, _, told = Halting().update(logits)
    np.testing.assert_array_equal(value, [1.0, 1.0, 0.0])
    np.testing.assert_array_equal(told["halted"], [False, False, True])
    assert not jax.grad(lambda a: Halting().update(a)[0].sum())(logits).any()
    assert Boundary().init() is None and Halting().init() is None
