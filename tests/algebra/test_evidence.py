"""Evidence is rows and means of the probabilities, whatever the path that makes it."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.algebra.random_maps import normal
from tokred.evidence import Seen, provide
from tokred.ops import attention_probs
from tokred.plan import Ask
from tokred.tokens import Tokens

B, N, H, E, D = 2, 5, 3, 4, 6
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
VALID = jnp.array([[True, True, True, True, False], [True, True, False, False, False]])


def make_seen(**fields) -> Seen:
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, B, N, H, E) for _ in range(3))
    text = jnp.array([[0, 1.0, 0, 1, 1], [1, 1, 1, 0, 0]])
    fields = {"extra": {"text": text}, "bias": normal(rng, B, N)} | fields
    return Seen(q, k, v, normal(rng, B, N, D), Tokens(normal(rng, B, N, D), **fields), scale=0.4)


def policy():
    return jnp.asarray(np.random.default_rng(1).random((B, N)), jnp.float32)


def cases():
    return {
        "plain": make_seen(),
        "valid": make_seen(valid=VALID),
        "policy": make_seen(valid=VALID, policy=policy(), policy_eps=0.1),
        "size": make_seen(size=policy() + 1, proportional=True),
    }


def all_probs(seen):
    return np.asarray(attention_probs(seen.q, seen.k, **seen.softmax_arguments()))


def mean_over(probs, queries):
    """Mean over heads and chosen queries of [B H N N]."""
    count = np.maximum(queries.sum(-1), 1)[:, None] * H
    return np.einsum("bhnm,bn->bm", probs, queries) / count


@pytest.mark.parametrize("name", list(cases()))
def test_attention_evidence_is_part_of_the_probabilities(name):
    seen = cases()[name]
    probs = all_probs(seen)
    queries = np.ones((B, N)) if seen.tokens.valid is None else np.asarray(seen.tokens.valid)
    text = queries * np.asarray(seen.tokens.extra["text"])
    close(provide(Ask("probs"), seen), probs)
    close(provide(Ask("rows"), seen), probs[:, :, 0].mean(1))
    close(provide(Ask("rows", heads="all"), seen), probs[:, :, 0].swapaxes(1, 2))
    close(provide(Ask("column_mean"), seen), mean_over(probs, queries))
    close(provide(Ask("rows", rows="text"), seen), mean_over(probs, text))


@pytest.mark.parametrize("name", ["plain", "valid"])
def test_the_last_row_is_the_last_valid_one(name):
    seen = cases()[name]
    last = [N - 1, N - 1] if seen.tokens.valid is None else [3, 1]
    rows = all_probs(seen)[np.arange(B), :, last]
    close(provide(Ask("rows", rows="last"), seen), rows.mean(1))
    close(provide(Ask("rows", rows="last", heads="all"), seen), rows.swapaxes(1, 2))


def test_per_token_evidence():
    seen = make_seen()
    close(provide(Ask("keys"), seen), seen.k.mean(-2))
    close(provide(Ask("values", heads="all"), seen), seen.v)
    assert provide(Ask("input"), seen) is seen.input
    assert provide(Ask("hidden"), seen) is seen.tokens.x
    qkv = provide(Ask("qkv"), seen)
    assert qkv.shape == (B, N, 3, H, E)
    close(qkv[:, :, 1], seen.k)


@pytest.mark.parametrize(
    ("ask", "fields", "words"),
    [
        (Ask("rows", rows="image"), {}, "the name of a mask in Tokens.extra"),
        (Ask("rows", rows="last"), {"policy": policy()}, "do not go together"),
        (Ask("column_mean", heads="all"), {}, "use heads='mean'"),
        (Ask("rows", rows="text", heads="all"), {}, "use heads='mean'"),
    ],
)
def test_errors_name_the_ask(ask, fields, words):
    with pytest.raises(ValueError, match=words):
        provide(ask, make_seen(**fields))
