"""BLT: the patcher's rules, and patches that no byte reads before they have ended."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import around
from tests.methods.around import CONFIG, IDS, VALID, B, N, Setting, close, forward
from tests.methods.test_hnet import run_layers
from tokred import boundary
from tokred.methods import make_plan
from tokred.methods.blt import (
    BLT,
    RULES,
    ends_by_entropy,
    ends_by_rank,
    ends_by_space,
    entropies,
)
from tokred.models import ViTConfig
from tokred.tokens import make_tokens

ENTROPY = jax.random.uniform(jax.random.key(5), (B, N), maxval=3.0)
EXTRA = {"entropy": ENTROPY}
MAX = Setting("blt", {"keep": 0.8, "threshold": 1.7}, EXTRA)
MEAN = Setting(
    "blt",
    {"keep": 0.3, "rule": "both", "threshold": 1.0, "pool": "mean", "positions": "renumber"},
    EXTRA,
)
TOP = Setting("blt", {"rule": "top_k", "patch": 3, "keep": 0.5}, EXTRA)
SETTINGS = pytest.mark.parametrize("setting", [MAX, MEAN], ids=["max", "mean, too few slots"])


@pytest.mark.parametrize("setting", [MAX, MEAN, TOP], ids=["max", "mean", "top"])
def test_twins_agree(setting):
    around.check_twins_agree(setting)


@pytest.mark.parametrize("setting", [MAX, MEAN, TOP], ids=["max", "mean", "top"])
def test_padding_changes_nothing(setting):
    around.check_padding(setting)


def rules(entropy, **how) -> list[int]:
    entropy = jnp.asarray(entropy)[None]
    previous = boundary.previous_slots(entropy.shape)
    ends = ends_by_entropy(entropy, previous, boundary.places(previous < 0), **how)
    return np.flatnonzero(ends[0]).tolist()


def test_rules():
    entropy = [0.0, 1.0, 5.0, 2.0, 4.0, 4.5]
    assert rules(entropy, threshold=1.5) == [0, 2, 3, 4, 5]
    assert rules(entropy, rule="monotonic", threshold=1.5) == [0, 1, 2, 4]
    assert rules(entropy, rule="both", threshold=1.5, threshold_add=0.1) == [0, 1, 4, 5]
    assert rules(entropy, rule="both", threshold=1.5, threshold_add=1.0) == [0, 1, 4]
    place = jnp.arange(9)[None]
    rank = ends_by_rank(jnp.array([[9.0, 1, 5, 2, 4, 4.5, 0, 0, 0]]), place, 2)
    assert np.flatnonzero(rank[0]).tolist() == [0, 2, 5]  # 9 // 2 patches
    np.testing.assert_array_equal(ends_by_rank(jnp.ones((1, 9)), place, 9), place == 0)


def test_words():
    text = jnp.array([[*b"ab, c\xc3\xa9 d", -1, ord("x")]])
    previous = boundary.previous_slots(text.shape)
    ends = ends_by_space(text, previous, boundary.places(previous < 0))
    # The first byte, the comma, the byte that opens a two-byte letter, a space, a special id.
    assert np.flatnonzero(ends[0]).tolist() == [0, 2, 5, 7, 9]


def test_entropies():
    close(entropies(jnp.zeros((1, 2, 8))), jnp.full((1, 2), np.log(8)))
    close(entropies(jnp.array([[[0.0, 900.0, 0.0]]])), [[0.0]])


def by_hand(setting, ids, entropy) -> np.ndarray:
    """One sequence, patch by patch."""
    model, places, reduction = setting.model, np.arange(len(ids)), setting.plan.steps[0][1]
    x = np.asarray(run_layers(model, [0], model.embed(ids)[None], places)[0])
    how = {"threshold": reduction.threshold, "threshold_add": reduction.threshold_add}
    ends = rules(entropy, rule=reduction.rule, **how)
    starts = [0, *(t + 1 for t in ends if t + 1 < len(ids))][: reduction.counts(len(ids), 0)]
    stops = [t + 1 for t in ends][: len(starts)]  # the last patch may not have ended
    pool = {"max": np.max, "mean": np.mean}[reduction.pool]
    stop = [*stops, len(ids)][: len(starts)]
    patches = np.stack([pool(x[a:b], axis=0) for a, b in zip(starts, stop, strict=True)])
    where = np.arange(len(starts)) if reduction.positions == "renumber" else starts
    y = np.asarray(run_layers(model, [1, 2], jnp.asarray(patches)[None], where)[0])
    back = np.stack([x[t] + y[sum(end <= t + 1 for end in stops) - 1] for t in places])
    x = run_layers(model, [3], jnp.asarray(back)[None], places)
    return np.asarray(model.embed.attend(model.norm(x)))[0]


@SETTINGS
def test_forward_by_hand(setting):
    logits, report = setting.run()
    for b in range(B):
        length = int(VALID[b].sum())
        wanted = by_hand(setting, IDS[b, :length], ENTROPY[b, :length])
        close(logits[b, :length], wanted, rtol=1e-3, atol=1e-4)
    assert np.asarray(report.aux["around_1_2"]["overflow"]).any() == (setting is MEAN)


@pytest.mark.parametrize("twin", ["packed", "soft"])
@SETTINGS
def test_no_byte_knows_a_later_one(setting, twin):
    plan = setting.plan.with_twin(twin)
    logits, _ = forward(setting.model, IDS, plan=plan, extra=EXTRA)
    for t in range(0, N - 1, 3):
        later = jnp.arange(N)[None] > t
        ids, entropy = jnp.where(later, (IDS + 3) % 31, IDS), jnp.where(later, 1.8, ENTROPY)
        changed, _ = forward(setting.model, ids, plan=plan, extra={"entropy": entropy})
        np.testing.assert_array_equal(changed[:, : t + 1], logits[:, : t + 1])
        assert (changed[:, t + 1 :] != logits[:, t + 1 :]).any()


@functools.partial(jax.jit, static_argnames="plan")
def with_documents(model, ids, entropy, *, plan):
    place = jnp.broadcast_to(jnp.arange(N) % 9, ids.shape)
    document = jnp.broadcast_to(jnp.arange(N) // 9, ids.shape)
    how = {"position": place, "document": document, "extra": {"entropy": entropy}}
    return model(ids, plan=plan, **how)[0]


def test_documents_do_not_see_each_other():
    logits = with_documents(MAX.model, IDS, ENTROPY, plan=MAX.plan)
    alone, _ = forward(MAX.model, IDS[:, 9:18], plan=MAX.plan, extra={"entropy": ENTROPY[:, 9:18]})
    close(logits[:, 9:18], alone)
    first = jnp.arange(N)[None] < 9
    other = jnp.where(first, (IDS + 3) % 31, IDS)
    close(with_documents(MAX.model, other, ENTROPY, plan=MAX.plan)[:, 9:], logits[:, 9:])


def test_patches_without_a_slot_are_nobodys():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2))
    tokens = make_tokens(x, extra={"entropy": jnp.full((1, 6), 9.0)})
    reduced, map_, _, aux = BLT(0.5)(tokens, {})
    np.testing.assert_array_equal(map_.source, [[0, 1, 2, -1, -1, -1]])
    np.testing.assert_array_equal(aux["overflow"], [3])
    back = aux["combine"].put_back(x, reduced.x, 10 * reduced.x, map_)
    reads = jnp.array([0, 1, 2, 2, 2, 2])
    close(back, x + 10 * x[:, reads])


def test_words_are_read_from_bytes():
    byte = jnp.array([[*b"to be or not"]])
    tokens = make_tokens(jnp.ones((1, 12, 2)), extra={"byte": byte})
    _, map_, _, aux = BLT(1.0, rule="space")(tokens, {})
    assert np.flatnonzero(aux["entered"][0]).tolist() == [0, 1, 3, 6, 9]
    np.testing.assert_array_equal(map_.sizes()[0, :6], [1, 2, 3, 3, 3, 0])


def test_a_cache_is_refused():
    cache = MAX.model.make_cache(B, N, plan=MAX.plan)
    with pytest.raises(ValueError, match=r"BLT at around_1_2 .*decode by full passes"):
        MAX.model.extend(IDS, cache, plan=MAX.plan, extra=EXTRA)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rule": "entropy"}, "rule='entropy' must be one of"),
        ({"pool": "sum"}, "pool='sum' must be one of"),
        ({"patch": 0}, "patch=0 must be at least one byte"),
        ({"positions": "none"}, "positions='none' must be one of"),
        ({"span": (3, 1)}, "until=1 must be a layer from layer=3"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        make_plan("blt", CONFIG.layout, **options)


def test_bad_input():
    tokens = make_tokens(jnp.ones((1, 3, 2)))
    for rule in RULES:
        name = "byte" if rule == "space" else "entropy"
        with pytest.raises(ValueError, match=f"blt: needs the per-token array '{name}'"):
            BLT(0.5, rule)(tokens, {})
    with pytest.raises(ValueError, match="blt: cuts a sequence"):
        make_plan("blt", ViTConfig().layout)
