"""PiToMe: energies, the three splits and both kernels by hand, schedules."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred.methods import make_plan
from tokred.methods.pitome import PiToMe, merged_share
from tokred.methods.tome import KEYS
from tokred.models import ViTConfig, vit_config
from tokred.tokens import make_tokens

LAYOUT = ViTConfig(image_size=(12, 20), patch=(4, 4), width=16, depth=4, heads=2).layout
B, N, PREFIX = 2, 12, 1
METRIC = jax.random.normal(jax.random.key(0), (B, N, 5))


@functools.partial(jax.jit, static_argnums=0)
def merge(reduction, metric=METRIC, valid=None):
    tokens = make_tokens(metric, prefix=PREFIX, valid=valid)
    return reduction(tokens, {KEYS.name: metric})[:2]


def by_hand(metric: np.ndarray, r: int, reduction: PiToMe) -> list[set[int]]:
    """The groups of one example, in the order of the output."""
    unit = metric[PREFIX:] / np.linalg.norm(metric[PREFIX:], axis=-1, keepdims=True)
    similar = unit @ unit.T
    if reduction.kernel == "elu":
        above = similar - reduction.margin
        near = np.where(above > 0, above, reduction.alpha * np.expm1(above))
    else:
        near = np.exp(-(((1 - similar) / (1 - reduction.margin)) ** 2) / 2)
    order = list(np.argsort(-near.mean(-1), kind="stable"))
    some, rest = order[: 2 * r], order[2 * r :]
    a, b = {
        "alternate": (some[::2], some[1::2]),
        "halves": (some[:r], some[r:]),
        "closest": (order[::2], order[1::2]),
    }[reduction.split]
    best = {i: max(b, key=lambda j: similar[i, j]) for i in a}
    ranked = sorted(a, key=lambda i: -similar[i, best[i]])
    leave = ranked[:r]
    rest = ranked[r:] if reduction.split == "closest" else rest
    groups = [{i + PREFIX} for i in (*rest, *b)]
    for i in leave:
        next(g for g in groups if best[i] + PREFIX in g).add(i + PREFIX)
    return [set(range(PREFIX)), *groups]


@pytest.mark.parametrize("split", ["alternate", "halves", "closest"])
@pytest.mark.parametrize("kernel", ["elu", "gaussian"])
def test_by_hand(split, kernel):
    reduction = PiToMe(4, margin=0.3, alpha=0.5, split=split, kernel=kernel)
    _, map_ = merge(reduction)
    for b in range(B):
        groups = by_hand(np.asarray(METRIC[b]), 4, reduction)
        found = [set(np.flatnonzero(np.asarray(map_.target[b]) == k)) for k in range(N - 4)]
        assert found == groups


def test_clusters_merge_and_isolated_tokens_stay():
    """Five tokens alike, four alike, two alone, in any order."""
    axis = jnp.array([0, 3, 0, 1, 2, 0, 1, 0, 1, 1, 0, 0])  # of the class token, too
    metric = jnp.eye(4, 5)[axis[None]] + 0.05 * METRIC[:1]
    _, map_ = merge(PiToMe(4, margin=0.5), metric)
    members = [np.flatnonzero(np.asarray(map_.target[0]) == k) for k in range(map_.k)]
    assert all(len(set(np.asarray(axis)[group].tolist())) == 1 for group in members)
    alone = [group.tolist() for group in members if len(group) == 1]
    assert [1] in alone and [4] in alone and [0] in alone


def test_energy_knows_no_padding():
    short, _ = merge(PiToMe(3))
    valid = jnp.arange(N + 9)[None] < N
    garbage = jnp.broadcast_to(METRIC[:, 1:2], (B, 9, 5))  # the same token nine times
    metric = jnp.concatenate([METRIC, garbage], 1)
    padded, _ = merge(PiToMe(3), metric, jnp.broadcast_to(valid, (B, N + 9)))
    for b in range(B):
        here = np.asarray(padded.valid[b])
        np.testing.assert_allclose(padded.x[b][here], short.x[b], rtol=1e-5, atol=1e-6)


def test_counts():
    """Pairs need 2r tokens; the closest of all need one that stays."""
    assert [PiToMe(9).counts(n, 1) for n in (20, 18, 12)] == [11, 10, 7]
    assert [PiToMe(9, split="closest").counts(n, 1) for n in (20, 12, 2)] == [11, 6, 2]
    assert merged_share(196, 0.9) == math.floor(196 - 196 * 0.9) == 19
    assert merged_share(10, 1.0) == 0


def test_schedule_of_the_official_code():
    layout = vit_config("vit_s16").layout
    plan = make_plan("pitome", layout, ratio=0.9)
    steps = [r for _, r in plan.steps if isinstance(r, PiToMe)]
    margins = [r.margin for r in steps]
    np.testing.assert_allclose(margins, [0.75 - 0.75 * i / 12 for i in range(12)])
    assert [r.split for r in steps] == ["closest"] * 6 + ["alternate"] * 6
    n = 196
    for row in plan.counts(layout):
        n -= math.floor(n - n * 0.9)
        assert row.out == n + 1


def test_attention_counts_sizes_unless_told_not_to():
    for proportional in (True, False):
        plan = make_plan("pitome", LAYOUT, proportional=proportional)
        tokens, _ = merge(plan.steps[0][1])
        assert tokens.proportional == proportional
        np.testing.assert_allclose(tokens.sizes().sum(-1), N)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"splits": ["even"] * 4}, "split='even' must be one of"),
        ({"splits": ["closest"]}, r"splits=\['closest'\] must name one for each of 4 layers"),
        ({"kernel": "cosine"}, "kernel='cosine' must be one of"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        make_plan("pitome", LAYOUT, **options)
