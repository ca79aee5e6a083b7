"""Selections against plain references; nothing may depend on padding; the prefix stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.algebra.random_maps import normal
from tokred import select
from tokred.maps import Assign
from tokred.score import cosine, mask_scores, score_by_chance, score_by_norm
from tokred.tokens import make_tokens, move

B, N, PAD, E, PREFIX = 2, 9, 4, 3, 1
seeds = st.integers(0, 2**31)
few = settings(max_examples=6)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

POINTS = (0.06, 0.21, 0.37, 0.58, 0.83, 0.94)


def shares_of(scores, valid):
    return select.as_shares(scores, prefix=PREFIX, valid=valid)


def both_ways(x, r, back, valid):
    """`r` even tokens merge into odd ones, then `back` odd ones into even ones."""
    a, b = select.alternate(x.shape[1], PREFIX)
    how = {"front": range(PREFIX), "back": back, "ordered": True, "valid": valid}
    return select.match_sets(cosine(x[:, a], x[:, b]), a, b, r, x.shape[1], **how)


# Each takes features [B N E], scores [B N] in [0, 1) and valid.
SELECTIONS = {
    "keep_top_k": lambda x, s, valid: select.keep_top_k(s, 4, prefix=PREFIX, valid=valid),
    "keep_in_place": lambda x, s, valid: select.keep_top_k(
        s, 4, prefix=PREFIX, valid=valid, order="position"
    ),
    "keep_above": lambda x, s, valid: select.keep_above(s, 0.4, 5, prefix=PREFIX, valid=valid)[0],
    "rank_tokens": lambda x, s, valid: select.rank_tokens(s, prefix=PREFIX, valid=valid),
    "keep_quantiles": lambda x, s, valid: select.keep_quantiles(
        shares_of(s, valid), POINTS, 4, prefix=PREFIX, valid=valid
    )[0],
    "keep_quantiles_in_place": lambda x, s, valid: select.keep_quantiles(
        shares_of(s, valid), POINTS, 4, prefix=PREFIX, valid=valid, ascending=False
    )[0],
    "match_bipartite": lambda x, s, valid: select.match_bipartite(x, 3, prefix=PREFIX, valid=valid),
    "match_both_ways": lambda x, s, valid: both_ways(x, 3, 2, valid),
    "keep_representatives": lambda x, s, valid: select.keep_representatives(
        both_ways(x, 2, 2, valid)
    ),
    "match_kth": lambda x, s, valid: select.match_kth(x, 4, prefix=PREFIX, valid=valid),
    "match_random": lambda x, s, valid: select.match_random(x, 3, s, prefix=PREFIX, valid=valid),
    "merge_to_nearest": lambda x, s, valid: select.merge_to_nearest(
        x, 5, prefix=PREFIX, valid=valid
    )[0],
    "cluster_by_density": lambda x, s, valid: select.cluster_by_density(
        x, 3, neighbours=2, prefix=PREFIX, valid=valid
    ),
    "cluster_medoids": lambda x, s, valid: select.cluster_medoids(
        x, 3, s, prefix=PREFIX, valid=valid
    ),
    "cluster_alike": lambda x, s, valid: select.cluster_medoids(x, 3, prefix=PREFIX, valid=valid),
    "pool_cells": lambda x, s, valid: select.pool_cells(
        (x.shape[1] - PREFIX, 1), ((x.shape[1] - PREFIX) // 4, 1), (B,), prefix=PREFIX, valid=valid
    ),
}
MERGES = (
    "match_bipartite", "match_both_ways", "match_kth", "match_random", "merge_to_nearest",
    "cluster_by_density", "cluster_medoids", "cluster_alike", "pool_cells",
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def run(name, x, scores, valid):
    map_ = SELECTIONS[name](x, scores, valid)
    position = jnp.broadcast_to(
        jnp.arange(x.shape[1], dtype=jnp.float32)[:, None], (*x.shape[:2], 1)
    )
    return map_, map_.apply(x), move(make_tokens(x, valid=valid, position=position), map_)


def inputs(seed):
    rng = np.random.default_rng(seed)
    return rng, normal(rng, B, N, E), jnp.asarray(rng.random((B, N)), jnp.float32)


@pytest.mark.parametrize("name", SELECTIONS)
@given(seed=seeds)
@few
def test_appended_padding_changes_nothing(name, seed):
    rng, x, scores = inputs(seed)
    garbage = jnp.asarray(rng.choice([np.nan, np.inf, 9.0], (B, PAD, E)), jnp.float32)
    padded = jnp.concatenate([x, garbage], 1)
    noise = jnp.concatenate([scores, garbage[..., 0]], 1)
    valid = jnp.broadcast_to(jnp.arange(N + PAD) < N, (B, N + PAD))
    _, rows, short = run(name, x, scores, None)
    map_, padded_rows, long = run(name, padded, noise, valid)
    np.testing.assert_array_equal(long.valid, map_.valid)
    for b in range(B):
        alive = np.asarray(long.valid[b])
        own = slice(None) if short.valid is None else np.asarray(short.valid[b])
        close(padded_rows[b][alive], rows[b][own])
        close(long.x[b][alive], short.x[b][own])
        close(long.sizes()[b][alive], short.sizes()[b][own])
        close(long.position[b][alive], short.position[b][own])
        assert (np.asarray(long.position[b])[~alive] == -1).all()
    assert (np.asarray(long.source)[:, N:] == -1).all()
    assert np.isfinite(long.x).all()


@pytest.mark.parametrize("name", SELECTIONS)
@given(seed=seeds)
@few
def test_what_is_absent_does_not_matter(name, seed):
    rng, x, scores = inputs(seed)
    valid = jnp.asarray(rng.random((B, N)) < 0.6).at[:, 0].set(True).at[0, 1:].set(seed % 2 == 0)
    wild = jnp.where(valid[..., None], x, jnp.nan)
    map_, rows, tokens = run(name, x, scores, valid)
    other, wild_rows, wild_tokens = run(name, wild, jnp.where(valid, scores, jnp.nan), valid)
    np.testing.assert_array_equal(map_.valid, other.valid)
    np.testing.assert_array_equal(map_.source, other.source)
    close(rows, wild_rows)
    close(tokens.x, wild_tokens.x)
    if name in MERGES and name != "match_kth":
        close(tokens.size.sum(-1), valid.sum(-1))


@pytest.mark.parametrize("name", SELECTIONS)
@given(seed=seeds)
@few
def test_the_prefix_stays_in_front(name, seed):
    _, x, scores = inputs(seed)
    map_, rows, tokens = run(name, x, scores, None)
    np.testing.assert_array_equal(rows[:, :PREFIX], x[:, :PREFIX])
    assert (np.asarray(map_.source)[:, :PREFIX] == np.arange(PREFIX)).all()
    if isinstance(map_, Assign):
        assert (np.asarray(tokens.size)[:, :PREFIX] == 1).all()
        close(tokens.size.sum(-1), np.full(B, N))


@pytest.mark.parametrize("name", MERGES)
def test_who_joins_is_who_does_not_stand_for_a_group(name):
    map_ = run(name, *inputs(0)[1:], None)[0]
    if map_.joining is None:
        assert name.startswith(("cluster", "pool"))
        return
    for target, index, joining in zip(map_.target, map_.index, map_.joining, strict=True):
        assert target[index].tolist() == list(range(map_.k))
        members = np.flatnonzero(np.asarray(target) < map_.k)
        assert sorted([*index.tolist(), *joining.tolist()]) == members.tolist()


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_choice_has_no_gradient_and_what_moves_has(name):
    _, x, scores = inputs(0)

    def loss(metric, moved):
        return SELECTIONS[name](metric, scores, None).apply(moved).sum()

    metric, moved = jax.jit(jax.grad(loss, (0, 1)))(x, x)
    assert not np.asarray(metric).any()
    assert np.asarray(moved).any() and np.isfinite(moved).all()


@pytest.mark.parametrize("valid", [False, True])
@given(seed=seeds)
@few
def test_top_k_is_a_stable_sort(valid, seed):
    rng = np.random.default_rng(seed)
    scores = rng.choice([np.nan, -np.inf, np.inf, -1.0, 0.0, 2.0], (B, N))
    alive = rng.random((B, N)) < 0.6
    map_ = top_three(jnp.asarray(scores, jnp.float32), jnp.asarray(alive) if valid else None)
    for b in range(B):
        level = np.where(np.isnan(scores[b]), -np.inf, scores[b])
        absent = ~alive[b] if valid else np.zeros(N, bool)
        wanted = np.lexsort((np.where(absent, 0, -level), absent))[:3]
        np.testing.assert_array_equal(map_.index[b], wanted)
        if valid:
            np.testing.assert_array_equal(map_.valid[b], alive[b][wanted])


top_three = jax.jit(lambda scores, valid: select.keep_top_k(scores, 3, valid=valid))


def test_order_by_position_and_static_choice():
    scores = jnp.array([[0.0, 1.0, 3.0, 2.0]])
    assert select.keep_top_k(scores, 2, prefix=1).index.tolist() == [[0, 2, 3]]
    assert select.keep_top_k(scores, 2, order="position").index.tolist() == [[2, 3]]
    assert select.rank_tokens(scores).index.tolist() == [[2, 3, 1, 0]]
    assert select.keep_static([3, 1], 4, (2,), prefix=1).index.tolist() == [[0, 3, 1]] * 2


def test_a_threshold_counts_what_did_not_fit():
    scores = jnp.array([[0.0, 1.0, 3.0, 2.0], [0.0, 0.1, 0.2, 0.1]])
    map_, overflow = select.keep_above(scores, 0.5, 2, prefix=1)
    assert map_.index.tolist() == [[0, 2, 3], [0, 2, 1]]
    assert map_.valid.tolist() == [[True, True, True], [True, True, False]]
    assert overflow.tolist() == [1, 0]


@given(seed=seeds)
@few
def test_bipartite_merges_the_most_similar_pairs(seed):
    _, x, scores = inputs(seed)
    map_, _, _ = run("match_bipartite", x, scores, None)
    similar = np.asarray(cosine(x[:, 2::2], x[:, 1::2]))  # even tokens but the prefix, odd tokens
    for b in range(B):
        merged = np.argsort(-similar[b].max(-1), kind="stable")[:3]
        stay = [0] + [2 + 2 * i for i in range(4) if i not in merged] + [1, 3, 5, 7]
        target = np.zeros(N, int)
        target[stay] = np.arange(6)
        for i in merged:
            target[2 + 2 * i] = target[1 + 2 * similar[b, i].argmax()]
        np.testing.assert_array_equal(map_.target[b], target)


@given(seed=seeds)
@few
def test_matching_back_takes_along_what_was_merged(seed):
    _, x, scores = inputs(seed)
    map_, _, _ = run("match_both_ways", x, scores, None)
    similar = np.asarray(cosine(x[:, 2::2], x[:, 1::2]))
    for b in range(B):
        into = {}
        leave = np.argsort(-similar[b].max(-1), kind="stable")[:3]
        left = sorted(set(range(4)) - set(leave))
        back = similar[b][left].T  # [odd, even that are left]
        order = np.argsort(-back.max(-1), kind="stable")
        into |= {1 + 2 * j: 2 + 2 * left[back[j].argmax()] for j in order[:2]}
        into |= {2 + 2 * i: 1 + 2 * similar[b, i].argmax() for i in leave}
        stay = [0, *(2 + 2 * i for i in left), *(1 + 2 * j for j in order[2:])]
        for token in range(N):
            end = token
            while end in into:
                end = into[end]
            assert map_.target[b, token] == stay.index(end)
        np.testing.assert_array_equal(map_.index[b], stay)


def test_representatives_drop_what_would_merge():
    _, x, _ = inputs(3)
    valid = jnp.arange(N)[None] < jnp.array([[N], [4]])
    map_ = both_ways(x, 2, 2, valid)
    kept = select.keep_representatives(map_)
    np.testing.assert_array_equal(kept.index, map_.index)
    np.testing.assert_array_equal(kept.valid, jnp.take_along_axis(valid, map_.index, 1))


def test_nothing_merged_is_a_permutation():
    _, x, scores = inputs(1)
    for map_ in (
        select.match_bipartite(x, 0, prefix=1),
        select.match_random(x, 0, scores, prefix=1),
        select.match_kth(x, 1, prefix=1),
    ):
        assert sorted(map_.target[0].tolist()) == list(range(N))


def test_trailing_tokens_of_kth_vanish():
    _, x, _ = inputs(2)
    map_ = select.match_kth(x, 3, prefix=1)  # 8 tokens: two threes
    assert map_.k == 3
    assert map_.source[0, -2:].tolist() == [-1, -1]


def test_cells_of_a_grid():
    cell, centre = select.grid_cells((3, 4), (2, 2))
    assert cell.reshape(3, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]]
    assert centre.tolist() == [0, 2, 8, 10]
    pooled = select.pool_cells((3, 4), (2, 2), (1,)).apply(jnp.arange(12.0)[None])
    assert pooled.tolist() == [[2.5, 4.5, 8.5, 10.5]]


def test_similarity_tells_who_joins():
    x = jnp.array([[[1.0, 0], [0, 1.0], [0.1, 2], [3, 0]]])
    map_, best = select.merge_to_nearest(x, 2)
    assert map_.target.tolist() == [[0, 1, 1, 0]]
    close(best, [[1, 1, 2 / 4.01**0.5, 1]])


def test_scores():
    masked = mask_scores(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, True, False]))
    assert masked.tolist() == [1.0, float(jnp.finfo(jnp.float32).min), -jnp.inf]
    assert score_by_norm(jnp.array([[3.0, 4.0]])).tolist() == [5.0]
    key = jax.random.key(0)
    short, long = score_by_chance(key, (2, 5)), score_by_chance(key, (2, 9))
    np.testing.assert_array_equal(short, long[:, :5])
    assert score_by_chance(key, (4,)).shape == (4,)


def bad_calls():
    scores, x = jnp.zeros((1, 4)), jnp.ones((1, 4, 2))
    return {
        "keep_top_k: k=4 must lie in [1, 3]": lambda: select.keep_top_k(scores, 4, prefix=1),
        "keep_top_k: k=0": lambda: select.keep_top_k(scores, 0),
        "order='size' must be": lambda: select.keep_top_k(scores, 1, order="size"),
        "match_bipartite: r=-1": lambda: select.match_bipartite(x, -1),
        "match_sets: r=3 must lie in [0, 1]": lambda: both_ways(x, 3, 0, None),
        "match_sets: back=3 must lie in [0, 2]": lambda: both_ways(x, 0, 3, None),
        "match_kth: every=0": lambda: select.match_kth(x, 0),
        "match_random: r=4 must lie in [0, 3]": lambda: select.match_random(x, 4, scores),
        "merge_to_nearest: k=1 must lie in [2, 4]": lambda: select.merge_to_nearest(x, 1, prefix=1),
        "cells=(3, 1) must lie within": lambda: select.grid_cells((2, 2), (3, 1)),
    }


@pytest.mark.parametrize("words", list(bad_calls()))
def test_errors_are_one_sentence(words):
    with pytest.raises(ValueError) as error:
        bad_calls()[words]()
    message = str(error.value)
    assert words in message
    assert message.endswith(".") and "\n" not in message and ". " not in message
