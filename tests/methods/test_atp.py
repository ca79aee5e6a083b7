"""ATP: scores by hand, gates that multiply, the packed form, losses, decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import around
from tests.methods.around import (
    CONFIG,
    GENERATED,
    IDS,
    LENGTHS,
    VALID,
    B,
    N,
    Setting,
    close,
    extend,
    forward,
)
from tokred import cost
from tokred.evidence import Seen, provide
from tokred.methods import make_plan
from tokred.methods.atp import ATP, CROSS, QKV, default_layers, self_scores, spatial_scores
from tokred.plan import Plan
from tokred.tokens import make_tokens

SLOT = jnp.broadcast_to(jnp.arange(N)[None], (B, N))
VISION = (SLOT >= 1) & (SLOT < 7)
TEXT = VALID & ~VISION & (GENERATED < 0)
EXTRA = {"vision": VISION, "text": TEXT}
OPTIONS = {"targets": 6, "layers": (1, 2), "grid": (2, 3), "rates": (1 / 4,)}
ROOMY = Setting("atp", {"room": 4.0, **OPTIONS}, EXTRA, spread=0.1)
TIGHT = Setting("atp", {"shares": (1 / 3, 1 / 6), **OPTIONS}, EXTRA, spread=0.1)
SHARP = Setting("atp", {"sharpness": 1e5, "room": 4.0, **OPTIONS}, EXTRA, spread=0.1)
STANDARD = Setting("atp", {"standardise": True, "room": 4.0, **OPTIONS}, EXTRA, spread=0.1)
REST = np.asarray(VALID & ~VISION)


def kept_by(report: Any) -> list[np.ndarray]:
    """Vision tokens that are there behind each module."""
    return [np.asarray(report.sources[layer] >= 0) & np.asarray(VISION) for layer in (2, 3)]


@jax.jit
def by_hand(model, valid, bias):
    """Logits with these keys hidden and biased, by layer."""
    place = jnp.broadcast_to(1.0 * jnp.arange(N), IDS.shape)[..., None]
    x = model.embed(IDS)
    for layer, block in enumerate(model.blocks):
        tokens = make_tokens(x, position=place)
        keys = tokens.replace(valid=valid[layer], bias=bias[layer])
        q, k, v = block.project(tokens)
        x = x + block.attend(q, k, v, tokens, keys)
        x = x + block.feed(x)
    return model.embed.attend(model.norm(x))


def test_hidden_tokens_are_seen_by_no_later_layer():
    logits, report = ROOMY.run("causal")
    first, second = kept_by(report)
    assert 0 < second.sum() < first.sum() < VISION.sum()
    alive = [VALID, VALID, VALID & (first | ~VISION), VALID & (second | ~VISION)]
    wanted = by_hand(ROOMY.model, alive, [jnp.zeros((B, N))] * 4)
    close(logits[REST], wanted[REST])
    np.testing.assert_array_equal(report.aux["mid_1"]["kept"], first.sum(-1))
    margin = np.asarray(report.aux["mid_1"]["margin"])
    np.testing.assert_array_equal(first, (margin > 0) & np.asarray(VISION))


def test_soft_gates_bias_the_keys_of_later_layers():
    logits, report = ROOMY.run("soft")
    gate = lambda i: jnp.where(  # noqa: E731
        VISION, jax.nn.log_sigmoid(10.0 * report.aux[f"mid_{i}"]["margin"]), 0.0
    )
    none = jnp.zeros((B, N))
    bias = [none, none, gate(1), gate(1) + gate(2)]
    close(logits[VALID], by_hand(ROOMY.model, [VALID] * 4, bias)[VALID])
    close(report.tokens.bias, bias[-1])
    assert report.tokens.n == N and not report.maps


def test_saturated_gates_are_packed():
    soft, report = SHARP.run("soft")
    packed, left = SHARP.run("packed")
    here = np.asarray(left.tokens.sources()) >= 0
    close(report.restore(soft)[here], left.restore(packed)[here])
    for i, alive in zip((1, 2), (VISION, kept_by(left)[0]), strict=True):
        assert (abs(report.aux[f"mid_{i}"]["margin"])[alive] > 1e-3).all()
        close(report.aux[f"mid_{i}"]["kept"], left.aux[f"mid_{i}"]["kept"])


@pytest.mark.parametrize("setting", [ROOMY, STANDARD], ids=["plain", "standardised"])
def test_packed_is_causal_where_all_fit(setting):
    packed, left = setting.run("packed")
    causal, _ = setting.run("causal")
    here = np.asarray(left.tokens.sources()) >= 0
    close(left.restore(packed)[here], causal[here])
    assert not any(left.aux[f"mid_{i}"]["overflow"].any() for i in (1, 2))


def test_overflow_leaves_out_the_lowest_margins():
    _, report = forward(TIGHT.model, IDS, plan=TIGHT.plan, extra=EXTRA)  # padding makes room
    assert [c.out for c in report.counts] == [N, N - 4, N - 5, N - 5]
    aux, (first, second) = report.aux["mid_1"], kept_by(report)
    wants = (np.asarray(aux["margin"]) > 0) & np.asarray(VISION)
    over = np.maximum(wants.sum(-1) - 2, 0)
    np.testing.assert_array_equal(aux["overflow"], over)
    assert over.any() and (report.tokens.sources()[~VISION] >= 0).all()
    for row in np.flatnonzero(over):
        margin = np.asarray(aux["margin"])[row]
        assert margin[first[row]].min() >= margin[wants[row] & ~first[row]].max()
    np.testing.assert_array_equal(report.tokens.position[0, :, 0][report.tokens.valid[0]],
                                  np.flatnonzero(second[0] | ~VISION[0]))  # fmt: skip


def layer(reduction: ATP, twin: str = "soft", **fields: Any):
    x = jax.random.normal(jax.random.key(0), (B, N, 8))
    q, k, v = qkv = 3 * jax.random.normal(jax.random.key(1), (3, B, N, 2, 4))
    tokens = make_tokens(x, valid=VALID, extra={**EXTRA, **fields})
    seen = Seen(
        q, k, v, x, tokens, mask=jnp.broadcast_to(jnp.tril(jnp.ones((N, N), bool)), (B, N, N))
    )
    evidence = {ask.name: provide(ask, seen) for ask in (QKV, CROSS)}
    module = lambda means: 1 / (1 + jnp.exp(-3 * means[..., ::-1]))  # noqa: E731
    out = reduction(tokens, evidence, module=module, twin=twin)
    return out, np.asarray(qkv), np.asarray(provide(dataclasses.replace(CROSS, kind="probs"), seen))


def margins_by_hand(qkv: np.ndarray, probs: np.ndarray, row: int):
    """Of the six vision tokens of an example, as the equations have it."""
    q, k, _ = qkv[:, row]
    tokens, text = range(1, 7), np.flatnonzero(np.asarray(TEXT)[row])
    logit = lambda i, j: np.mean([q[i, h] @ k[j, h] / 2 for h in range(2)])  # noqa: E731
    within = np.array([np.mean([logit(i, j) for j in tokens if j <= i]) for i in tokens])
    across = probs[row].mean(0)[text][:, 1:7].mean(0)
    relevance, spatial = 1 / (1 + np.exp(-3 * across.mean())), 1 / (1 + np.exp(-3 * within.mean()))
    place = np.array([0.25, 0, 0.25, 0, 0, 0])
    return np.maximum((within + across) / 2 - relevance, place - spatial), (relevance, spatial)


def test_margins_are_the_equations():
    (_, _, _, aux), qkv, probs = layer(ATP(1, 6, 6, grid=(2, 3), rates=(1 / 4,)))
    for row in range(B):
        margin, threshold = margins_by_hand(qkv, probs, row)
        close(aux["margin"][row, 1:7], margin)
        close(aux["threshold"][row], threshold)


def test_standardised_relevance():
    (_, _, _, plain), _, _ = layer(ATP(1, 6, 6, rates=()))
    (_, _, _, aux), _, _ = layer(ATP(1, 6, 6, rates=(), standardise=True))
    close(aux["threshold"], plain["threshold"])
    scores = np.asarray(plain["margin"] + plain["threshold"][:, :1])[:, 1:7]
    if (plain["margin"] > -plain["threshold"][:, 1:])[:, 1:7].all():
        unit = (scores - scores.mean(-1, keepdims=True)) / scores.std(-1, keepdims=True)
        wanted = np.maximum(
            1 / (1 + np.exp(-unit)) - plain["threshold"][:, :1], -plain["threshold"][:, 1:]
        )
        close(aux["margin"][:, 1:7], wanted, atol=1e-4)


def test_losses():
    options = {"share": 0.5, "modules": 2, "grid": (2, 3), "last": False}
    (tokens, _, _, first), _, _ = layer(ATP(4, 6, 6, **options))
    mass = np.where(VISION, 1 / (1 + np.exp(-10 * np.asarray(first["margin"]))), 0.0)
    close(first["kept"], mass.sum(-1))
    close(first["left"], (6 - mass.sum(-1)).mean())
    close(first["loss_budget"], 0.05 * 4 * (mass.sum(-1) / 6).mean())
    assert "loss_target" not in first
    carried = {name: tokens.extra[name] for name in tokens.extra}
    options["last"] = True
    (_, _, _, second), _, _ = layer(ATP(14, 6, 6, **options), **carried)
    both = mass / (1 + np.exp(-10 * np.asarray(second["margin"])))
    close(second["kept"], both.sum(-1))
    close(second["loss_budget"], 0.05 * 14 * (both.sum(-1) / 6).mean())
    gap = (mass + both).sum(-1) / 2 - 3
    close(second["loss_target"], 0.2 * np.abs(gap).mean())
    (_, _, _, mean), _, _ = layer(ATP(14, 6, 6, **options, per_example=False), **carried)
    close(mean["loss_target"], 0.2 * np.abs(gap.mean()))


def test_spatial_scores():
    score = spatial_scores((24, 24), (1 / 4, 1 / 9, 1 / 16, 1 / 36)).reshape(24, 24)
    assert score[0, 0] == score[6, 12] == np.float32(1 - 3 / 36)
    assert score[0, 4] == np.float32(1 - 3 / 16) and score[3, 3] == np.float32(1 - 3 / 9)
    assert score[2, 2] == 0.25 and score[0, 1] == 0 and score[1, 2] == 0
    assert (spatial_scores((4, 4), (1 / 2,)) == 0).all()  # from 1/3 on the branch is off
    assert spatial_scores((3, 2), (1 / 4,)).tolist() == [0.25, 0, 0, 0, 0.25, 0]


def test_self_scores_without_vision_are_finite():
    qkv = jax.random.normal(jax.random.key(0), (B, N, 3, 2, 4))
    assert (self_scores(qkv, jnp.zeros((B, N))) == 0).all()


def test_evidence_of_shared_key_heads():
    q = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 5, 2, 3))
    qkv = provide(QKV, Seen(q, k, v, None, make_tokens(jnp.zeros((2, 5, 1)))))
    np.testing.assert_array_equal(qkv[:, :, 0], q)
    np.testing.assert_array_equal(qkv[:, :, 1:, 0], qkv[:, :, 1:, 1])
    np.testing.assert_array_equal(qkv[:, :, 1, ::2], k)
    np.testing.assert_array_equal(qkv[:, :, 2, 1::2], v)


def test_thresholds_start_at_a_half():
    module = ATP(1, 0, 0).build(8, 2, around.nnx.Rngs(0))
    close(module(jnp.ones((2, 2))), 0.5)


def test_expected_cost():
    """Between that of keeping all and none; of saturated gates, that of what they keep."""
    _, report = SHARP.run("soft")
    layout = CONFIG.layout_of(N)
    plan = SHARP.plan.with_twin("soft")
    expected = float(cost.expected_macs(CONFIG, plan, report, tokens=N))
    kept = [np.asarray(report.aux[f"mid_{i}"]["kept"]).mean() for i in (1, 2)]
    assert 0 < kept[1] < kept[0] < 6
    bounds = [
        cost.macs(CONFIG, make_plan("atp", layout, **{**OPTIONS, "shares": shares}), tokens=N)
        for shares in ((1 / 6, 1 / 6), (1.0, 1.0))
    ]
    assert bounds[0] < expected < bounds[1]


def test_padding_changes_nothing():
    shift = N - LENGTHS
    right = lambda a: jax.vmap(lambda row, by: jnp.roll(row, by, axis=0))(a, shift)  # noqa: E731
    for twin in ("packed", "soft", "causal"):
        together, report = ROOMY.run(twin)
        plan = ROOMY.plan.with_twin(twin)
        moved, other = forward(
            ROOMY.model, right(IDS), right(VALID), plan=plan, extra=jax.tree.map(right, EXTRA)
        )
        close(other.restore(moved)[right(VALID)], report.restore(together)[VALID])


def test_gradients():
    graph, state = around.nnx.split(ROOMY.model)

    @jax.jit
    @jax.grad
    def grads(state):
        model, plan = around.nnx.merge(graph, state), ROOMY.plan.with_twin("soft")
        logits, report = model(IDS, plan=plan, valid=VALID, extra=EXTRA)
        return jnp.where(VALID, logits[..., 0], 0).mean() + sum(report.losses.values())

    found = grads(state)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(found))
    assert all(g.any() for g in jax.tree.leaves(found["reductions"]))


@pytest.mark.parametrize("prefill", ["causal", "packed"])
def test_decoding(prefill):
    model, plan = ROOMY.model, ROOMY.plan
    full, _ = ROOMY.run("causal")
    n, prompt = int(around.PROMPT.max()), around.PROMPT
    valid = jnp.arange(n)[None] < prompt[:, None]
    cache = model.make_cache(B, N, plan=plan)
    logits, cache, report = extend(
        model,
        IDS[:, :n],
        cache,
        valid,
        plan=plan.with_twin(prefill),
        extra=ROOMY.first(n),
        fresh=True,
    )
    seen = np.asarray(valid & ~VISION[:, :n])
    close(report.restore(logits)[seen], full[:, :n][seen])
    left = np.asarray(report.aux["mid_2"]["kept"])
    np.testing.assert_array_equal(cache.occupancy()[:, 3], prompt - 6 + left)
    for step in range(3):
        at = (prompt + step)[:, None]
        ids, extra = jnp.take_along_axis(IDS, at, 1), ROOMY.at(at)
        extra["text"] = jnp.zeros((B, 1), bool)
        logits, cache, _ = extend(model, ids, cache, plan=plan.with_twin("causal"), extra=extra)
        close(logits, jnp.take_along_axis(full, at[..., None], 1))


def test_plan():
    assert default_layers(32) == (4, 14, 24) and default_layers(4) == (0, 2, 3)
    plan = make_plan("atp", CONFIG.layout, keep=0.2, targets=10)
    reductions: list[Any] = [r for _, r in plan.steps]
    assert [(r.before, r.after, r.last) for r in reductions] == [
        (10, 4, False), (4, 4, False), (4, 4, True)
    ]  # fmt: skip
    plan = make_plan("atp", CONFIG.layout, keep=1.0, targets=6)
    for twin in ("packed", "soft"):
        all_, _ = forward(ROOMY.model, IDS, VALID, plan=plan.with_twin(twin), extra=EXTRA)
        np.testing.assert_array_equal(all_, forward(ROOMY.model, IDS, VALID, plan=Plan())[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": (0.0,)}, "rates=0.0 must lie"),
        ({"targets": -1}, "of -1 slots.*targets 0 or more"),
        ({"targets": 6, "layers": (1, 2), "shares": (0.5, 0.9)}, "shares fall"),
        ({"layers": (1, 2), "shares": (0.5,)}, "one entry per layer"),
        ({"targets": 40, "shares": (0.1,), "layers": (1,)}, "36 vision tokens cannot leave"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"atp: .*{message}"):
        make_plan("atp", CONFIG.layout, **options)


def test_bad_input():
    with pytest.raises(ValueError, match="rows='text' must be"):
        forward(ROOMY.model, IDS, VALID, plan=ROOMY.plan, extra={"vision": VISION})
    with pytest.raises(ValueError, match="extra="):
        forward(ROOMY.model, IDS, VALID, plan=ROOMY.plan, extra={"text": TEXT})
