"""Text with the tokens of images in the places that its placeholders hold for them."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Float, Int

from tokred.fold import unfold
from tokred.ops import gather
from tokred.positions import v2pe_positions
from tokred.tokens import Tokens, make_tokens


@functools.partial(register_dataclass, data_fields=["tokens", "place", "after"], meta_fields=[])
@dataclass(frozen=True)
class Spliced:
    """tokens of text and images, M = N + I (K - 1) slots; extra['vision'] Bool[B M] and
    extra['frame'] Int[B M], the number of a token's image, -1 for text. place Int[B N]: where each
    id of the text is among them; of a placeholder, its image's last token. after Float[B]: the
    position that follows."""

    tokens: Tokens
    place: Any
    after: Any


def splice(
    text: Float[Array, "B N D"],
    holds: Bool[Array, "B N"],
    images: Tokens,
    *,
    valid: Bool[Array, "B N"] | None = None,
    step: float = 1.0,
    grid: tuple[int, int] | None = None,
) -> Spliced:
    """Every placeholder gives way to the K tokens of the next image; other tokens move apart.

    text: embedded ids. holds: which of them are placeholders. images: x [B I K D], perhaps with
    `valid`, `bias` and `policy`, under which those that it hides take no position; those that no
    placeholder holds a place for are left out. valid: of the text, padding
    on either side. Positions count valid tokens; step: that of an image's tokens, see
    `v2pe_positions`. grid: instead, an image takes as many positions as the grid has patches, and
    each of its tokens stands at the patch nearest to its own place, whatever is left of the others.
    Gathers along the sequence alone, so that a sharded batch stays local.
    Gradient: to text and images.
    """
    (b, n), (i, k) = holds.shape, images.x.shape[1:3]
    there = jnp.ones((b, n), bool) if valid is None else valid
    holds = holds & there & (jnp.cumsum(holds & there, -1) <= i)
    end = jnp.cumsum(jnp.where(there, jnp.where(holds, k, 1), 0), -1)
    slots = jnp.arange(n + i * (k - 1))
    past = end[:, None, :] <= slots[None, :, None]  # words that end before a slot
    word = past.sum(-1, dtype=jnp.int32)
    word = jnp.minimum(word, n - 1)
    of_word = lambda a: gather(a, word, axis=1)  # noqa: E731
    vision, number = of_word(holds), jnp.cumsum(holds, -1) - 1
    frame = jnp.where(vision, of_word(number), -1)
    offset = slots[None, :] - of_word(end) + jnp.where(vision, k, 1)
    index = jnp.where(vision, n + frame * k + offset, word)
    seen = jnp.ones((b, i, k), bool) if images.valid is None else images.valid
    real = slots[None, :] < end[:, -1:]
    real &= gather(jnp.concatenate([there, seen.reshape(b, -1)], 1), index, axis=1)
    x = gather(jnp.concatenate([text, unfold(images.x).astype(text.dtype)], 1), index, axis=1)
    bias = _beside_text(images.bias, n, index, text=0)
    policy = _beside_text(images.policy, n, index, text=1)
    open_ = real if policy is None else real & (policy > 0)
    extra = {"vision": vision & real, "frame": jnp.where(real, frame, -1)}
    if grid is None:
        position = _counted(open_, step, **extra)
        after = jnp.ceil(position.max(-1)) + 1
    else:
        room = jnp.where(there, jnp.where(holds, grid[0] * grid[1], 1), 0)
        inside = jnp.concatenate([jnp.zeros((b, n)), _nearest_patch(images, grid)], 1)
        position = of_word(jnp.cumsum(room, -1) - room) + gather(inside, index, axis=1)
        after = room.sum(-1).astype(jnp.float32)
    gates = {"bias": bias, "policy": policy, "policy_eps": images.policy_eps}
    tokens = make_tokens(x, valid=real, position=position[..., None], extra=extra, **gates)
    tokens = tokens.replace(ordered=grid is None and step > 0)
    return Spliced(tokens, _last(open_, position, end), after)


def _beside_text(
    images: Float[Array, "B I K"] | None, n: int, index: Int[Array, "B M"], *, text: float
) -> Float[Array, "B M"] | None:
    """What each token brings along, of the text the same everywhere."""
    if images is None:
        return None
    beside = jnp.full((len(images), n), text, images.dtype)
    return gather(jnp.concatenate([beside, unfold(images)], 1), index, axis=1)


def _nearest_patch(images: Tokens, grid: tuple[int, int]) -> Float[Array, "B L"]:
    """Number of the patch, row by row, of every token of all images of an example."""
    if images.position is None or images.position.shape[-1] != 2:
        raise ValueError(
            "VLM: image_positions='place' needs tokens with a row and a column; use 'count'."
        )
    last = jnp.array(grid, jnp.float32) - 1
    place = jnp.clip(jnp.round(images.positions()), 0, last.reshape(1, 1, 1, 2))
    return unfold(place[..., 0] * grid[1] + place[..., 1])


def _counted(real: Array, step: float, vision: Array, frame: Array) -> Float[Array, "B M"]:
    if step == 1.0:
        return jnp.maximum(jnp.cumsum(real, -1) - 1, 0).astype(jnp.float32)
    return v2pe_positions(vision, step, valid=real, image=frame)


def _last(
    real: Bool[Array, "B M"], position: Float[Array, "B M"], end: Int[Array, "B N"]
) -> Int[Array, "B N"]:
    """The slot of the valid token farthest on among those in front of each end, the first slot
    where there is none."""
    position = jnp.where(real, position, -1)
    farthest = real & (position == jax.lax.cummax(position, axis=1))
    last = jax.lax.cummax(jnp.where(farthest, jnp.arange(real.shape[1]), 0), axis=1)
    return gather(last, jnp.maximum(end - 1, 0), axis=1)


def check_prompt(
    ids: Int[Array, "B N"], image_id: int, given: Any, valid: Any, places: int
) -> None:
    """Raises ValueError where (concrete) prompts hold places for other images than there are.

    given: Bool[B I] which images there are, None for all `places` of them.
    """
    if any(isinstance(a, Tracer) for a in (ids, given, valid)):
        return
    holds = np.asarray(ids) == image_id
    holds = holds if valid is None else holds & np.asarray(valid)
    held = holds.sum(-1)
    there = np.full(len(held), places) if given is None else np.asarray(given).sum(-1)
    for row in np.flatnonzero(held != there)[:1]:
        what = "no image token" if held[row] == 0 else f"{held[row]} image tokens"
        raise ValueError(
            f"VLM: prompt {row} has {what} (id {image_id}) for {there[row]} images; put one where "
            "each image goes, or mark absent images in image_valid."
        )
