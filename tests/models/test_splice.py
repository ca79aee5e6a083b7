"""Text with images in place, against a loop over lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred.models.splice import check_prompt, splice
from tokred.tokens import Tokens

IMAGE, PAD = 9, 0
PROMPTS = {
    "anywhere": [[1, 9, 2, 3, 9], [9, 9, 1, 2, 3]],
    "padded": [[9, 1, 2, 0, 0], [0, 0, 0, 4, 5]],
    "none": [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]],
}


def by_hand(ids, valid, images, seen):
    """(values, positions, frame) of the real tokens, and the last slot behind each id."""
    row, place, frame, number = [], [], [], 0
    for token, real in zip(ids, valid, strict=True):
        if real and token == IMAGE:
            kept = [x for x, there in zip(images[number], seen[number], strict=True) if there]
            row += kept
            frame += [number] * len(kept)
            number += 1
        elif real:
            row.append(float(token))
            frame.append(-1)
        place.append(len(row) - 1)
    return row, place, frame


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("hidden", [False, True])
def test_splice_is_a_loop_over_lists(name, hidden):
    ids = np.asarray(PROMPTS[name])
    valid, k = ids != PAD, 3
    values = 100.0 + np.arange(2 * 2 * k).reshape(2, 2, k)
    seen = np.ones((2, 2, k), bool)
    seen[..., 2] = not hidden
    images = Tokens(jnp.asarray(values)[..., None], valid=jnp.asarray(seen))
    text = jnp.asarray(ids, jnp.float32)[..., None]
    out = jax.jit(splice)(text, ids == IMAGE, images, valid=jnp.asarray(valid))
    tokens = out.tokens
    assert tokens.n == 5 + 2 * (k - 1) and tokens.ordered
    for b in range(2):
        real = np.asarray(tokens.valid[b])
        row, place, frame = by_hand(ids[b], valid[b], values[b], seen[b])
        np.testing.assert_array_equal(tokens.x[b, real, 0], row)
        np.testing.assert_array_equal(tokens.position[b, real, 0], np.arange(len(row)))
        np.testing.assert_array_equal(tokens.extra["frame"][b, real], frame)
        np.testing.assert_array_equal(
            tokens.extra["vision"][b], np.asarray(tokens.extra["frame"][b]) >= 0
        )
        slots = np.flatnonzero(real)
        for t in np.flatnonzero(valid[b]):
            assert int(out.place[b, t]) == slots[place[t]]


def test_small_steps_of_images_are_positions():
    ids = jnp.asarray([[1, 9, 2]])
    images = Tokens(jnp.zeros((1, 1, 4, 2)))
    out = splice(jnp.zeros((1, 3, 2)), ids == 9, images, step=0.25)
    np.testing.assert_allclose(out.tokens.position[0, :, 0], [0, 0.25, 0.5, 0.75, 1, 2])


def test_prompts_with_other_images_than_there_are_are_refused():
    ids = jnp.asarray([[1, 9, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match=r"prompt 1 has no image token .* for 1 images"):
        check_prompt(ids, 9, None, None, 1)
    with pytest.raises(ValueError, match=r"prompt 0 has 1 image tokens .* for 2 images"):
        check_prompt(ids, 9, None, None, 2)
    check_prompt(ids, 9, jnp.asarray([[True], [False]]), None, 1)


def test_tokens_may_stand_where_they_are_in_the_image():
    """Two of four patches of a 2 x 2 grid, the second between both of its row: text goes on behind
    the whole grid."""
    ids = jnp.array([[1, 9, 2, 3]])
    place = jnp.array([[[[0.0, 1.0], [1.0, 0.4]]]])
    images = Tokens(jnp.ones((1, 1, 2, 1)), position=place)
    text = ids.astype(jnp.float32)[..., None]
    out = splice(text, ids == IMAGE, images, grid=(2, 2)).tokens
    assert out.position[0, :, 0].tolist() == [0, 2, 3, 5, 6]


def test_whole_images_stand_as_they_are_counted():
    ids = jnp.asarray(PROMPTS["padded"])
    place = jnp.stack(jnp.meshgrid(jnp.arange(2.0), jnp.arange(3.0), indexing="ij"), -1)
    images = Tokens(jnp.ones((2, 2, 6, 1)), position=place.reshape(1, 1, 6, 2))
    valid = ids != PAD
    text = jnp.asarray(ids, jnp.float32)[..., None]
    counted = splice(text, ids == IMAGE, images, valid=valid).tokens
    placed = splice(text, ids == IMAGE, images, valid=valid, grid=(2, 3)).tokens
    np.testing.assert_array_equal(counted.position, placed.position)
    assert counted.ordered and not placed.ordered


def test_tokens_without_a_place_cannot_stand_there():
    with pytest.raises(ValueError, match="needs tokens with a row and a column"):
        splice(
            jnp.ones((1, 1, 1)), jnp.ones((1, 1), bool), Tokens(jnp.ones((1, 1, 2, 1))), grid=(1, 2)
        )
