"""Attention with masks, caps and grouped key heads, against numpy; the same from a cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred.ops import (
    attention,
    attention_column_mean,
    attention_probs,
    attention_rows,
    cached_attention,
    position_mask,
)

B, N, M, H, E = 2, 5, 6, 4, 3
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def inputs(groups: int) -> tuple[Any, Any, Any, Any]:
    """q, k, v and a mask in which every query sees its own key."""
    mask = np.random.default_rng(9).random((B, N, M)) < 0.5
    mask |= np.eye(N, M, dtype=bool)
    q, k, v = normal(0, B, N, H, E), normal(1, B, M, groups, E), normal(2, B, M, groups, E)
    return q, k, v, jnp.asarray(mask)


def by_loops(q: Any, k: Any, v: Any, mask: Any, cap: float | None = None, bias: Any = None) -> Any:
    """(output, probabilities), one query head at a time."""
    out, probs = np.zeros((B, N, H, E)), np.zeros((B, H, N, k.shape[1]))
    for b, n, h in np.ndindex(B, N, H):
        keys, values = np.asarray(k[b, :, h // (H // k.shape[2])], np.float64), v[b]
        logit = keys @ np.asarray(q[b, n, h]) / E**0.5
        logit = logit if cap is None else cap * np.tanh(logit / cap)
        logit = logit if bias is None else logit + np.asarray(bias[b])
        weight = np.exp(logit) * np.asarray(mask[b, n])
        probs[b, h, n] = weight / weight.sum()
        out[b, n, h] = probs[b, h, n] @ np.asarray(values[:, h // (H // k.shape[2])])
    return out, probs


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("implementation", ["xla", "blocked", "reference"])
def test_masks_caps_and_groups(groups: int, cap: float | None, implementation: str):
    q, k, v, mask = inputs(groups)
    bias = normal(3, B, M)
    wanted, probs = by_loops(q, k, v, mask, cap, bias)
    given: dict[str, Any] = {"mask": mask, "cap": cap, "bias": bias}
    close(attention(q, k, v, implementation=implementation, **given), wanted)
    close(attention_probs(q, k, **given), probs)
    close(attention_rows(q[:, 1:3], k, **{**given, "mask": mask[:, 1:3]}), probs[:, :, 1:3])
    for block in (2, 128):
        close(attention_column_mean(q, k, block=block, **given), probs.mean((1, 2)))


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_the_reference(groups: int):
    q, k, v, mask = inputs(groups)

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(name: str, *args: Any) -> Any:
        run = lambda *a: attention(*a, mask=mask, implementation=name).var()  # noqa: E731
        return jax.grad(run, (0, 1, 2))(*args)

    for name in ("xla", "blocked"):
        jax.tree.map(close, slopes(name, q, k, v), slopes("reference", q, k, v))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_attention_from_a_cache_is_attention(groups: int, cap: float | None):
    """Where all key heads hold the same tokens; a query that sees none gets 0."""
    q, k, v, mask = inputs(groups)
    bias = normal(3, B, M)
    mask = mask.at[0, 2].set(False)
    slots = lambda a: jnp.swapaxes(a, 1, 2)  # noqa: E731
    wide = jnp.broadcast_to(mask[:, None], (B, groups, N, M))
    every = jnp.broadcast_to(bias[:, None], (B, groups, M))
    found = cached_attention(q, slots(k), slots(v), mask=wide, bias=every, cap=cap)
    expected = np.array(attention(q, k, v, mask=mask, bias=bias, cap=cap))
    expected[0, 2] = 0
    close(found, expected)


def test_key_heads_of_a_cache_may_hold_other_tokens():
    q, k, v, mask = inputs(2)
    order = np.array([[5, 1, 0, 3, 2, 4], [0, 4, 2, 1, 5, 3]])
    pick = lambda a: jnp.stack([a[:, order[g], g] for g in range(2)], 1)  # noqa: E731
    masks = jnp.stack([mask[..., order[g]] for g in range(2)], 1)
    close(cached_attention(q, pick(k), pick(v), mask=masks), attention(q, k, v, mask=mask))


def test_empty_slots_may_hold_anything():
    q, k, v, mask = inputs(1)
    slots = lambda a: jnp.swapaxes(a, 1, 2)  # noqa: E731
    hidden = mask[:, None].at[..., -1].set(False)
    wild = [slots(a).at[:, :, -1].set(1e4) for a in (k, v)]
    close(
        cached_attention(q, *wild, mask=hidden),
        cached_attention(q, slots(k), slots(v), mask=hidden),
    )


def place(*numbers: float) -> jax.Array:
    return jnp.asarray(numbers)[None, :, None]


def test_queries_see_keys_that_are_not_after_them():
    seen = position_mask(place(0, 3), place(0, 1, 3, 4))
    assert seen[0].tolist() == [[True, False, False, False], [True, True, True, False]]


def test_a_window_counts_places_its_own_included():
    seen = position_mask(place(5), place(2, 3, 4, 5, 6), 3)
    assert seen[0, 0].tolist() == [False, True, True, True, False]


def test_documents_do_not_see_each_other():
    position = jnp.array([[[0.0, 0], [1, 0], [0, 1], [1, 1]]])
    seen = np.asarray(position_mask(position, position))[0]
    np.testing.assert_array_equal(seen[:2, :2], np.tri(2, dtype=bool))
    np.testing.assert_array_equal(seen[2:, 2:], np.tri(2, dtype=bool))
    assert not seen[:2, 2:].any() and not seen[2:, :2].any()


@pytest.mark.parametrize("implementation", ["xla", "blocked", "reference"])
def test_a_query_without_a_valid_key_sees_none_behind_it(implementation: str):
    """What stands there must not depend on how much follows."""
    q, k, v, _ = inputs(2)
    q = normal(4, B, M, H, E)
    valid = jnp.arange(M)[None] > jnp.array([[0], [2]])

    def first(n: int) -> Any:
        given = {"valid": valid[:, :n], "causal": True, "implementation": implementation}
        return attention(q[:, :n], k[:, :n], v[:, :n], **given)

    close(first(M)[:, : M - 2], first(M - 2))
