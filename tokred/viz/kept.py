"""Which tokens were kept, merged and dropped, layer by layer, painted over the images."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from tokred.viz.style import DPI, FAINT, LABEL, PALETTE, SMALL, TITLE, new_figure, save

Picture = Float[np.ndarray, "P Q 3"]
Cells = Int[np.ndarray, "h w"]

GONE, ALONE, OUTSIDE = -1, -2, -3  # labels of what belongs to no merged group
CELL = 24  # smallest side of a painted patch in pixels
SLATE, SLATE_COVER = (0.33, 0.35, 0.40), 0.88  # stays apart from a black background
GROUP_COVER, GROUP_EDGE = 0.5, 2


def plot_tokens(
    images: Float[Array | np.ndarray, "M H W C"],
    sources: Sequence[Integer[Array | np.ndarray, "M S"]],
    *,
    grid: tuple[int, int],
    prefix: int,
    path: str | PathLike,
    titles: Sequence[str] | None = None,
    masks: Bool[Array | np.ndarray, "M H W"] | None = None,
) -> None:
    """A row per image, a column for the input and one per layer, written to `path`.

    images: C is 1 or 3; each is stretched from its smallest to its largest value. sources: per
    layer, where each original token is now, -1 = gone; S = prefix + rows x columns of `grid`.
    titles: one per layer, default 'layer 1', …; the number of tokens left, without the prefix, is
    added to them. masks: relevant pixels, drawn as an outline. Patches that are gone are dimmed,
    those that share a token share a colour, the others are plain. Touching groups differ in
    colour, distant ones may have the same.

    Raises:
      ValueError: shapes that do not fit, values that are not finite or below -1.
      TypeError: sources that are no integers.
      ImportError: without matplotlib.
    """
    images, sources = np.asarray(images), [np.asarray(source) for source in sources]
    masks = None if masks is None else np.asarray(masks, bool)
    titles = [f"layer {i + 1}" for i in range(len(sources))] if titles is None else list(titles)
    _check_images(images, masks)
    _check_sources(sources, (len(images), prefix + grid[0] * grid[1]))
    if len(titles) != len(sources):
        raise ValueError(
            f"titles must hold one title per layer, {len(sources)}, got {len(titles)}: "
            "change titles."
        )
    heads = [f"input\n{grid[0] * grid[1]} tokens"]
    heads += [f"{t}\n{count_left(s, prefix)} left" for t, s in zip(titles, sources, strict=True)]
    rows = [
        paint_tokens(
            image,
            [source[i] for source in sources],
            grid=grid,
            prefix=prefix,
            mask=None if masks is None else masks[i],
        )
        for i, image in enumerate(images)
    ]
    _draw(rows, heads, masks is not None, path)


def count_left(source: Integer[np.ndarray, "M S"], prefix: int) -> str:
    """How many tokens hold patches and no prefix token; a range where images differ."""
    counts = [len(set(row[prefix:]) - {*row[:prefix], GONE}) for row in source]
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low}–{high}"


def paint_tokens(
    image: Float[np.ndarray, "H W C"],
    sources: Sequence[Integer[np.ndarray, " S"]],
    *,
    grid: tuple[int, int],
    prefix: int,
    mask: Bool[np.ndarray, "H W"] | None = None,
) -> list[Picture]:
    """The pictures of one image, RGB in [0, 1]: the input, then one per layer.

    Arguments as those of plot_tokens for one image. A group keeps its colour from layer to layer
    unless it comes to touch another of that colour.
    """
    cell = max(CELL, -(-image.shape[0] // grid[0]), -(-image.shape[1] // grid[1]))
    size = (grid[0] * cell, grid[1] * cell)
    base = _resize(stretch(image), size)
    outline = None if mask is None else _resize(mask, size)
    pictures, colours = [base], np.full(grid, -1)
    for source in sources:
        labels = label_cells(source, grid, prefix)
        colours = colour_groups(labels, colours)
        pictures.append(_paint(base, _resize(labels, size), _resize(colours, size)))
    return [_paint_outline(picture, outline) for picture in pictures]


def stretch(image: Float[np.ndarray, "H W C"]) -> Picture:
    """RGB in [0, 1] from the smallest to the largest value; a constant image is mid-grey."""
    image = image.astype(np.float64)
    low, high = image.min(), image.max()
    image = (image - low) / (high - low) if high > low else np.full_like(image, 0.5)
    return np.broadcast_to(image, (*image.shape[:2], 3))


def label_cells(source: Integer[np.ndarray, " S"], grid: tuple[int, int], prefix: int) -> Cells:
    """Per patch: GONE, ALONE, or the token that it shares with other originals."""
    source = source.astype(np.int64)
    members = np.bincount(source[source >= 0], minlength=1)
    where = source[prefix:].reshape(grid)
    labels = np.where(members[np.maximum(where, 0)] > 1, where, ALONE)
    return np.where(where < 0, GONE, labels)


def colour_groups(labels: Cells, before: Cells) -> Cells:
    """A colour per cell (-1 = none): touching groups differ, colours of the layer before stay."""
    colours = np.full(labels.shape, -1)
    groups, sizes = np.unique(labels[labels >= 0], return_counts=True)
    for group in groups[np.argsort(-sizes, kind="stable")]:
        members = labels == group
        colours[members] = _choose_colour(members, colours, before)
    return colours


def _choose_colour(members: Bool[np.ndarray, "h w"], colours: Cells, before: Cells) -> int:
    every = range(len(PALETTE))
    near = set(colours[_grow(members, 1)].tolist())
    free = [colour for colour in every if colour not in near] or list(every)
    inherited = [int((before[members] == colour).sum()) for colour in every]
    used = [int((colours == colour).sum()) for colour in every]
    return max(free, key=lambda colour: (inherited[colour], -used[colour]))


def _paint(base: Picture, labels: Cells, colours: Cells) -> Picture:
    picture = base.copy()
    gone, merged = labels == GONE, colours >= 0
    picture[gone] += SLATE_COVER * (np.array(SLATE) - picture[gone])
    cover = np.where(_borders(labels, GROUP_EDGE), 1.0, GROUP_COVER)[merged][:, None]
    picture[merged] += cover * (_rgb()[colours[merged]] - picture[merged])
    return picture


def _paint_outline(picture: Picture, mask: Bool[np.ndarray, "H W"] | None) -> Picture:
    """A white line just inside the mask and a black one just outside, seen on any ground."""
    if mask is None:
        return picture
    picture = picture.copy()
    picture[_borders(mask, 2) & mask] = 1
    picture[_grow(mask, 1) & ~mask] = 0
    return picture


def _rgb() -> Float[np.ndarray, "colours 3"]:
    return np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in PALETTE])


def _resize(array: Any, size: tuple[int, int]) -> Any:
    """Nearest neighbour over the first two axes."""
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, array.shape, strict=False))
    return array[rows[:, None], columns]


def _shifts(array: Any, by: int) -> list[Any]:
    """The array moved by up to `by` in each direction; outside is no label and no mask."""
    h, w = array.shape
    padded = np.pad(array, by, constant_values=False if array.dtype == bool else OUTSIDE)
    steps = range(2 * by + 1)
    return [padded[y : y + h, x : x + w] for y in steps for x in steps]


def _grow(mask: Bool[np.ndarray, "h w"], by: int) -> Bool[np.ndarray, "h w"]:
    return np.any(_shifts(mask, by), axis=0)


def _borders(labels: Any, width: int) -> Bool[np.ndarray, "h w"]:
    """Where another label is at most `width` away."""
    return np.any([labels != moved for moved in _shifts(labels, width)], axis=0)


def _draw(rows: list[list[Picture]], heads: Sequence[str], masked: bool, path: Any) -> None:
    tall, wide = rows[0][0].shape[:2]
    side = max(1.35, wide / DPI)
    width = max(side * len(heads), 6.0) + 0.3
    figure = new_figure(width, side * tall / wide * len(rows) + 1.5)
    panels = figure.subplots(len(rows), len(heads), squeeze=False)
    for row, pictures in zip(panels, rows, strict=True):
        for panel, picture in zip(row, pictures, strict=True):
            panel.imshow(picture, interpolation="antialiased")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set(color=FAINT, linewidth=0.6)
    for panel, head in zip(panels[0], heads, strict=True):
        panel.set_title(head, fontsize=LABEL)
    figure.suptitle("Tokens kept, merged and dropped", fontsize=TITLE)
    figure.legend(
        handles=_key(masked), loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False
    )
    save(figure, path)


def _key(masked: bool) -> list[Any]:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor="white", edgecolor=FAINT, label="plain: kept alone"),
        Patch(facecolor=PALETTE[0], label="coloured: merged"),
        Patch(facecolor=SLATE, label="dimmed: gone"),
    ]
    outline = Patch(facecolor="none", edgecolor="black", label="outline: relevant")
    return [*handles, outline] if masked else handles


def _check_images(images: np.ndarray, masks: np.ndarray | None) -> None:
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images must be [M, H, W, C] with C of 1 or 3, got {images.shape}: change images."
        )
    if not np.isfinite(images).all():
        raise ValueError("images must be finite, got NaN or infinity: change images.")
    if masks is not None and masks.shape != images.shape[:3]:
        raise ValueError(
            f"masks must be [M, H, W] = {images.shape[:3]}, got {masks.shape}: change masks."
        )


def _check_sources(sources: Sequence[np.ndarray], shape: tuple[int, int]) -> None:
    for layer, source in enumerate(sources):
        if source.shape != shape:
            raise ValueError(
                f"sources[{layer}] must be [M, prefix + rows * columns] = {shape}, got "
                f"{source.shape}: change sources, grid or prefix."
            )
        if not np.issubdtype(source.dtype, np.integer):
            raise TypeError(
                f"sources[{layer}] must hold integers, got {source.dtype}: change sources."
            )
        if source.min() < GONE:
            raise ValueError(
                f"sources[{layer}] must be at least -1, got {source.min()}: change sources."
            )
