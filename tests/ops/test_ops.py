"""Every implementation is its reference, forward and backward, and keeps a sharded batch local."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tokred.maps import Assign, Keep, Mix
from tokred.ops import (
    attention,
    attention_column_mean,
    attention_probs,
    attention_rows,
    gather,
    put,
    segment_max,
    segment_sum,
    top_k,
)
from tokred.select import match_bipartite
from tokred.tokens import make_tokens, move

B, N, K, H, E = 2, 6, 4, 3, 5
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def agree(f, names, *args):
    """f(implementation, *args) and its vector-Jacobian product are the same for all names."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(name, *args):
        y, back = jax.vjp(functools.partial(f, name), *args)
        return y, back(jnp.cos(y) + 1)

    reference = both("reference", *args)
    for name in names:
        jax.tree.map(close, both(name, *args), reference)


LAYOUTS = [((B, N), 1, B), ((B, N, E), 1, B), ((H, B, N, E), 2, B), ((B, H, N, E), 2, (B, 1))]


@pytest.mark.parametrize(("shape", "axis", "lead"), LAYOUTS)
@pytest.mark.parametrize("op", ["gather", "segment_sum", "segment_max"])
def test_moving_agrees_with_its_reference(op, shape, axis, lead):
    lead = lead if isinstance(lead, tuple) else (lead,)
    rng = np.random.default_rng(0)
    x = normal(1, *shape)
    index = jnp.asarray(rng.integers(0, N, (*lead, K)), jnp.int32)
    target = jnp.asarray(rng.integers(0, K + 1, (*lead, N)), jnp.int32)
    if op == "gather":
        call = lambda name, x: gather(x, index, axis=axis, implementation=name)  # noqa: E731
        agree(call, [None, "take", "one_hot"], x)
    elif op == "segment_sum":
        call = lambda name, x: segment_sum(x, target, K, axis=axis, implementation=name)  # noqa: E731
        agree(call, [None, "scatter", "one_hot"], x)
    else:
        call = lambda name, x: segment_max(x, target, K, axis=axis, implementation=name)  # noqa: E731
        agree(call, [None, "scatter"], x)


@pytest.mark.parametrize(("shape", "axis", "lead"), LAYOUTS)
def test_putting_is_restoring(shape, axis, lead):
    lead = lead if isinstance(lead, tuple) else (lead,)
    rng = np.random.default_rng(0)
    x, rows = normal(1, *shape), normal(2, *shape[:axis], K, *shape[axis + 1 :])
    index = jnp.asarray(rng.random((*lead, N)).argsort(-1)[..., :K], jnp.int32)
    valid = jnp.asarray(rng.random((*lead, K)) < 0.6)
    outside = jnp.where(valid, index, N + jnp.broadcast_to(jnp.arange(K), index.shape))

    def call(name, x, rows):
        if name == "reference":
            return Keep(index, N, valid).restore(rows, x, axis=axis)
        return put(x, outside, rows, axis=axis)

    agree(call, [None], x, rows)


@pytest.mark.parametrize("name", ["scatter", "one_hot"])
def test_what_goes_to_nobody_may_be_anything(name):
    x = jnp.array([1.0, jnp.nan, 2.0])
    total = segment_sum(x, jnp.array([0, 2, 0]), 2, axis=0, implementation=name)
    assert total.tolist() == [3.0, 0.0]


@pytest.mark.parametrize(("shape", "axis", "lead"), LAYOUTS)
def test_sums_onto_rows(shape, axis, lead):
    lead = lead if isinstance(lead, tuple) else (lead,)
    x, rows = normal(1, *shape), normal(2, *shape[:axis], K, *shape[axis + 1 :])
    target = jnp.asarray(np.random.default_rng(0).integers(0, K + 1, (*lead, N)), jnp.int32)

    def call(name, x, rows):
        if name == "reference":
            return rows + segment_sum(x, target, K, axis=axis, implementation=name)
        return segment_sum(x, target, K, axis=axis, onto=rows, implementation=name)

    agree(call, [None, "scatter", "one_hot"], x, rows)


@pytest.mark.parametrize("name", ["scatter", "reference"])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_maxima_of_integers_and_truths(name, dtype):
    x = jnp.array([-3, -1, 0]).astype(dtype)
    top = segment_max(x, jnp.array([0, 0, 3]), 2, axis=0, implementation=name)
    assert top.dtype == dtype
    assert top.tolist() == np.asarray([-1, 0]).astype(dtype).tolist()


