"""Zero-TPrune, which has no official code: PageRank, head filter, stages by hand, schedule."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred import cost
from tokred.methods import make_plan
from tokred.methods.zero_tprune import KEYS, PROBS, ZeroTPrune, walk_lengths
from tokred.models import ViTConfig, vit_config
from tokred.score import rms_of_telling_heads, score_by_pagerank
from tokred.tokens import make_tokens

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
LAYOUT = ViTConfig(image_size=(12, 20), patch=(4, 4), width=16, depth=4, heads=2).layout
B, H, N = 2, 3, 11
ATTN = jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (B, H, N, N)))
METRIC = jax.random.normal(jax.random.key(1), (B, N, 4))


@functools.partial(jax.jit, static_argnums=0)
def prune(reduction, metric=METRIC, attn=ATTN, valid=None):
    tokens = make_tokens(metric, prefix=1, valid=valid)
    return reduction(tokens, {PROBS.name: attn, KEYS.name: metric})[1]


def test_rank_flows_to_what_is_attended():
    hub = jnp.zeros((1, 1, 4, 4)).at[..., 2].set(1.0)
    close(score_by_pagerank(hub, 1), [[[0, 0, 1, 0]]])
    chain = jnp.roll(jnp.eye(4), 1, axis=1)[None, None]  # each attends to the next
    start = score_by_pagerank(chain.at[..., 0, :].set(jnp.array([0, 0, 0, 1.0])), 1)
    close(start, [[[0.25, 0, 0.25, 0.5]]])


def test_rank_sums_to_one_and_follows_a_permutation():
    ranks = score_by_pagerank(ATTN, 40)
    close(ranks.sum(-1), np.ones((B, H)))
    values, vectors = np.linalg.eig(np.asarray(ATTN[0, 0]).T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    close(ranks[0, 0], stationary / stationary.sum())
    close(score_by_pagerank(jnp.full((1, 1, N, N), 1 / N), 5), np.full((1, 1, N), 1 / N))
    order = np.random.default_rng(0).permutation(N)
    close(
        score_by_pagerank(ATTN[..., order, :][..., order], 7),
        score_by_pagerank(ATTN, 7)[..., order],
    )


def test_rank_knows_no_padding():
    """Absent tokens attend as they like."""
    valid = jnp.broadcast_to(jnp.arange(N) < 8, (B, N))
    seen = jnp.where(valid[:, None, None, :], ATTN, 0.0)
    seen = seen / seen.sum(-1, keepdims=True)
    ranks = score_by_pagerank(seen, 6, valid)
    close(ranks[..., :8], score_by_pagerank(seen[..., :8, :8], 6))
    assert not np.asarray(ranks[..., 8:]).any()
    joined = rms_of_telling_heads(ranks, 0.01, 0.7, valid)
    close(joined[:, :8], rms_of_telling_heads(ranks[..., :8], 0.01, 0.7))


def test_heads_that_tell_nothing_or_one_token_are_left_out():
    flat, some, spike = np.full(8, 1.0), np.array([0.5, 1.5] * 4), np.eye(8)[0] * 7 + 1 / 8
    ranks = jnp.asarray(np.stack([flat, some, spike]) / 8, jnp.float32)[None]
    close(rms_of_telling_heads(ranks, 0.01, 0.7), some[None] / 8)
    everyone = np.sqrt((np.stack([flat, spike]) ** 2).mean(0)) / 8
    close(rms_of_telling_heads(ranks[:, ::2], 0.01, 0.7), everyone[None])  # none passes
    both = np.sqrt((np.stack([flat, some]) ** 2).mean(0)) / 8
    close(rms_of_telling_heads(ranks, 0.0, 0.7), both[None])


def by_hand(metric, attn, r: ZeroTPrune) -> list[int]:
    """Who stays of one example, in any order."""
    ranks = np.full((H, N), 1 / N)
    for _ in range(r.iterations):
        ranks = np.einsum("hnm,hn->hm", attn, ranks)
    spread = (N * ranks).var(-1)
    telling = ranks[(spread >= r.low) & (spread <= r.high)]
    importance = np.sqrt((telling**2).mean(0))
    order = sorted(range(1, N), key=lambda i: -importance[i])
    half = len(order) // 2
    less, more = {
        "less": (order[half:], order[:half]),
        "more": (order[:half], order[half:]),
        "alternate": (order[1::2], order[::2]),
    }[r.split]
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    likeness = {i: max(unit[i] @ unit[j] for j in more) for i in less}
    gone = sorted(less, key=lambda i: -likeness[i])[: r.similar]
    rest = [i for i in order if i not in gone]
    return [0, *sorted(rest[: r.k])]


@pytest.mark.parametrize("split", ["less", "more", "alternate"])
def test_by_hand(split):
    reduction = ZeroTPrune(4, 3, iterations=5, low=0.0, high=9.0, split=split)
    map_ = prune(reduction)
    for b in range(B):
        expected = by_hand(np.asarray(METRIC[b]), np.asarray(ATTN[b]), reduction)
        assert sorted(map_.index[b].tolist()) == expected and map_.index[b, 0] == 0


def test_likeness_goes_before_importance():
    """A copy of an important token leaves, though others matter less."""
    given = jnp.array([0.2, 0.2, 0.15, 0.1, 0.09, 0.08, 0.07, 0.05, 0.04, 0.02, 0.0])
    attn = jnp.broadcast_to(given, (B, H, N, N))
    metric = METRIC.at[:, 6].set(2 * METRIC[:, 1])  # ranks 6th of ten, behind the better half
    all_heads: dict[str, Any] = {"low": 0.0, "high": 9.0}
    stay = prune(ZeroTPrune(8, 1, **all_heads), metric, attn).index
    assert [sorted(row) for row in stay.tolist()] == [[0, 1, 2, 3, 4, 5, 7, 8, 9]] * B
    stay = prune(ZeroTPrune(8, 0, **all_heads), metric, attn).index
    assert [sorted(row) for row in stay.tolist()] == [list(range(9))] * B


def test_halves_are_of_the_tokens_that_are_there():
    valid = jnp.broadcast_to(jnp.arange(N) < 7, (B, N))
    seen = jnp.where(valid[:, None, None, :], ATTN, 0.0)
    seen = seen / seen.sum(-1, keepdims=True)
    for split in ("less", "more"):
        reduction = ZeroTPrune(3, 2, split=split)
        padded = prune(reduction, METRIC.at[:, 7:].set(METRIC[:, 1:5]), seen, valid)
        short = prune(reduction, METRIC[:, :7], seen[..., :7, :7])
        np.testing.assert_array_equal(padded.index, short.index)
        assert padded.valid.all()


def test_schedule():
    """Blocks 1, 3, 5, 7, 9 of 12, a third of the MACs of DeiT-S less."""
    config = vit_config("vit_s16")
    plan = make_plan("zero_tprune", config.layout)
    assert [site.layer for site, _ in plan.steps] == [1, 3, 5, 7, 9]
    walks = [r.iterations for _, r in plan.steps if isinstance(r, ZeroTPrune)]
    assert walks == [40, 8, 8, 8, 1] and walk_lengths(12) == (40,) * 3 + (8,) * 6 + (1,) * 3
    assert cost.macs(config, plan) / cost.macs(config) == pytest.approx(1 - 0.347, abs=0.01)


def test_no_more_leave_by_likeness_than_half():
    plan = make_plan("zero_tprune", LAYOUT, keep=0.2, similar=1.0, layers=(1,))
    metric = jax.random.normal(jax.random.key(3), (1, 16, 4))
    map_ = prune(plan.steps[0][1], metric, jnp.full((1, 2, 16, 16), 1 / 16))
    assert map_.k == 4 and len(set(map_.index[0].tolist())) == 4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": "random"}, "split='random' must be one of"),
        ({"similar": 1.5}, r"similar=1\.5 must lie in \[0, 1\]"),
        ({"layers": (7,)}, "lies outside a model of 4 layers"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        make_plan("zero_tprune", LAYOUT, **options)
