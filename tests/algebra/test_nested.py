"""Nested tokens: draws of lengths, three realisations that agree, registers, tables of grids."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.algebra.random_maps import normal
from tokred import nested
from tokred.nn import grids
from tokred.nn.embeddings import sincos_positions
from tokred.ops import attention
from tokred.tokens import make_tokens, move

B, N, D, P = 3, 9, 4, 2
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
few = settings(max_examples=8)
seeds = st.integers(0, 2**31)
lengths = st.lists(st.integers(1, N - P), min_size=B, max_size=B).map(jnp.array)


@pytest.mark.parametrize(
    ("rule", "maximum", "wanted"),
    [
        ("uniform", 4, {1: 1, 2: 1, 3: 1, 4: 1}),
        ("even", 7, {2: 1, 4: 1, 6: 1}),
        ("pow2", 8, {1: 1, 2: 1, 4: 1, 8: 1}),
        ("pow2", 7, {1: 1, 2: 1, 4: 1}),
        ("uniform_pow2", 8, {1: 1, 2: 1, 4: 2, 8: 4}),
        ("uniform_pow2", 6, {1: 1, 2: 1, 4: 2, 6: 2}),
    ],
)
def test_what_rules_draw_from(rule, maximum, wanted):
    table = nested.lengths_of(maximum, rule)
    assert Counter(table.tolist()) == wanted
    drawn = nested.sample_length(jax.random.key(0), maximum, rule, shape=(4000,))
    share = [float((drawn == length).mean()) for length in wanted]
    close(share, [times / len(table) for times in wanted.values()], atol=0.03)
    assert drawn.dtype == jnp.int32 and set(drawn.tolist()) == set(wanted)


def test_choices_have_weights():
    draw = functools.partial(nested.sample_length, jax.random.key(0), 16, "choices", shape=(4000,))
    drawn = draw(values=(4, 9, 16), weights=(1.0, 0.0, 3.0))
    close((drawn == 4).mean(), 0.25, atol=0.03)
    assert set(drawn.tolist()) == {4, 16} and set(draw(values=(9, 4)).tolist()) == {4, 9}


def test_a_key_gives_one_length():
    key = jax.random.key(3)
    draw = functools.partial(nested.sample_length, maximum=256)
    assert draw(key).shape == () and int(draw(key)) == int(jax.jit(draw)(key))
    assert len(set(nested.sample_length(key, 256, shape=(8,)).tolist())) > 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rule": "odd"}, "rule='odd' must be one of"),
        ({"maximum": 1, "rule": "even"}, r"draws from \(\), which must be integers in \[1, 1\]"),
        ({"rule": "choices"}, "rule='choices' needs values="),
        ({"values": (1, 2)}, "rule='uniform' takes no values="),
        ({"rule": "choices", "values": (0, 2)}, r"integers in \[1, 8\]"),
        ({"rule": "choices", "values": (2, 9)}, r"integers in \[1, 8\]"),
        ({"rule": "choices", "values": (1, 2), "weights": (1.0,)}, "must be 2 numbers from 0 on"),
        ({"rule": "choices", "values": (1, 2), "weights": (0.0, 0.0)}, "not all 0"),
    ],
)
def test_bad_rules(options, match):
    with pytest.raises(ValueError, match=match):
        nested.sample_length(jax.random.key(0), **{"maximum": 8, **options})


def test_fractions_are_no_lengths(unchecked):
    with pytest.raises(ValueError, match=r"draws from \(1\.5, 2\.0\)"):
        nested.lengths_of(8, "choices", (1.5, 2))  # type: ignore[arg-type]


def test_buckets():
    assert [nested.round_up_to(k, (64, 16, 4)) for k in (1, 4, 5, 64)] == [4, 4, 16, 64]
    with pytest.raises(ValueError, match=r"length=65 exceeds all buckets=\(64, 16, 4\)"):
        nested.round_up_to(65, (64, 16, 4))


def drawn_tokens(seed: int):
    rng = np.random.default_rng(seed)
    valid = jnp.asarray(rng.random((B, N)) < 0.8).at[:, :P].set(True)
    place = jnp.broadcast_to(jnp.arange(N, dtype=jnp.float32)[None, :, None], (B, N, 1))
    return make_tokens(normal(rng, B, N, D), valid=valid, position=place, prefix=P)


def seen(tokens) -> jax.Array:
    """What self-attention makes of them."""
    x = tokens.x[..., None, :]
    return attention(x, x, x, valid=tokens.valid)[..., 0, :]


@given(seed=seeds, length=lengths)
@few
def test_first_tokens_are_the_same_in_all_realisations(seed, length):
    tokens, mask_token = drawn_tokens(seed), normal(np.random.default_rng(seed), D)
    hidden = nested.hide_tail(tokens, length, prefix=P)
    replaced = nested.replace_tail(tokens.x, length, mask_token, prefix=P)
    for b in range(B):
        k = int(length[b])
        cut = move(tokens, nested.keep_first(N, k, (B,), prefix=P, valid=tokens.valid))
        first, rest = slice(0, P + k), slice(P + k, N)
        np.testing.assert_array_equal(cut.x[b], tokens.x[b, first])
        np.testing.assert_array_equal(hidden.x[b, first], cut.x[b])
        np.testing.assert_array_equal(replaced[b, first], cut.x[b])
        np.testing.assert_array_equal(replaced[b, rest], np.tile(mask_token, (N - P - k, 1)))
        for name in ("valid", "position"):
            np.testing.assert_array_equal(getattr(hidden, name)[b, first], getattr(cut, name)[b])
        assert not hidden.valid[b, rest].any() and (hidden.position[b, rest] == -1).all()
        np.testing.assert_array_equal(hidden.source[b], cut.source[b])
        close(seen(hidden)[b, first], seen(cut)[b])


@given(seed=seeds, k=st.integers(1, N - P))
@few
def test_hiding_is_the_masked_form_of_cutting(seed, k):
    tokens = drawn_tokens(seed)
    cut = nested.keep_first(N, k, (B,), prefix=P, valid=tokens.valid)
    hidden = nested.keep_within(jnp.full((B,), k), N, prefix=P, valid=tokens.valid)
    np.testing.assert_array_equal(hidden.valid, cut.masked().valid)
    np.testing.assert_array_equal(hidden.source >= 0, cut.source >= 0)
    one_for_all = nested.hide_tail(tokens, k, prefix=P)
    jax.tree.map(np.testing.assert_array_equal, one_for_all, move(tokens, hidden))


def test_without_a_prefix_lengths_count_all_tokens():
    tokens = make_tokens(jnp.ones((1, 5, D)), prefix=1)
    assert nested.hide_tail(tokens, 2).valid.tolist() == [[True] * 2 + [False] * 3]
    assert nested.hide_tail(tokens, 2, prefix=3).valid.all()
    assert nested.keep_first(5, 1, (1,), prefix=3).index.tolist() == [[0, 1, 2, 3]]


def test_gradient_of_replacing():
    x = jnp.ones((B, N, D))
    length = jnp.array([1, 4, 9])
    total = lambda x, token: nested.replace_tail(x, length, token).sum()  # noqa: E731
    to_x, to_token = jax.grad(total, (0, 1))(x, jnp.zeros(D))
    np.testing.assert_array_equal(to_x[..., 0], np.arange(N)[None] < np.asarray(length)[:, None])
    np.testing.assert_array_equal(to_token, [8 + 5 + 0] * D)


@pytest.mark.parametrize("k", [0, 8])
def test_bad_counts(k):
    with pytest.raises(ValueError, match=rf"k={k} must lie in \[1, 7\], of 9 tokens"):
        nested.keep_first(N, k, (B,), prefix=P)


def stretches(n: int, k: int) -> list[slice]:
    return [slice(i * n // k, -(-(i + 1) * n // k)) for i in range(k)]


def test_registers():
    table = normal(np.random.default_rng(0), 8, D)
    np.testing.assert_array_equal(nested.registers_of(table, 3), table[:3])
    for k in range(1, 9):
        wanted = jnp.stack([table[rows].mean(0) for rows in stretches(8, k)])
        close(nested.registers_of(table, k, "average"), wanted)
        close(grids.adaptive_pool_matrix(8, k) @ table, wanted)
    close(grids.adaptive_pool_matrix(3, 7), [np.eye(3)[rows].mean(0) for rows in stretches(3, 7)])


@pytest.mark.parametrize(
    ("k", "how", "match"), [(9, "nested", r"k=9 must lie in \[1, 8\]"), (2, "last", "how='last'")]
)
def test_bad_registers(k, how, match):
    with pytest.raises(ValueError, match=match):
        nested.registers_of(jnp.ones((8, D)), k, how)


def cubic(d: float) -> float:
    a, d = -0.75, abs(d)
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a if d < 2 else 0.0


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(
    ("kind", "kernel"), [("bicubic", cubic), ("bilinear", lambda d: max(0.0, 1 - abs(d)))]
)
@pytest.mark.parametrize(("n", "k"), [(4, 9), (9, 4), (5, 1), (1, 3), (6, 6)])
def test_resizing_by_loops(n, k, kind, kernel, align):
    x = np.random.default_rng(n).standard_normal(n)
    wanted = []
    for i in range(k):
        place = i * (n - 1) / max(k - 1, 1) if align else (i + 0.5) * n / k - 0.5
        near = range(int(np.floor(place)) - 1, int(np.floor(place)) + 3)
        wanted.append(sum(x[min(max(j, 0), n - 1)] * kernel(place - j) for j in near))
    close(grids.resize_matrix(n, k, kind, align) @ x, wanted)


def test_constants_are_kept_and_cannot_be_written():
    matrix = grids.resize_matrix(4, 7)
    assert matrix is grids.resize_matrix(4, 7) and matrix.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 1.0


def test_a_grid_is_resized_along_both_axes():
    rows, columns = grids.resize_matrix(2, 4), grids.adaptive_pool_matrix(6, 3)
    image = np.random.default_rng(0).standard_normal((2, 6))
    flat = grids.grid_matrix(rows, columns) @ image.reshape(-1)
    close(flat.reshape(4, 3), rows @ image @ columns.T)


def test_positions_have_the_column_first():
    table, ours = grids.sincos_2d(8, (2, 3)), sincos_positions((2, 3), 8)
    np.testing.assert_array_equal(table[:, :4], ours[:, 4:])
    np.testing.assert_array_equal(table[:, 4:], ours[:, :4])
    close(table[5], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02),
                     np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)])  # fmt: skip


def test_bad_sizes():
    with pytest.raises(ValueError, match="n=3 and k=0 must both be at least 1"):
        grids.resize_matrix(3, 0)
    with pytest.raises(ValueError, match="n=0 and k=1 must both be at least 1"):
        grids.adaptive_pool_matrix(0, 1)
    with pytest.raises(ValueError, match="kind='nearest' must be one of"):
        grids.resize_matrix(3, 2, "nearest")
