"""All that belongs to a token moves with it."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.algebra.random_maps import make_map, normal
from tokred.maps import Assign, Keep, Mix
from tokred.tokens import Tokens, append, make_tokens, move

B, N, K, D = 2, 5, 3, 2


def full_tokens(valid=None):
    rng = np.random.default_rng(0)
    uniform = lambda *shape: jnp.asarray(rng.random(shape) + 0.5, jnp.float32)  # noqa: E731
    return make_tokens(
        normal(rng, B, N, D),
        valid=valid,
        position=uniform(B, N, 2),
        size=uniform(B, N),
        bias=uniform(B, N),
        policy=uniform(B, N),
        extra={"seen": uniform(B, N, 4), "text": jnp.asarray(rng.random((B, N)) < 0.5)},
    )


def test_padding_is_cleared_at_the_start():
    valid = jnp.array([[True, True, False]])
    tokens = make_tokens(jnp.full((1, 3, 2), jnp.nan), valid=valid, position=jnp.ones((1, 3, 1)))
    assert tokens.x[0, 2].tolist() == [0, 0]
    assert tokens.position[0, :, 0].tolist() == [1, 1, -1]
    assert tokens.sizes().tolist() == [[1, 1, 0]]
    assert tokens.sources().tolist() == [[0, 1, -1]]
    assert (tokens.batch, tokens.n) == ((1,), 3)


def test_absent_fields_stay_absent():
    moved = move(make_tokens(jnp.ones((B, N, D))), Keep(jnp.zeros((B, K), jnp.int32), N))
    absent = (moved.valid, moved.size, moved.position, moved.bias, moved.policy)
    assert absent == (None,) * 5
    assert moved.extra == {}


def test_keep_takes_rows_of_every_field():
    tokens = full_tokens()
    index = jnp.array([[4, 1, 0], [2, 3, 0]])
    valid = jnp.array([[True, True, False], [True, True, True]])
    moved = move(tokens, Keep(index, N, valid))
    for old, new in (
        (tokens.x, moved.x),
        (tokens.size, moved.size),
        (tokens.bias, moved.bias),
        (tokens.policy, moved.policy),
        (tokens.extra["seen"], moved.extra["seen"]),
        (tokens.extra["text"], moved.extra["text"]),
    ):
        wanted = np.asarray(old)[np.arange(B)[:, None], index]
        wanted[0, 2] = 0
        np.testing.assert_array_equal(new, wanted)
        assert new.dtype == old.dtype
    assert moved.position[0, 2].tolist() == [-1, -1]
    assert moved.source.tolist() == [[-1, 1, -1, -1, 0], [2, -1, 0, 1, -1]]
    np.testing.assert_array_equal(moved.valid, valid)


def test_keep_of_absent_tokens_stays_absent():
    tokens = make_tokens(jnp.ones((1, 3, 1)), valid=jnp.array([[True, False, True]]))
    moved = move(tokens, Keep(jnp.array([[1, 2]]), 3))
    assert moved.valid.tolist() == [[False, True]]
    assert moved.source.tolist() == [[-1, -1, 1]]


def test_merging_weights_by_size():
    tokens, map_ = full_tokens(), Assign(jnp.array([[0, 1, 0, 2, 3], [2, 2, 2, 1, 0]]), 3)
    moved = move(tokens, map_)
    members = np.asarray(map_.dense())
    weights = members * np.asarray(tokens.size)[:, None]
    mean = weights / weights.sum(-1, keepdims=True)
    averaged = {
        "x": (tokens.x, moved.x),
        "position": (tokens.position, moved.position),
        "seen": (tokens.extra["seen"], moved.extra["seen"]),
        "bias": (tokens.bias[..., None], moved.bias[..., None]),
        "text": (tokens.extra["text"][..., None], moved.extra["text"][..., None]),
    }
    for name, (old, new) in averaged.items():
        np.testing.assert_allclose(new, mean @ np.asarray(old), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(moved.size, weights.sum(-1), rtol=1e-6)
    top = np.where(members > 0, np.asarray(tokens.policy)[:, None], 0).max(-1)
    np.testing.assert_array_equal(moved.policy, top)
    assert moved.source.tolist() == [[0, 1, 0, 2, -1], [2, 2, 2, 1, 0]]


def test_merging_knows_absent_tokens():
    valid = jnp.array([[True, True, False, False, True]] * B)
    moved = move(full_tokens(valid).replace(size=None), Assign(jnp.array([[0, 0, 0, 1, 2]] * B), 3))
    assert moved.size.tolist() == [[2, 0, 1]] * B
    assert moved.valid.tolist() == [[True, False, True]] * B
    assert moved.position[0, 1].tolist() == [-1, -1]


def test_a_mix_multiplies():
    rng = np.random.default_rng(1)
    tokens, map_ = full_tokens(), Mix(jnp.asarray(rng.random((B, K, N)), jnp.float32))
    moved = move(tokens, map_)
    np.testing.assert_allclose(moved.x, map_.matrix @ tokens.x, rtol=1e-5)
    mean = map_.matrix / map_.matrix.sum(-1, keepdims=True)
    np.testing.assert_allclose(moved.policy, (mean @ tokens.policy[..., None])[..., 0], rtol=1e-5)
    np.testing.assert_array_equal(moved.source, map_.matrix.argmax(1))


@pytest.mark.parametrize("kind", ["keep", "assign", "mix"])
def test_features_go_as_they_are_told(kind):
    map_ = make_map(kind, np.random.default_rng(2), (B,), N, K, True)
    tokens, weight = full_tokens(), jnp.full((B, N), 0.5)
    half = move(tokens, map_, how="weighted_sum", weight=weight)
    np.testing.assert_allclose(half.x, map_.apply(tokens.x, "sum") / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="takes no weight="):
        move(tokens, map_, weight=weight)


def test_positions_of_representatives():
    map_ = Assign(jnp.array([[0, 0, 1, 1, 1]] * B), 2, index=jnp.array([[1, 4]] * B))
    tokens = full_tokens()
    moved = move(tokens, map_, position="keep")
    np.testing.assert_array_equal(moved.position, tokens.position[:, jnp.array([1, 4])])


def test_sources_follow_two_moves():
    tokens = move(make_tokens(jnp.ones((1, 4, 1))), Keep(jnp.array([[3, 1, 0]]), 4))
    tokens = move(tokens, Assign(jnp.array([[1, 0, 1]]), 2))
    assert tokens.source.tolist() == [[1, 0, -1, 1]]
    assert tokens.size.tolist() == [[1, 2]]


def test_proportional_keys():
    tokens = Tokens(jnp.ones((1, 2, 1)), size=jnp.array([[1.0, 4.0]]), bias=jnp.array([[1.0, 0]]))
    assert tokens.key_bias() is tokens.bias
    bias = np.asarray(tokens.replace(proportional=True).key_bias())
    np.testing.assert_allclose(bias, [[1, np.log(4)]], rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="prefix=4 exceeds N=3"):
        make_tokens(jnp.ones((1, 3, 1)), prefix=4)
    with pytest.raises(ValueError, match="position='middle' must be"):
        move(full_tokens(), Assign(jnp.zeros((B, N), jnp.int32), 1), position="middle")


def test_appended_tokens_stand_for_no_original():
    valid = jnp.array([[True] * 4 + [False], [True] * 5])
    tokens = full_tokens(valid).replace(memo={"held": jnp.ones((B, 7))})
    rows = jnp.full((B, 2, D), 3.0)
    grown, map_ = append(tokens, rows)
    np.testing.assert_array_equal(grown.x, jnp.concatenate([tokens.x, rows], 1))
    np.testing.assert_array_equal(grown.valid, np.pad(valid, ((0, 0), (0, 2)), constant_values=1))
    np.testing.assert_array_equal(grown.size[:, N:], np.zeros((B, 2)))
    np.testing.assert_array_equal(grown.position[:, N:], -np.ones((B, 2, 2)))
    np.testing.assert_array_equal(grown.policy[:, N:], np.ones((B, 2)))
    np.testing.assert_array_equal(grown.bias[:, N:], np.zeros((B, 2)))
    for name, old in tokens.extra.items():
        np.testing.assert_array_equal(grown.extra[name][:, :N], old)
    np.testing.assert_array_equal(grown.sources(), tokens.sources())
    np.testing.assert_array_equal(map_.source, tokens.sources())
    np.testing.assert_array_equal(map_.apply(tokens.x, "sum")[:, :N], tokens.x)


def test_no_map_moves_a_memo():
    memo = {"held": jnp.arange(B * 7.0).reshape(B, 7)}
    tokens = full_tokens().replace(memo=memo)
    for kind in ("keep", "assign", "mix"):
        moved = move(tokens, make_map(kind, np.random.default_rng(1), (B,), N, K, False))
        np.testing.assert_array_equal(moved.memo["held"], memo["held"])
