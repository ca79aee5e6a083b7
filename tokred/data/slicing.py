"""Large images of any shape as views of a size that an encoder knows: one overview, and slices.

    plan = plan_slices(image.shape[:2], base=336, patch=14, limit=9)
    overview, slices = slice_image(image, plan)
    views = stack_views(image, plan, places=10, size=(448, 448), patch=14)   of one static shape
    prompt = plan.prompt() + question                 # "<image>,<image>\\n...<image>What is ...?"

Plans are whole numbers, made on the host from an image's size alone. All pairs are (Y, X): pixels,
or rows and columns. Sources: thunlp/LLaVA-UHD `slice_image_minicpm`, whose plans these are, and
LLaVA-NeXT's anyres grids.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Num

from tokred.data.augment import resize
from tokred.data.conversations import IMAGE
from tokred.data.pairs import expect

Size = tuple[int, int]

ANYRES = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))  # LLaVA-NeXT's, in its order
IN_ROW, END_OF_ROW = ",", "\n"


@dataclass(frozen=True)
class SlicePlan:
    """How an image becomes views.

    overview: pixels of the whole image, made small. grid: rows and columns of slices, (0, 0) for
    none. slice: pixels of each. content: pixels of the image on the canvas that is cut into slices,
    in its middle. separators: the text behind each slice, in reading order. overview_first: whether
    a prompt begins with the overview, instead of ending with it.
    """

    overview: Size
    grid: Size = (0, 0)
    slice: Size = (0, 0)
    content: Size = (0, 0)
    separators: tuple[str, ...] = ()
    overview_first: bool = False

    @property
    def count(self) -> int:
        """How many slices."""
        return self.grid[0] * self.grid[1]

    @property
    def canvas(self) -> Size:
        """Pixels of all slices together."""
        return self.grid[0] * self.slice[0], self.grid[1] * self.slice[1]

    def prompt(self, image: str = IMAGE) -> str:
        """The text that holds a place for every view, in the order of `stack_views`."""
        slices = "".join(image + separator for separator in self.separators)
        return image + slices if self.overview_first else slices + image


def plan_slices(size: Size, *, base: int = 336, patch: int = 14, limit: int = 9) -> SlicePlan:
    """LLaVA-UHD's plan for an image of `size`: slices of a shape near to the image's own.

    base: about base x base pixels make a slice, and the overview; their sides are multiples of
    `patch`. limit: of slices; an image of at most one needs none. Of the grids with about as many
    slices as the image has such areas, the one whose ratio of sides is nearest to the image's.

    Raises:
      ValueError: a number below 1.
    """
    _check_size(size)
    for name, value in (("base", base), ("patch", patch), ("limit", limit)):
        expect(value >= 1, name, "at least 1", value)
    overview = _scaled(size, base, patch)
    count = min(math.ceil(size[0] * size[1] / base**2), limit)
    if count <= 1:
        return SlicePlan(overview)
    counts = [n for n in (count - 1, count, count + 1) if 1 < n <= limit]
    rows, columns = _nearest_grid(size, counts)
    part = _scaled((max(size[0] // rows, 1), max(size[1] // columns, 1)), base, patch)
    canvas = rows * part[0], columns * part[1]
    ends = (*(IN_ROW,) * (columns - 1), END_OF_ROW) * rows
    return SlicePlan(overview, (rows, columns), part, canvas, ends)


def _scaled(size: Size, base: int, patch: int) -> Size:
    """Sides of about base x base pixels in the ratio of `size`, cut to multiples of `patch`."""
    ratio = size[1] / size[0]
    y = int(base / math.sqrt(ratio))
    x = int(y * ratio)
    return max(y // patch, 1) * patch, max(x // patch, 1) * patch


def _nearest_grid(size: Size, counts: Sequence[int]) -> Size:
    """The (rows, columns) of so many slices whose ratio is nearest; the first of equals."""
    grids = [(n // m, m) for n in counts for m in range(1, n + 1) if n % m == 0]
    ratio = math.log(size[1] / size[0])
    return min(grids, key=lambda grid: abs(ratio - math.log(grid[1] / grid[0])))


def plan_anyres(size: Size, *, base: int = 336, grids: Sequence[Size] = ANYRES) -> SlicePlan:
    """LLaVA-NeXT's plan: base x base slices of the best of a few grids, in which the image keeps
    its shape, on zeros; in the overview it does not. No separators; the overview comes first.

    Raises:
      ValueError: a number below 1, or no grids.
    """
    grid = best_grid(size, base=base, grids=grids)
    canvas = grid[0] * base, grid[1] * base
    scale = [whole / side for whole, side in zip(canvas, size, strict=True)]
    if scale[1] < scale[0]:
        content = min(math.ceil(size[0] * scale[1]), canvas[0]), canvas[1]
    else:
        content = canvas[0], min(math.ceil(size[1] * scale[0]), canvas[1])
    ends = ("",) * (grid[0] * grid[1])
    return SlicePlan((base, base), grid, (base, base), content, ends, overview_first=True)


def best_grid(size: Size, *, base: int = 336, grids: Sequence[Size] = ANYRES) -> Size:
    """Of the candidate (rows, columns) of base x base pixels the one in which most of the image's
    pixels survive, and of those that which leaves least unused; the first of equals.

    Raises:
      ValueError: a number below 1, or no grids.
    """
    _check_size(size)
    expect(base >= 1, "base", "at least 1", base)
    right = len(grids) > 0 and all(min(grid) >= 1 for grid in grids)
    expect(right, "grids", "pairs of rows and columns from 1 on", grids)

    def worth(grid: Size) -> tuple[int, int]:
        y, x = grid[0] * base, grid[1] * base
        scale = min(y / size[0], x / size[1])
        used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return used, used - y * x

    return max(grids, key=worth)


def slice_image(
    image: Num[np.ndarray, "Y X C"], plan: SlicePlan
) -> tuple[Num[np.ndarray, "y x C"], Num[np.ndarray, "n v u C"]]:
    """(overview, slices in reading order) of an image, float or uint8 as `augment.resize` takes.

    Resizing is bicubic with antialiasing, once from the original to each of the two: the official
    filter, on uint8 with its rounding; floats are neither rounded nor clipped.
    """
    overview = resize(image, *plan.overview)
    if plan.count == 0:
        return overview, np.zeros((0, *overview.shape), overview.dtype)
    content = resize(image, *plan.content)
    canvas = np.zeros((*plan.canvas, content.shape[-1]), content.dtype)
    top, left = ((a - b) // 2 for a, b in zip(plan.canvas, plan.content, strict=True))
    canvas[top : top + plan.content[0], left : left + plan.content[1]] = content
    (rows, columns), (y, x) = plan.grid, plan.slice
    parts = canvas.reshape(rows, y, columns, x, -1).swapaxes(1, 2)
    return overview, parts.reshape(plan.count, y, x, -1)


class Views(NamedTuple):
    """Views in places of one static shape: image_valid, which places hold one; patch_valid, which
    patches of each are real, row after row, as `ViT` takes them."""

    image: Float32[np.ndarray, "I Y X C"]
    image_valid: Bool[np.ndarray, " I"]
    patch_valid: Bool[np.ndarray, "I P"]


def stack_views(
    image: Num[np.ndarray, "Y X C"], plan: SlicePlan, *, places: int, size: Size, patch: int
) -> Views:
    """All views of an image in the first of `places`, each in the upper left corner of a `size` of
    zeros: images of different sizes make one batch. For normalised images, where 0 is grey.

    places, size: as `room_for` gives them for a batch or a data set. patch: side of a patch.

    Raises:
      ValueError: more views than places, a view larger than `size`, or sides that are no multiples
        of `patch`.
    """
    count = plan.count + 1
    expect(places >= count, "places", f"at least {count} for this image", places)
    expect(patch >= 1, "patch", "at least 1", patch)
    for side in (*size, *plan.overview, *plan.slice):
        expect(side % patch == 0, "patch", f"a divisor of the {side} pixels of a view", patch)
    overview, slices = slice_image(image, plan)
    views = [overview, *slices] if plan.overview_first else [*slices, overview]
    stacked = np.zeros((places, *size, overview.shape[-1]), np.float32)
    real = np.zeros((places, size[0] // patch, size[1] // patch), bool)
    for place, view in enumerate(views):
        y, x = view.shape[:2]
        expect(y <= size[0] and x <= size[1], "size", f"at least {(y, x)} for this image", size)
        stacked[place, :y, :x] = view
        real[place, : y // patch, : x // patch] = True
    return Views(stacked, np.arange(places) < count, real.reshape(places, -1))


class Bucket(NamedTuple):
    """Images that share a batch: their numbers, and what `stack_views` needs for them."""

    indices: tuple[int, ...]
    places: int
    size: Size


def room_for(plans: Sequence[SlicePlan]) -> tuple[int, Size]:
    """(places, size) that hold the views of any of these plans.

    Raises:
      ValueError: no plans.
    """
    expect(len(plans) > 0, "plans", "at least one", plans)
    ys, xs = zip(*(view for plan in plans for view in (plan.overview, plan.slice)), strict=True)
    return 1 + max(plan.count for plan in plans), (max(ys), max(xs))


def bucket_by_grid(plans: Sequence[SlicePlan]) -> dict[Size, Bucket]:
    """Which images have which grid: in a bucket no place is empty, and views differ in their sides
    alone. A program is compiled for each bucket; `room_for` all plans makes it a single one."""
    members = defaultdict(list)
    for index, plan in enumerate(plans):
        members[plan.grid].append(index)
    room = {grid: room_for([plans[i] for i in own]) for grid, own in members.items()}
    return {grid: Bucket(tuple(own), *room[grid]) for grid, own in members.items()}


def _check_size(size: Size) -> None:
    right = len(size) == 2 and min(size) >= 1
    expect(right, "size", "an image's height and width, from 1 pixel on", size)
