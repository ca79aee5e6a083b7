"""Embedded data: a handwritten digit somewhere on a canvas, among pieces of other digits.

The digits are the 1797 real 8x8 digits that ship with scikit-learn. Each is put at a place aligned
to the patches of a canvas whose rest holds clutter: small pieces cut from other digits of the
same split. Clutter never enters the digit's 8x8 box, so every token outside that box is redundant,
and the mask (the bounding box of the digit's ink, in pixels) tells whether a method kept the right
tokens. Only the training digits are jittered, by `shift`.

    source = DigitSource('train', shift=1)
    grain.MapDataset.source(source).seed(0).shuffle().repeat().random_map(source.place).batch(64)
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped

DIGIT = 8  # side of a digit in pixels
CLASSES = 10
SPLITS = ("train", "test")
TEST_SHARE = 0.2
SPLIT_SEED = 0
MEAN, STD = 0.13, 0.29  # of the default canvas, ink in [0, 1]

Example = dict[str, Any]


def _expect(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {got!r}: change {name}.")


@dataclass(frozen=True)
class Canvas:
    """Where digits and clutter may lie; every length in pixels, all of it static.

    size: side of the square canvas. patch: side of a model's patch. stride: distance between
    neighbouring places of the digit. pieces: how many pieces of clutter are pasted (some fall
    under one another or under the digit). piece: side of a piece.
    Raises ValueError where a length does not fit the others.
    """

    size: int = 16
    patch: int = 2
    stride: int = 8
    pieces: int = 4
    piece: int = 4

    def __post_init__(self):
        for name in ("size", "patch", "stride", "piece"):
            self._expect(getattr(self, name) >= 1, name, "at least 1")
        self._expect(self.pieces >= 0, "pieces", "at least 0")
        self._expect(self.size >= DIGIT, "size", f"at least the {DIGIT} pixels of a digit")
        self._expect(self.piece <= DIGIT, "piece", f"at most the {DIGIT} pixels of a digit")
        self._expect(DIGIT % self.patch == 0, "patch", f"a divisor of the digit side {DIGIT}")
        for name in ("size", "stride", "piece"):
            aligned = getattr(self, name) % self.patch == 0
            self._expect(aligned, name, f"a multiple of patch={self.patch}")
        room = self.size - DIGIT
        self._expect(room % self.stride == 0, "stride", f"a divisor of size - {DIGIT} = {room}")

    def _expect(self, holds: bool, name: str, wanted: str) -> None:
        _expect(holds, f"Canvas.{name}", wanted, getattr(self, name))

    @property
    def places(self) -> int:
        """Number of places of the digit along one side."""
        return (self.size - DIGIT) // self.stride + 1


@functools.cache
def load_digits_split(split: str) -> tuple[Float32[np.ndarray, "M 8 8"], Int32[np.ndarray, " M"]]:
    """Ink in [0, 1] and labels of one split, read-only; instances are disjoint between splits.

    The split is fixed and stratified: of every class, a fifth is 'test', the rest is 'train'.
    Raises ValueError for another split, ImportError without scikit-learn.
    """
    _expect(split in SPLITS, "split", f"one of {SPLITS}", split)
    images, labels = _load_all()
    rows = np.flatnonzero(_is_test(labels) == (split == "test"))
    images, labels = images[rows], labels[rows]
    for array in (images, labels):
        array.flags.writeable = False
    return images, labels


def _load_all() -> tuple[Float32[np.ndarray, "M 8 8"], Int32[np.ndarray, " M"]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The embedded digits come with scikit-learn, which is not installed: "
            "pip install scikit-learn."
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, DIGIT, DIGIT)
    return images, labels.astype(np.int32)


def _is_test(labels: Int32[np.ndarray, " M"]) -> Bool[np.ndarray, " M"]:
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = np.zeros(len(labels), bool)
    for label in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(labels == label))
        chosen[rows[: round(TEST_SHARE * len(rows))]] = True
    return chosen


@dataclass(frozen=True)
class DigitSource:
    """Random access to the raw digits of one split, and the way to place them on a canvas.

    shift: a placed digit moves by up to so many pixels inside its box (ink that leaves is cut).
    Raises ValueError for an unknown split or a shift outside 0..7.
    """

    split: str = "train"
    canvas: Canvas = Canvas()
    shift: int = 0

    def __post_init__(self):
        _expect(self.split in SPLITS, "split", f"one of {SPLITS}", self.split)
        _expect(0 <= self.shift < DIGIT, "shift", f"in 0..{DIGIT - 1}", self.shift)

    def __len__(self) -> int:
        return len(load_digits_split(self.split)[1])

    def __getitem__(self, index: int) -> Example:
        """'digit' float32 [8, 8], 'label' int32 [] and 'index' int32 [] in the split."""
        images, labels = load_digits_split(self.split)
        return {"digit": images[index], "label": labels[index], "index": np.int32(index)}

    def place(self, example: Example, rng: np.random.Generator) -> Example:
        """Place one example; see place_digit."""
        pool, _ = load_digits_split(self.split)
        return place_digit(example, rng, pool=pool, canvas=self.canvas, shift=self.shift)


def place_digit(
    example: Example,
    rng: np.random.Generator,
    *,
    pool: Float32[np.ndarray, "M 8 8"],
    canvas: Canvas,
    shift: int = 0,
) -> Example:
    """Draw the digit somewhere among clutter from the other digits of pool.

    Returns 'image' float32 [H, W, 1] (standardised), 'label' int32 [], 'mask' bool [H, W]: the
    bounding box of the digit's ink. example['index'] is the digit's row in pool. All randomness is
    rng's; example and pool are left as they are.
    """
    digit = shift_ink(example["digit"], *rng.integers(-shift, shift + 1, size=2).tolist())
    ink = draw_clutter(rng, int(example["index"]), pool, canvas)
    mask = np.zeros((canvas.size, canvas.size), bool)
    top, left = (canvas.stride * rng.integers(canvas.places, size=2)).tolist()
    box = slice(top, top + DIGIT), slice(left, left + DIGIT)
    ink[box] = digit
    mask[box] = box_of_ink(digit)
    return {"image": ((ink - MEAN) / STD)[..., None], "label": example["label"], "mask": mask}


def draw_clutter(
    rng: np.random.Generator, index: int, pool: Float32[np.ndarray, "M 8 8"], canvas: Canvas
) -> Float32[np.ndarray, "H W"]:
    """An empty canvas with patch-aligned pieces of the digits of pool, number `index` excepted."""
    ink = np.zeros((canvas.size, canvas.size), np.float32)
    step, side = canvas.patch, canvas.piece
    digits = (index + rng.integers(1, len(pool), size=canvas.pieces)) % len(pool)
    cuts = step * rng.integers((DIGIT - side) // step + 1, size=(canvas.pieces, 2))
    spots = step * rng.integers((canvas.size - side) // step + 1, size=(canvas.pieces, 2))
    for digit, (y, x), (top, left) in zip(digits, cuts.tolist(), spots.tolist(), strict=True):
        ink[top : top + side, left : left + side] = pool[digit, y : y + side, x : x + side]
    return ink


def shift_ink(
    digit: Float32[np.ndarray, "8 8"], down: int, right: int
) -> Float32[np.ndarray, "8 8"]:
    """The digit moved inside its box; what leaves is cut, what comes in is empty."""
    moved = np.zeros_like(digit)
    moved[_inside(down), _inside(right)] = digit[_inside(-down), _inside(-right)]
    return moved


def _inside(by: int) -> slice:
    return slice(max(by, 0), DIGIT + min(by, 0))


def box_of_ink(digit: Float32[np.ndarray, "8 8"]) -> Bool[np.ndarray, "8 8"]:
    """The smallest upright box that holds all ink of the digit."""
    ink = digit > 0
    return _span(np.any(ink, axis=1))[:, None] & _span(np.any(ink, axis=0))


def _span(line: Bool[np.ndarray, " 8"]) -> Bool[np.ndarray, " 8"]:
    seen = np.logical_or.accumulate
    return seen(line) & seen(line[::-1])[::-1]


def draw_batch(
    source: DigitSource, indices: Sequence[int], *, seed: int, epoch: int = 0
) -> dict[str, Shaped[np.ndarray, "B ..."]]:
    """Placed examples stacked: image [B, H, W, 1], label [B], mask [B, H, W].

    Each draw depends on (seed, index, epoch) alone, not on its neighbours in the batch; epoch 0
    draws what pipeline.eval_batches draws. Needs no Grain.
    """
    rngs = [np.random.default_rng((seed, int(index), epoch)) for index in indices]
    examples = [source.place(source[i], rng) for i, rng in zip(indices, rngs, strict=True)]
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}
