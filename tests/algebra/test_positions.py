"""V2PE: runs, images, padding, fractions that have no binary form, half precision refused."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred.positions import check_positions, v2pe_positions

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
positions = jax.jit(v2pe_positions)


def by_hand(groups: list[int], step: Fraction) -> list[Fraction]:
    """groups: -1 text, else the number of the image."""
    place, found = Fraction(-1), []
    for i, group in enumerate(groups):
        if i and groups[i - 1] >= 0 and group != groups[i - 1]:
            place = Fraction(math.ceil(place))
        place += 1 if group < 0 else step
        found.append(place)
    return found


GROUPS = [-1, -1, 0, 0, 0, -1, 1, 1, 2, 2, 2, 2, -1, 3, -1]


@pytest.mark.parametrize("step", ["1", "1/4", "1/256", "1/10", "3/10", "7/10", "3/5"])
@pytest.mark.parametrize("groups", [GROUPS, [0, *GROUPS], GROUPS[2:5], [-1] * 4])
def test_runs(groups, step):
    image = jnp.asarray([groups])
    want = by_hand(groups, Fraction(step))
    got = positions(image >= 0, float(Fraction(step)), image=image)
    assert got.dtype == jnp.float32
    close(got[0], np.array(want, float))


def test_images_side_by_side_are_one_run_without_their_number():
    together = [min(g, 0) if g < 0 else (0 if g < 1 else 1 if g < 3 else 3) for g in GROUPS]
    got = positions(jnp.asarray([GROUPS]) >= 0, 0.3)
    close(got[0], np.array(by_hand(together, Fraction(3, 10)), float))


def test_a_step_of_one_counts_tokens():
    vision = jax.random.bernoulli(jax.random.key(0), 0.5, (3, 40))
    np.testing.assert_array_equal(positions(vision, 1.0), np.arange(40)[None] + np.zeros((3, 1)))


@pytest.mark.parametrize("step", [0.09, 0.15, 0.3, 0.36, 0.6, 0.72])
def test_whole_numbers_are_not_passed_by_rounding(step):
    """Of m steps of 0.3, every tenth ends on a whole number."""
    total = Fraction(str(step))
    for m in (m for m in range(1, 400) if (total * m).denominator == 1):
        got = positions(jnp.arange(400)[None] < m, step)
        assert float(got[0, m]) == total * m


def test_every_image_may_have_its_step():
    vision, step = jnp.array([[1, 1, 0, 1, 1]], bool), jnp.array([[0.25, 0.25, 9.0, 0.5, 0.5]])
    close(positions(vision, step), [[-0.75, -0.5, 1.0, 1.5, 2.0]])
    rows = positions(jnp.tile(vision, (2, 1)), jnp.array([[0.25], [1.0]]))
    close(rows, [[-0.75, -0.5, 1.0, 1.25, 1.5], [0.0, 1.0, 2.0, 3.0, 4.0]])


def test_padding_anywhere_moves_nothing():
    image = jnp.asarray([GROUPS])
    want = positions(image >= 0, 0.25, image=image)[0]
    holes = np.sort(np.random.default_rng(0).permutation(22)[:15])
    spread = jnp.full((1, 22), 7).at[0, holes].set(image[0])
    valid = jnp.zeros((1, 22), bool).at[0, holes].set(True)
    got = positions(spread >= 0, 0.25, image=spread, valid=valid)[0]
    close(got[holes], want)
    assert (np.delete(got, holes) == -1).all()


def test_half_precision_is_refused():
    vision = jnp.ones((1, 4), bool)
    for kind in (jnp.bfloat16, jnp.float16):
        with pytest.raises(TypeError, match=f"step is {jnp.dtype(kind).name}"):
            v2pe_positions(vision, jnp.full((1, 4), 0.25, kind))
    check_positions(position=jnp.ones(3), step=0.5)
    with pytest.raises(TypeError, match="keep it in float32"):
        check_positions(position=jnp.ones(3, jnp.bfloat16))
