"""Every fast form is its matrix; maps compose, restore and tell where tokens went."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.algebra.random_maps import KINDS, make_map, normal
from tokred.fold import fold, unfold, window_order
from tokred.maps import Assign, Keep, Mix, compose, follow

B, H, N, M, K, D = 2, 3, 6, 5, 4, 2
SHAPES = {  # name: (array, token axis); the map's leading axes are (B,), or (B, 1) where lifted
    "default": ((B, N, D), None),
    "last": ((B, N), -1),
    "deep": ((B, N, H, D), 1),
    "leading": ((H, B, N, D), 2),
    "lifted": ((B, H, N, D), 2),
}
seeds = st.integers(0, 2**31)
few = settings(max_examples=4)
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@functools.partial(jax.jit, static_argnums=3)
def apply_all(map_, arrays, weight, how):
    weights = {False: weight, True: None if weight is None else weight[:, None]}
    return {
        name: (map_.lift() if name == "lifted" else map_).apply(
            x, how, weight=weights[name == "lifted"], axis=SHAPES[name][1]
        )
        for name, x in arrays.items()
    }


def by_matrix(map_, x, how, weight, name):
    """The same by numpy loops over [K N], tokens moved to the front."""
    lifted, axis = name == "lifted", SHAPES[name][1]
    axis = 1 if axis is None else axis % x.ndim
    dense = np.asarray(map_.dense(), np.float64)
    out = np.zeros((*x.shape[:axis], map_.k, *x.shape[axis + 1 :]))
    for where in np.ndindex(x.shape[:axis]):
        b = where[0] if lifted else where[-1]
        w = np.ones(N) if weight is None else np.asarray(weight[b])
        out[where] = one_example(dense[b], np.asarray(x[where]), how, w)
    return out


def one_example(dense, x, how, weight):
    if how == "max":
        groups = [x[row > 0] for row in dense]
        return np.stack([g.max(0) if len(g) else np.zeros(x.shape[1:]) for g in groups])
    matrix = dense * weight
    if how in ("mean", "weighted"):
        mass = matrix.sum(-1, keepdims=True)
        matrix = matrix / np.where(mass == 0, 1, mass)
    return np.tensordot(matrix, x, 1)


HOWS = ("sum", "mean", "weighted", "weighted_sum", "max")
CASES = [
    (kind, how)
    for kind, how in itertools.product(KINDS, HOWS)
    if (kind, how) != ("mix", "max") and (kind, how) not in {("mix", "mean"), ("mix", "weighted")}
]


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize(("kind", "how"), CASES)
@given(seed=seeds)
@few
def test_the_fast_form_is_the_matrix(kind, how, valid, seed):
    rng = np.random.default_rng(seed)
    map_ = make_map(kind, rng, (B,), N, K, valid)
    arrays = {name: normal(rng, *shape) for name, (shape, _) in SHAPES.items()}
    weight = jnp.asarray(rng.random((B, N)) + 0.1, jnp.float32) if "weighted" in how else None
    for name, y in apply_all(map_, arrays, weight, how).items():
        close(y, by_matrix(map_, arrays[name], how, weight, name), err_msg=name)


@pytest.mark.parametrize("how", ["mean", "weighted"])
def test_the_mean_of_a_mix_divides_by_its_row_mass(how):
    rng = np.random.default_rng(0)
    map_ = Mix(jnp.asarray(rng.random((B, K, N)), jnp.float32))
    weight = jnp.asarray(rng.random((B, N)), jnp.float32) if how == "weighted" else None
    x = normal(rng, B, N, D)
    close(map_.apply(x, how, weight=weight), by_matrix(map_, x, how, weight, "default"))


@pytest.mark.parametrize("kind", ["keep", "assign", "several"])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.bfloat16])
def test_keep_copies_rows_of_any_type(kind, dtype):
    rng = np.random.default_rng(1)
    map_ = make_map(kind, rng, (B,), N, K, True)
    assert not isinstance(map_, Mix)
    tree = {"a": normal(rng, B, N, D).astype(dtype), "b": (normal(rng, B, N).astype(dtype), None)}
    moved = map_.apply(tree, "keep")
    assert moved["b"][1] is None
    for old, new in ((tree["a"], moved["a"]), (tree["b"][0], moved["b"][0])):
        assert new.dtype == dtype
        wanted = np.asarray(old)[np.arange(B)[:, None], map_.index]
        wanted[~np.asarray(map_.valid)] = 0
        np.testing.assert_array_equal(new, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_integers_are_not_rounded(kind):
    rng = np.random.default_rng(2)
    map_ = make_map(kind, rng, (B,), N, K, False)
    weight = jnp.full((B, N), 0.5)
    ints = jnp.ones((B, N), jnp.int32)
    close(map_.apply(ints, "weighted_sum", weight=weight), map_.sizes() / 2)


def test_counts_stay_integers():
    map_ = Assign(jnp.array([[0, 0, 1]]), 2)
    assert map_.apply(jnp.array([[1, 2, 3]]), "sum").dtype == jnp.int32
    assert map_.apply(jnp.array([[True, True, False]]), "sum").tolist() == [[2.0, 0.0]]


def test_the_maximum_of_several_groups_may_be_negative():
    map_ = Assign(jnp.array([[0, 1], [1, 2]]), 2, several=True)
    assert map_.apply(jnp.array([-3.0, -1.0]), "max").tolist() == [-3.0, -1.0]


PAIRS = [
    *itertools.product(itertools.product(("keep", "assign", "mix"), repeat=2), (False, True)),
    *itertools.product(itertools.product(("keep", "weighted", "several"), repeat=2), (True,)),
]


@pytest.mark.parametrize(("pair", "valid"), PAIRS)
@given(seed=seeds)
@settings(max_examples=3)
def test_composition_is_one_after_the_other(pair, valid, seed):
    rng = np.random.default_rng(seed)
    first = make_map(pair[0], rng, (B,), N, M, valid)
    second = make_map(pair[1], rng, (B,), M, K, valid)
    x = normal(rng, B, N, D)
    close(*one_and_two_steps(first, second, x))


@jax.jit
def one_and_two_steps(first, second, x):
    two = second.apply(first.apply(x, "sum"), "sum")
    return compose(first, second).apply(x, "sum"), two


SINGLE = ("keep", "assign")


@pytest.mark.parametrize("kinds", list(itertools.product(SINGLE, repeat=3)), ids="-".join)
@given(seed=seeds)
@few
def test_a_chain_is_restored(kinds, seed):
    rng = np.random.default_rng(seed)
    sizes = (N + 2, N, M, K)
    maps = [
        make_map(kind, rng, (B,), n, k, True)
        for kind, n, k in zip(kinds, sizes[:-1], sizes[1:], strict=True)
    ]
    x = normal(rng, B, sizes[0], D)
    where, y, restored, filled = run_chain(maps, x)
    wanted = np.asarray(x).copy()
    zeros = np.zeros_like(wanted)
    for b, n in np.ndindex(where.shape):
        at = n
        for map_ in maps:
            at = at if at < 0 else int(map_.source[b, at])
        assert where[b, n] == at
        if at >= 0:
            wanted[b, n] = zeros[b, n] = y[b, at]
    np.testing.assert_array_equal(restored, zeros)
    np.testing.assert_array_equal(filled, wanted)
    if set(kinds) == {"keep"}:
        np.testing.assert_array_equal(filled, x)


@jax.jit
def run_chain(maps, x):
    whole, y = functools.reduce(compose, maps), x
    where = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    for map_ in maps:
        y, where = map_.apply(y), follow(where, map_)
    return where, y, whole.restore(y), whole.restore(y, fill=x)


@pytest.mark.parametrize("kind", ["keep", "assign", "weighted"])
@given(seed=seeds)
@few
def test_source_sizes_and_matrix_agree(kind, seed):
    rng = np.random.default_rng(seed)
    map_ = make_map(kind, rng, (B,), N, K, True)
    dense = np.asarray(map_.dense())
    where = np.where(dense.max(1) > 0, dense.argmax(1), -1)
    np.testing.assert_array_equal(map_.source, where)
    np.testing.assert_array_equal(Mix(jnp.asarray(dense)).source, where)
    if kind != "weighted":
        np.testing.assert_array_equal(map_.sizes().sum(-1), (where >= 0).sum(-1))


def test_restore_follows_the_token_axis():
    rng = np.random.default_rng(3)
    map_ = make_map("keep", rng, (B,), N, K, True)
    x = normal(rng, B, H, N, D)
    lifted = map_.lift()
    restored = lifted.restore(lifted.apply(x, axis=2), axis=-2)
    gone = np.broadcast_to((np.asarray(map_.source) < 0)[:, None, :, None], x.shape)
    np.testing.assert_array_equal(restored, np.where(gone, 0, x))


def test_a_mix_restores_by_its_own_matrix():
    rng = np.random.default_rng(4)
    back = normal(rng, B, N, K)
    y = normal(rng, B, K, D)
    close(Mix(normal(rng, B, K, N), back=back).restore(y), np.asarray(back) @ np.asarray(y))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_what_is_moved(kind):
    rng = np.random.default_rng(5)
    map_ = make_map(kind, rng, (B,), N, K, True)
    x, pull = normal(rng, B, N, D), normal(rng, B, K, D)
    weight = jnp.asarray(rng.random((B, N)) + 0.1, jnp.float32)

    def fast(x, weight):
        return (map_.apply(x, "weighted_sum", weight=weight) * pull).sum()

    def dense(x, weight):
        return ((map_.dense() * weight[:, None]) @ x * pull).sum()

    for got, wanted in zip(
        jax.grad(fast, (0, 1))(x, weight), jax.grad(dense, (0, 1))(x, weight), strict=True
    ):
        close(got, wanted)


def test_the_gradient_of_restore_reaches_rows_and_fill():
    map_ = Keep(jnp.array([[2, 0]]), 3)
    loss = lambda y, fill: map_.restore(y, fill).sum()  # noqa: E731
    rows, fill = jax.grad(loss, (0, 1))(jnp.ones((1, 2)), jnp.ones((1, 3)))
    assert rows.tolist() == [[1, 1]]
    assert fill.tolist() == [[0, 1, 0]]


def test_windows_fold_and_unfold():
    order = window_order((4, 6), (2, 3))
    windows = fold(Keep(order[None], 24).apply(jnp.arange(24)[None]), 4)
    assert windows.shape == (1, 4, 6)
    assert windows[0, 1].tolist() == [3, 4, 5, 9, 10, 11]
    assert unfold(windows).tolist() == [order.tolist()]


def bad_calls():
    keep, assign = Keep(jnp.array([[0, 1]]), 3), Assign(jnp.array([[0, 1, 1]]), 2)
    mix, x = Mix(jnp.ones((1, 2, 3))), jnp.ones((1, 3))
    return {
        "how='best' is unknown": lambda: keep.apply(x, "best"),
        "needs weight=": lambda: keep.apply(x, "weighted"),
        "takes no weight=": lambda: assign.apply(x, "mean", weight=x),
        "3 tokens does not fit token axis 1 of the array (1, 4)": lambda: keep.apply(
            jnp.ones((1, 4))
        ),
        "token axis 0": lambda: mix.apply(jnp.ones((3, 2)), axis=0),
        "token axis 1 of the array (3,)": lambda: mix.apply(jnp.ones(3)),
        "2 tokens does not fit": lambda: keep.restore(x),
        "needs index=": lambda: assign.apply(x, "keep"),
        "has no meaning for a matrix": lambda: mix.apply(x, "max"),
        "no back= matrix": lambda: mix.restore(jnp.ones((1, 2))),
        "gives 2 tokens, the second takes 3": lambda: compose(keep, mix),
        "do not divide into 2 groups": lambda: fold(x, 2),
        "does not divide grid": lambda: window_order((3, 3), (2, 2)),
    }


@pytest.mark.parametrize("words", list(bad_calls()))
def test_errors_are_one_sentence(words):
    with pytest.raises(ValueError) as error:
        bad_calls()[words]()
    message = str(error.value)
    assert words in message
    assert message.endswith(".") and "\n" not in message and ". " not in message
