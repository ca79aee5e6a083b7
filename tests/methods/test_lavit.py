"""LaVIT: selector, merger with its eps, both forms, sampling, overflow, losses."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred import cost
from tokred.maps import Keep
from tokred.methods import make_plan
from tokred.methods.lavit import LaVIT
from tokred.models import ViT, ViTConfig
from tokred.nn.predictors import TokenMerger, policy_probs
from tokred.plan import Plan, Site
from tokred.report import Call
from tokred.tokens import make_tokens

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
CONFIG = ViTConfig(
    image_size=(16, 16), patch=(4, 4), width=16, depth=2, heads=2, classes=5, pool="mean"
)
DENSE = Plan()
PLAN = make_plan("lavit", CONFIG.layout, keep=0.5, depth=2)
IMAGES = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
B, N, D = 2, 10, 8
KEPT = jnp.array([[1, 1, 0, 0, 1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 1, 1, 1, 0, 0, 0]], jnp.float32)
VALID = jnp.arange(N)[None] < jnp.array([[10], [8]])


def perturbed(module: Any, spread: float = 0.1) -> Any:
    """Weights of norms and biases that matter, too."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [a + spread * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved))


MERGER = perturbed(TokenMerger(D, 2, depth=2, mlp_ratio=2.0, rngs=nnx.Rngs(0)))
X = jax.random.normal(jax.random.key(1), (B, N, D))


@functools.cache
def model_of(plan=PLAN) -> ViT:
    model = ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    model.reductions["output"] = perturbed(model.reductions["output"])
    selector = model.reductions["output"].selector
    selector.fc1.kernel[...] *= 9.0  # decisive, and about as often for either choice
    x = model.encode(model.tokens(IMAGES))[0].x[:, 1:]
    chances = selector(x, jnp.ones(x.shape[:2]))
    middle = jnp.median(chances[..., 1] - chances[..., 0])
    selector.fc3.bias[...] += jnp.stack([middle, 0.0])
    return model


@functools.partial(jax.jit, static_argnames=("plan", "train"))
def forward(model, images, valid=None, *, plan, key=None, train=False):
    return model(images, plan=plan, valid=valid, call=Call(key=key, train=train))


def plain_attention(attn: Any, x: Any, among: Any, policy: np.ndarray, eps: float) -> Any:
    """One example; policy [N M]."""
    heads = lambda y: np.asarray(y).reshape(len(y), 2, -1)  # noqa: E731
    q, k, v = heads(attn.query(x)), heads(attn.key(among)), heads(attn.value(among))
    out = np.zeros(q.shape)
    for h in range(2):
        logits = q[:, h] @ k[:, h].T / np.sqrt(q.shape[-1])
        weight = np.exp(logits - logits.max(-1, keepdims=True)) * policy
        probs = (weight + eps / len(among)) / (weight.sum(-1, keepdims=True) + eps)
        out[:, h] = probs @ v[:, h]
    return attn.out(jnp.asarray(out.reshape(len(x), -1), jnp.float32))


def merged_by_hand(x: Any, kept: np.ndarray, eps: float) -> Any:
    n = len(kept)
    inside = np.tril(np.where(np.eye(n, dtype=bool), 1.0, kept[None]))
    among, outside = MERGER.ln_vision(x), np.broadcast_to(1 - kept, (n, n))
    for block in MERGER.blocks:
        y = block.norm0(x)
        x = x + plain_attention(block.attn, y, y, inside, eps)
        x = x + plain_attention(block.cross, block.norm1(x), among, outside, eps)
        x = x + block.mlp(block.norm2(x))
    return MERGER.norm(x)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_merger(eps):
    got = MERGER(X, KEPT, eps=eps)
    padded = MERGER(X, KEPT, valid=VALID, eps=eps)
    for row in range(B):
        n = int(VALID[row].sum())
        close(got[row], merged_by_hand(X[row], np.asarray(KEPT[row]), eps))
        close(padded[row, :n], merged_by_hand(X[row, :n], np.asarray(KEPT[row, :n]), eps))


def test_nothing_dropped_is_the_mean_of_all():
    """Through eps alone; without it the cross-attention says nothing."""
    logits, none = jax.random.normal(jax.random.key(2), (1, 2, 4, N)), jnp.zeros((1, 4, N))
    every = jnp.ones((1, N), bool)
    close(policy_probs(logits, none, every), 1 / N)
    assert (policy_probs(logits, none, every, eps=0.0) == 0).all()
    some = policy_probs(logits, none, VALID[1:])
    close(some[..., :8], 1 / 8)
    assert (some[..., 8:] == 0).all()
    close(MERGER(X, jnp.ones((B, N)))[0], merged_by_hand(X[0], np.ones(N), 1e-6))
    assert jnp.isfinite(
        jax.grad(lambda p: policy_probs(logits, p, every, eps=0.0).sum())(none)
    ).all()