def test_top_k_agrees_with_its_reference():
    scores = jnp.array([[1.0, jnp.nan, 3.0, 1.0, -jnp.inf, 0.0], [0.0, -0.0, 2.0, 2.0, -1, -2]])
    for k in (0, 3, N):
        wanted = top_k(scores, k, implementation="reference")
        for name in (None, "sort", "top_k"):
            jax.tree.map(
                np.testing.assert_array_equal, top_k(scores, k, implementation=name), wanted
            )
    assert top_k(scores, N)[1].tolist() == [[2, 0, 3, 5, 1, 4], [2, 3, 0, 1, 4, 5]]
    values = lambda name, s: top_k(s, 3, implementation=name)[0]  # noqa: E731
    agree(values, [None, "sort", "top_k"], normal(0, B, N))


def attention_inputs(lead=(B,)):
    q, k, v = (normal(seed, *lead, N, H, E) for seed in range(3))
    bias = normal(3, *lead, N)
    return q, k, v, bias, jax.nn.sigmoid(normal(4, *lead, N))


VALID = jnp.array([[True, True, False, True, False, True], [True, False, True, True, True, False]])


def by_formula(q, k, v, bias=None, valid=None, policy=None, scale=E**-0.5):
    """Attention in numpy, the probabilities beside it."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    weight = np.einsum("bnhe,bmhe->bhnm", q, k) * scale
    if bias is not None:
        weight = weight + np.asarray(bias)[:, None, None]
    weight = np.exp(weight - weight.max(-1, keepdims=True))
    if valid is not None:
        weight = weight * np.asarray(valid)[:, None, None]
    if policy is not None:
        gate = np.asarray(policy)[:, None] * np.ones((N, 1))
        weight = weight * np.where(np.eye(N, dtype=bool), 1, gate)[:, None]
    weight = weight / weight.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhe->bnhe", weight, v), weight


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("fields", ["", "bias", "valid", "bias valid", "bias valid policy"])
def test_attention_is_the_formula(fields, scale):
    q, k, v, bias, policy = attention_inputs()
    named = {"bias": bias, "valid": VALID, "policy": policy}
    given: dict[str, Any] = {name: named[name] for name in fields.split()}
    wanted, probs = by_formula(q, k, v, **given, scale=E**-0.5 if scale is None else scale)
    close(attention(q, k, v, scale=scale, policy_eps=0.0, **given), wanted)
    close(attention_probs(q, k, scale=scale, policy_eps=0.0, **given), probs)


def test_the_epsilon_of_a_policy_is_shared_by_valid_keys():
    q, k, _, _, policy = attention_inputs()
    probs = attention_probs(q, k, valid=VALID, policy=policy, policy_eps=0.5)
    close(probs.sum(-1), np.ones((B, H, N)))
    assert not np.asarray(probs)[~np.broadcast_to(VALID[:, None, None], probs.shape)].any()
    plain = attention_probs(q, k, policy=jnp.zeros((B, N)), policy_eps=0.5)
    off = np.asarray(plain)[..., ~np.eye(N, dtype=bool)]
    close(off.reshape(B, H, N, N - 1).std(-1), 0)  # closed keys share what epsilon leaves


@pytest.mark.parametrize("lead", [(), (B,), (2, B)])
def test_fused_attention_agrees_with_its_reference(lead):
    *qkv, bias, _ = attention_inputs(lead)
    agree(lambda name, *a: attention(*a, implementation=name), [None, "blocked", "xla"], *qkv)

    def biased(name, q, k, v, bias):
        valid = jnp.broadcast_to(VALID[0], bias.shape)
        return attention(q, k, v, bias=bias, valid=valid, implementation=name)

    agree(biased, [None, "blocked", "xla"], *qkv, bias)


def test_bfloat16_keeps_the_precision_of_the_bias():
    q, k, v, bias, _ = attention_inputs()
    half = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    q, k, v = (a.astype(jnp.float32) for a in half)
    wanted, _ = by_formula(q, k, v, bias + 3)
    for name in ("xla", "blocked", "reference"):
        y = attention(half[0], half[1], half[2], bias=bias + 3, implementation=name)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=2e-2)


@pytest.mark.parametrize("policy", [None, jnp.full((B, N), 0.5)])
@pytest.mark.parametrize("name", ["xla", "blocked", "reference"])
def test_no_valid_key_stays_finite(name, policy):
    q, k, v, bias, _ = attention_inputs()
    nothing = jnp.zeros((B, N), bool)

    def loss(q, k, v, bias):
        return attention(
            q, k, v, bias=bias, valid=nothing, policy=policy, implementation=name
        ).sum()

    for a in jax.tree.leaves(jax.value_and_grad(loss, (0, 1, 2, 3))(q, k, v, bias)):
        assert np.isfinite(a).all()


@pytest.mark.parametrize("policy", [False, True])
def test_rows_and_column_means_are_parts_of_the_probabilities(policy):
    q, k, _, bias, gate = attention_inputs()
    given: dict[str, Any] = {"bias": bias, "valid": VALID, "policy": gate if policy else None}
    probs = attention_probs(q, k, **given)
    close(attention_rows(q[:, 2:4], k, own=jnp.array([2, 3]), **given), probs[:, :, 2:4])
    for block in (2, 4, 128):
        close(attention_column_mean(q, k, block=block, **given), probs.mean((1, 2)))
        means = attention_column_mean(q, k, query_valid=VALID, block=block, **given)
        chosen = jnp.einsum("bhnm,bn->bm", probs, VALID.astype(jnp.float32))
        close(means, chosen / (H * VALID.sum(-1, keepdims=True)))


def bad_calls():
    q, k, v, _, policy = attention_inputs()
    x, index = jnp.ones((2, 3)), jnp.zeros((2, 2), jnp.int32)
    return {
        "ops.top_k: k=4": lambda: top_k(x, 4),
        "ops.top_k: implementation='radix' is unknown": lambda: top_k(x, 1, implementation="radix"),
        "ops.gather: implementation='magic'": lambda: gather(
            x, index, axis=1, implementation="magic"
        ),
        "cannot act on token axis 0": lambda: gather(x, index, axis=0),
        "own= must name": lambda: attention_rows(q[:, :1], k, policy=policy),
        "ops.attention: implementation='flash'": lambda: attention(q, k, v, implementation="flash"),
    }


@pytest.mark.parametrize("words", list(bad_calls()))
def test_errors_are_one_sentence(words):
    with pytest.raises(ValueError) as error:
        bad_calls()[words]()
    assert words in str(error.value) and str(error.value).endswith(".")


def moved(x, map_):
    tokens = make_tokens(x, position=x[..., :2], bias=x[..., 0], policy=x[..., 1])
    return move(tokens, map_)


def local_calls():
    """name: (function of x and integers, x, integers); all with 8 examples in front."""
    rng = np.random.default_rng(0)
    x = normal(0, 8, N, E)
    index = jnp.asarray(rng.random((8, N)).argsort(-1)[:, :K], jnp.int32)
    target = jnp.asarray(rng.integers(0, K + 1, (8, N)), jnp.int32)
    matrix = normal(1, 8, K, N)
    wide = jnp.broadcast_to(x[:, None], (8, H, N, E))
    return {
        "top_k": (lambda x, _: top_k(x, K), x[..., 0], index),
        "gather": (lambda x, i: gather(x, i, axis=1), x, index),
        "put": (lambda x, i: put(x, i, 2 * x[:, :K], axis=1), x, index),
        "segment_sum": (lambda x, t: segment_sum(x, t, K, axis=1), x, target),
        "segment_max": (lambda x, t: segment_max(x, t, K, axis=1), x, target),
        "move_keep": (lambda x, i: moved(x, Keep(i, N)), x, index),
        "move_assign": (lambda x, t: moved(x, Assign(t, K)), x, target),
        "move_mix": (lambda x, m: moved(x, Mix(m)), x, matrix),
        "lifted": (lambda x, t: Assign(t, K).lift().apply(x, axis=2), wide, target),
        "restore": (lambda x, t: Assign(t, N).restore(x), x, jnp.minimum(target, N)),
        "match_bipartite": (lambda x, _: moved(x, match_bipartite(x, 2, prefix=1)), x, index),
        "attention": (lambda x, _: attention(*[x.swapaxes(1, 2)] * 3), wide, index),
    }


COLLECTIVE = re.compile("all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all")


@pytest.mark.parametrize("name", list(local_calls()))
def test_a_sharded_batch_stays_local(name):
    assert not collectives(*local_calls()[name])


def test_collectives_would_be_found():
    assert collectives(lambda x, _: x - x.mean(0, keepdims=True), jnp.ones((8, 2)), jnp.ones(8))


def collectives(f, x, given) -> list[str]:
    """Those in the compiled `f` and its vector-Jacobian product, the batch over 8 devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch = NamedSharding(mesh, PartitionSpec("data"))

    def both(x, given):
        floats = lambda y: [a for a in jax.tree.leaves(y) if a.dtype == jnp.float32]  # noqa: E731
        y, back = jax.vjp(lambda x: floats(f(x, given)), x)
        return f(x, given), back([jnp.cos(a) for a in y])

    compiled = jax.jit(both, in_shardings=batch, out_shardings=batch).lower(x, given).compile()
    return COLLECTIVE.findall(compiled.as_text() or "")
