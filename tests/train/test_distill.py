"""Distillation against plain loops: who is compared with whom, and what gets a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokred.maps import Assign, Keep
from tokred.tokens import Tokens, make_tokens, move
from tokred.train.distill import match_features, match_layers, match_logits

B, S, D = 2, 7, 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


TEACHER = normal(B, S, D, seed=1)
KEEP = Keep(jnp.array([[0, 5, 2, 3], [0, 1, 6, 4]]), S)
MERGE = Assign(jnp.array([[0, 1, 2, 1, 4, 2, 3], [0, 3, 3, 3, 1, 2, 4]]), 4)  # 4: nobody


def student(map_=None, **fields):
    tokens = make_tokens(normal(B, S, D, seed=1), prefix=1)
    tokens = tokens if map_ is None else move(tokens, map_)
    return tokens.replace(x=normal(B, tokens.n, D, seed=2), **fields)


def by_loops(tokens: Tokens, teacher) -> float:
    x, source, errors = np.asarray(tokens.x), np.asarray(tokens.sources()), []
    for b in range(x.shape[0]):
        for slot in range(tokens.prefix, tokens.n):
            members = [s for s in range(source.shape[1]) if source[b, s] == slot]
            alive = tokens.valid is None or tokens.valid[b, slot]
            kept = tokens.policy is None or tokens.policy[b, slot] >= 0.5
            if members and alive and kept:
                errors.append(np.mean((x[b, slot] - np.asarray(teacher)[b, members].mean(0)) ** 2))
    return float(np.mean(errors)) if errors else 0.0


@pytest.mark.parametrize("map_", [None, KEEP, MERGE], ids=["all", "keep", "merge"])
def test_features_by_loops(map_):
    tokens = student(map_)
    got = jax.jit(match_features)(tokens, TEACHER)
    np.testing.assert_allclose(got, by_loops(tokens, TEACHER), rtol=1e-5)
    assert got.dtype == jnp.float32 and got > 0.1


def test_a_slot_that_stands_for_nothing_does_not_count():
    tokens = student(KEEP).replace(source=jnp.array([[0, -1, 3, 3, -1, 1, -1]] * B))
    want = by_loops(tokens, TEACHER)
    np.testing.assert_allclose(match_features(tokens, TEACHER), want, rtol=1e-5)
    spoilt = tokens.replace(x=tokens.x.at[:, 2].set(1e3))
    np.testing.assert_allclose(match_features(spoilt, TEACHER), want, rtol=1e-5)


def test_tokens_that_a_policy_drops_do_not_count():
    tokens = student(policy=jnp.array([[1.0, 1, 0, 0.4, 0.5, 1, 0], [1.0, 0, 0, 0, 0, 0, 1]]))
    want = by_loops(tokens, TEACHER)
    np.testing.assert_allclose(match_features(tokens, TEACHER), want, rtol=1e-5)
    assert abs(want - by_loops(student(), TEACHER)) > 1e-3


def test_padding_is_ignored():
    valid = jnp.arange(S)[None] < jnp.array([[7], [4]])
    tokens = make_tokens(normal(B, S, D, seed=2), valid=valid, prefix=1)
    padding = ~valid[..., None]
    tokens = tokens.replace(x=jnp.where(padding, jnp.nan, tokens.x))
    teacher = jnp.where(padding, jnp.nan, TEACHER)
    loss, slope = jax.value_and_grad(lambda x: match_features(tokens.replace(x=x), teacher))(
        tokens.x
    )
    np.testing.assert_allclose(loss, by_loops(tokens, teacher), rtol=1e-5)
    assert np.isfinite(slope).all() and not slope[1, 4:].any()


def test_a_merged_slot_that_is_invalid_is_ignored():
    tokens = student(MERGE, valid=jnp.array([[True, True, False, True]] * B))
    got = match_features(tokens, TEACHER)
    np.testing.assert_allclose(got, by_loops(tokens, TEACHER), rtol=1e-5)


def test_the_teacher_itself_gives_zero():
    tokens = make_tokens(TEACHER, prefix=1)
    assert match_features(tokens, TEACHER) == 0
    assert match_features(move(tokens, KEEP), TEACHER) == 0
    np.testing.assert_allclose(match_features(move(tokens, MERGE), TEACHER), 0, atol=1e-12)


def test_nothing_left_gives_zero():
    tokens = student(policy=jnp.zeros((B, S)))
    assert match_features(tokens, TEACHER) == 0


def test_features_move_the_student_alone():
    policy = jnp.full((B, S), 0.7)

    def loss(x, policy, teacher):
        return match_features(student(policy=policy).replace(x=x), teacher)

    of_x, *others = jax.grad(loss, argnums=(0, 1, 2))(student().x, policy, TEACHER)
    assert not any(g.any() for g in others)
    assert of_x[:, 1:].all() and not of_x[:, 0].any()
    np.testing.assert_allclose(
        of_x[:, 1:], 2 * (student().x - TEACHER)[:, 1:] / (B * (S - 1) * D), rtol=1e-5
    )


def test_low_precision_is_compared_in_float32():
    tokens, teacher = student(MERGE), TEACHER.astype(jnp.bfloat16)
    low = tokens.replace(x=tokens.x.astype(jnp.bfloat16))
    exact = low.replace(x=low.x.astype(jnp.float32))
    assert match_features(low, teacher) == match_features(exact, teacher.astype(jnp.float32))


def test_a_sharded_batch_only_sums():
    split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    tokens = make_tokens(normal(8, S, D), prefix=1)
    targets = jnp.broadcast_to(MERGE.target[0], (8, S))
    tokens = move(tokens, Assign(targets, 4)).replace(x=normal(8, 4, D, seed=2))
    teacher = normal(8, S, D, seed=1)
    parts = jax.device_put((tokens, teacher), split)
    both = jax.jit(jax.value_and_grad(match_features, allow_int=True))
    compiled = both.lower(*parts).compile()
    text = compiled.as_text() or ""
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text
    np.testing.assert_allclose(compiled(*parts)[0], by_loops(tokens, teacher), rtol=1e-5)


@pytest.mark.parametrize("shape", [(B, S, D + 1), (B, S - 1, D)])
def test_another_teacher_is_named(shape):
    with pytest.raises(ValueError, match=r"config\.distill\.features .* same width"):
        match_features(student(), jnp.zeros(shape))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_by_loops(temperature):
    given, wanted = normal(B, 5, seed=3), normal(B, 5, seed=4)
    softmax = lambda z: np.exp(z) / np.exp(z).sum()  # noqa: E731
    total = 0.0
    for s, t in zip(np.asarray(given), np.asarray(wanted), strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        total += temperature**2 * (p * np.log(p / q)).sum() / B
    got = match_logits(given, wanted, temperature=temperature)
    np.testing.assert_allclose(got, total, rtol=1e-5)
    assert match_logits(given, given, temperature=temperature) == 0


def test_logits_move_the_student_alone():
    given, wanted = normal(B, 5, seed=3), normal(B, 5, seed=4)
    to_student, to_teacher = jax.grad(match_logits, argnums=(0, 1))(given, wanted)
    slope = (jax.nn.softmax(given) - jax.nn.softmax(wanted)) / B
    np.testing.assert_allclose(to_student, slope, atol=1e-6)
    assert not to_teacher.any()


def test_logits_of_low_precision():
    given, wanted = (normal(B, 5, seed=s).astype(jnp.bfloat16) for s in (3, 4))
    wide = match_logits(given.astype(jnp.float32), wanted.astype(jnp.float32))
    assert match_logits(given, wanted) == wide and wide.dtype == jnp.float32


def test_bad_logits_are_named(unchecked):
    with pytest.raises(ValueError, match=r"config\.distill\.logits"):
        match_logits(jnp.zeros((B, 5)), jnp.zeros((B, 1)))
    with pytest.raises(ValueError, match=r"config\.distill\.temperature=0"):
        match_logits(jnp.zeros((B, 5)), jnp.zeros((B, 5)), temperature=0.0)


def test_layers():
    ours, theirs = (
        [normal(B, S, D, seed=i) for i in (3, 4)],
        [normal(B, S, D, seed=i) for i in (5, 6)],
    )
    want = np.mean([np.mean(np.square(a - b)) for a, b in zip(ours, theirs, strict=True)])
    half = [layer.astype(jnp.bfloat16) for layer in ours]
    assert jax.jit(match_layers)(half, theirs).dtype == jnp.float32
    loss, slopes = jax.value_and_grad(match_layers, (0, 1))(ours, theirs)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert all(slope.any() for slope in slopes[0]) and not any(slope.any() for slope in slopes[1])


def test_other_layers_are_refused(unchecked):
    ours = [normal(B, S, D)]
    for theirs in ([], ours * 2, [normal(B, S + 1, D)]):
        with pytest.raises(ValueError, match="match_layers: the teacher's layers"):
            match_layers(ours, theirs)
    with pytest.raises(ValueError, match="match_layers"):
        match_layers([], [])