def packed_map(slots: int = 6) -> Keep:
    order = jnp.argsort(1 - KEPT, axis=-1, stable=True)[:, :slots].astype(jnp.int32)
    return Keep(order, N, jnp.arange(slots)[None] < KEPT.sum(-1, keepdims=True))


@pytest.mark.parametrize(("eps", "bound"), [(0.0, 1e-5), (1e-6, 1e-4)])
def test_packed_merger_is_soft_on_kept_tokens(eps, bound):
    map_ = packed_map()
    soft, packed = MERGER(X, KEPT, eps=eps), MERGER(X, KEPT, map_=map_, eps=eps)
    gap = jnp.abs(map_.apply(soft) - packed)[map_.valid]
    assert gap.max() < bound


def test_eps_alone_separates_the_forms():
    map_ = packed_map()
    soft, packed = MERGER(X, KEPT, eps=1e-2), MERGER(X, KEPT, map_=map_, eps=1e-2)
    assert 1e-4 < jnp.abs(map_.apply(soft) - packed)[map_.valid].max() < 1


def test_a_kept_token_knows_dropped_ones_and_kept_ones_before_it():
    other = X.at[0, 4, 0].add(1.0)  # kept
    gap = jnp.abs(MERGER(other, KEPT, eps=0.0) - MERGER(X, KEPT, eps=0.0))[0].max(-1)
    np.testing.assert_array_equal(gap > 1e-6, np.arange(N) >= 4)
    other = X.at[0, 7, 0].add(1.0)  # dropped
    gap = jnp.abs(MERGER(other, KEPT, eps=0.0) - MERGER(X, KEPT, eps=0.0))[0].max(-1)
    assert (gap > 1e-6).all()


def test_what_is_read_out():
    logits, report = forward(model_of(), IMAGES, plan=PLAN)
    soft, masked = forward(model_of(), IMAGES, plan=PLAN.with_twin("soft"))
    close(logits, soft, atol=1e-4)
    map_ = report.maps["output"]
    assert report.tokens.n == 1 + 12 and masked.tokens.n == 17
    np.testing.assert_array_equal(map_.index[:, 0], 0)
    kept = map_.source >= 0
    np.testing.assert_array_equal(masked.tokens.policy, kept)
    assert len(set(map_.source.max(-1).tolist())) > 1  # counts differ
    close(report.aux["output"]["kept"], kept.sum(-1).mean() - 1)
    close(report.restore(report.tokens.x)[kept], masked.tokens.x[kept], atol=1e-4)
    dense = forward(model_of(), IMAGES, plan=DENSE)[1]
    np.testing.assert_array_equal(report.tokens.x[:, 0], dense.tokens.x[:, 0])
    share = (kept.sum(-1) - 1) / 16
    close(masked.aux["output"]["loss_ratio"], 2.0 * ((share - 0.5) ** 2).mean())


def test_the_gate_is_dynamicvits():
    """The selector's likelier choice; sampled where asked, as in training."""
    model, sampled = model_of(), make_plan("lavit", CONFIG.layout, keep=0.5, depth=2, sampled=True)
    x = forward(model, IMAGES, plan=DENSE)[1].tokens.x[:, 1:]
    chances = model.reductions["output"].selector(x, jnp.ones((3, 16)))
    soft = PLAN.with_twin("soft")
    _, report = forward(model, IMAGES, plan=soft)
    np.testing.assert_array_equal(report.tokens.policy[:, 1:], chances[..., 0] >= chances[..., 1])
    draws = [
        forward(model, IMAGES, plan=plan, key=jax.random.key(3), train=train)[1].tokens.policy
        for plan, train in ((sampled.with_twin("soft"), False), (soft, True))
    ]
    np.testing.assert_array_equal(*draws)
    assert (draws[0] != report.tokens.policy).any()
    with pytest.raises(ValueError, match="pass key="):
        forward(model, IMAGES, plan=sampled)


def test_overflow_merges_the_least_likely():
    """Tokens without a slot count as dropped: others take them in."""
    plan = make_plan("lavit", CONFIG.layout, keep=0.125, room=1.0, depth=2)
    _, report = forward(model_of(), IMAGES, plan=plan)
    _, free = forward(model_of(), IMAGES, plan=PLAN)
    wanted = free.maps["output"].valid.sum(-1) - 1
    np.testing.assert_array_equal(report.aux["output"]["overflow"], jnp.maximum(wanted - 2, 0))
    assert report.tokens.n == 3 and wanted.max() > 2
    model = model_of()
    x = forward(model, IMAGES, plan=DENSE)[1].tokens.x[:, 1:]
    chances = model.reductions["output"].selector(x, jnp.ones((3, 16)))[..., 0]
    source = report.maps["output"].source[:, 1:] >= 0
    y = model.reductions["output"].merger(x, source.astype(jnp.float32))
    close(report.restore(report.tokens.x)[:, 1:][source], y[source], atol=1e-4)
    for row in range(3):
        assert chances[row][source[row]].min() >= jnp.sort(chances[row])[-2]


def test_padding_is_no_part_of_it():
    config = dataclasses.replace(CONFIG, image_size=(16, 12))
    alone = ViT(config, plan=PLAN, rngs=nnx.Rngs(0)).reductions["output"]
    reduction = LaVIT(9, depth=2)
    x = jax.random.normal(jax.random.key(4), (B, 1 + N, 16))
    wide = jnp.concatenate([x, jnp.full((B, 3, 16), 7.0)], axis=1)
    valid = jnp.broadcast_to(jnp.arange(14)[None] < 11, (B, 14))
    for twin in ("packed", "soft"):
        short, *_ = reduction(make_tokens(x, prefix=1), {}, module=alone, twin=twin)
        tokens = make_tokens(wide, valid=valid, prefix=1).replace(x=wide)
        long, *_ = reduction(tokens, {}, module=alone, twin=twin)
        n = short.n
        close(long.x[:, :n], short.x)
        if twin == "packed":
            np.testing.assert_array_equal(long.valid, short.valid)


def test_an_image_may_keep_nothing():
    model = model_of()
    module = nnx.clone(model.reductions["output"])
    module.selector.fc3.bias[...] = jnp.array([-99.0, 99.0])
    tokens = make_tokens(jax.random.normal(jax.random.key(0), (B, 17, 16)), prefix=1)
    out, *_ = LaVIT(5, depth=2)(tokens, {}, module=module)
    assert not out.valid[:, 1:].any() and (out.x[:, 1:] == 0).all()
    soft, *_ = LaVIT(5, depth=2)(tokens, {}, module=module, twin="soft")
    assert jnp.isfinite(soft.x).all() and not soft.policy[:, 1:].any()


def test_gradients_reach_the_selector():
    graph, state = nnx.split(model_of())

    @jax.jit
    @jax.grad
    def grads(state):
        call = Call(key=jax.random.key(0), train=True)
        model = nnx.merge(graph, state)
        logits, report = model(IMAGES, plan=PLAN.with_twin("soft"), call=call)
        return logits[:, 0].sum() + sum(report.losses.values())

    found = grads(state)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(found))
    assert all(g.any() for g in jax.tree.leaves(found["reductions"]))


def test_macs():
    plan = make_plan("lavit", CONFIG.layout, keep=0.5, depth=3)
    config = dataclasses.replace(CONFIG, width=256, heads=4)
    model = nnx.eval_shape(lambda: ViT(config, plan=plan, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    run = lambda s, x: nnx.merge(graph, s)(x, plan=plan)[0]  # noqa: E731
    counted = cost.compiled_macs(run, state, jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)) / 4
    np.testing.assert_allclose(cost.macs(config, plan), counted, rtol=0.05)


def test_budget():
    budgets = ((0.01, 1.5), (1 / 3, 1.5), (0.5, 1.0), (1.0, 1.5))
    plans = [make_plan("lavit", CONFIG.layout, keep=keep, room=room) for keep, room in budgets]
    assert [plan.steps[0][1].counts(17, 1) for plan in plans] == [2, 9, 9, 17]
    assert [site for site, _ in PLAN.steps] == [Site("output")]


def test_bad_options():
    for options, message in (
        ({"room": 0.0}, "room=0.0 must be positive"),
        ({"depth": 0}, "depth=0 blocks.*raise depth"),
    ):
        with pytest.raises(ValueError, match=f"lavit: {message}"):
            make_plan("lavit", CONFIG.layout, **options)
    with pytest.raises(ValueError, match="lavit: ratio=0"):
        LaVIT(3, ratio=0)
    with pytest.raises(ValueError, match="has no module"):
        forward(ViT(CONFIG, rngs=nnx.Rngs(0)), IMAGES, plan=PLAN)
