"""Questions about real digits on a grid of cells, with the cells that an answer needs.

    task = GridQuestions('train', cells=(4, 4))
    train_batches(task, task.ask, batch=64, seed=0)

What is asked: see tokred.data.grid_kinds. Several canvases are told apart by their numbers: 'in 2
which b3?'. Examples are those of tokred.data.conversations, in bytes, and have besides

    kind int32 []                   index in KINDS
    cells int32 [I, rows, cols]     the digits, -1 for empty cells
    evidence bool [I, rows, cols]   the cells that the answer needs

The digits are those of tokred.data.digits: no instance is in both splits.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int32

from tokred.data.conversations import BYTES, IMAGE, ConversationFormat, Example, make_example
from tokred.data.diagnostics import SIZES
from tokred.data.digits import CLASSES, DIGIT, MEAN, SPLITS, STD, load_digits_split, shift_ink
from tokred.data.grid_kinds import COLUMNS, KINDS, PAIRED, draw_question, longest_texts, make_prompt
from tokred.data.pairs import expect
from tokred.data.tokenizers import ByteTokenizer

PLACES = ("front", "middle", "end", "drawn")


@dataclass(frozen=True)
class GridQuestions:
    """A source of questions and, by `ask`, its transform; all of it static.

    split: 'train' (100 000 examples) or 'test' (2 000). cells: rows and columns. images: I.
    kinds: some of KINDS, equally often; what stands there twice, twice as often. cell: side of a
    cell in pixels, with the digit in its middle. empty: share of empty cells. shift: a training
    digit moves by up to so many pixels inside its 8x8 box. where_image: placeholders in front of
    the prompt, between its words (each drawn on its own), at its end, or drawn among all these
    places. length: N; None for the longest example's. seed: of the test questions.
    Raises ValueError for values that do not fit each other.
    """

    split: str
    cells: tuple[int, int] = (4, 4)
    images: int = 1
    kinds: Sequence[str] = KINDS
    cell: int = DIGIT
    empty: float = 0.2
    shift: int = 0
    where_image: str = "front"
    length: int | None = None
    seed: int = 0
    tokenizer: ByteTokenizer = BYTES

    def __post_init__(self):
        expect(self.split in SPLITS, "split", f"one of {SPLITS}", self.split)
        most = len(COLUMNS)
        fits = len(self.cells) == 2 and min(self.cells) >= 1 and self.cells[1] <= most
        expect(fits, "cells", f"at least 1 row and 1 to {most} columns", self.cells)
        expect(self.images >= 1, "images", "at least 1", self.images)
        known = len(self.kinds) > 0 and set(self.kinds) <= set(KINDS)
        expect(known, "kinds", f"some of {KINDS}", self.kinds)
        paired = max(self.cells) > 1 or not set(PAIRED) & set(self.kinds)
        expect(paired, "cells", f"two or more for the kinds {PAIRED}", self.cells)
        expect(self.cell >= DIGIT, "cell", f"at least the {DIGIT} pixels of a digit", self.cell)
        expect(0 <= self.empty < 1, "empty", "in [0, 1)", self.empty)
        expect(0 <= self.shift < DIGIT, "shift", f"in 0..{DIGIT - 1}", self.shift)
        expect(self.where_image in PLACES, "where_image", f"one of {PLACES}", self.where_image)
        expect(0 <= self.seed < 2**32, "seed", "in 0..2**32 - 1", self.seed)
        longest = self.longest
        enough = self.length is None or self.length >= longest
        expect(enough, "length", f"at least {longest}, for the longest example", self.length)

    @property
    def image_size(self) -> tuple[int, int]:
        """Y and X in pixels; there is one channel."""
        return self.cells[0] * self.cell, self.cells[1] * self.cell

    @property
    def longest(self) -> int:
        """The tokens of the longest example that can be drawn."""
        holes = self.empty > 0
        turns = (longest_texts(kind, *self.cells, holes=holes) for kind in self.kinds)
        text = max(len(prompt + answer) for prompt, answer in turns)
        return text + len(self._name_image("", self.images - 1)) + self.images

    @cached_property
    def form(self) -> ConversationFormat:
        """The sizes of the examples."""
        length = self.longest if self.length is None else self.length
        return ConversationFormat(length, self.images, self.tokenizer)

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, index: int) -> Example:
        """'index' int32 [], all that `ask` needs; IndexError outside 0..len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}: change index.")
        return {"index": np.int32(index)}

    def ask(self, example: Example, rng: np.random.Generator) -> Example:
        """The finished example: of 'train' drawn from rng, of 'test' fixed by seed and index."""
        if self.split == "test":
            rng = np.random.default_rng((self.seed, int(example["index"])))
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        number = int(rng.integers(self.images))
        cells = _draw_cells(rng, (self.images, *self.cells), self.empty)
        question = draw_question(kind, rng, cells[number], holes=self.empty > 0)
        cells[number] = question.cells
        evidence = np.zeros(cells.shape, bool)
        evidence[number].flat[question.places] = True
        prompt = self._name_image(make_prompt(kind, question.names), number)
        turns = [(self._place_images(prompt, rng), question.answer)]
        example = make_example(self._draw_images(cells, rng), turns, self.form)
        found = {"kind": np.int32(KINDS.index(kind)), "cells": cells, "evidence": evidence}
        return {**example, **found}

    def _name_image(self, prompt: str, number: int) -> str:
        return prompt if self.images == 1 else f"in {number + 1} {prompt}"

    def _place_images(self, prompt: str, rng: np.random.Generator) -> str:
        first, *others = prompt.split(" ")
        last = 1 + len(others)
        spans = {"front": (0, 0), "middle": (1, last - 1), "end": (last, last), "drawn": (0, last)}
        low, high = spans[self.where_image]
        before = np.bincount(rng.integers(low, high + 1, self.images), minlength=last + 1)
        words = [first, *(f" {word}" for word in others), ""]
        return "".join(IMAGE * count + word for count, word in zip(before, words, strict=True))

    def _draw_images(
        self, cells: Int32[np.ndarray, "I rows cols"], rng: np.random.Generator
    ) -> Float32[np.ndarray, "I Y X 1"]:
        shift = self.shift if self.split == "train" else 0
        ink = np.stack([draw_ink(rng, board, self.split, self.cell, shift) for board in cells])
        return ((ink - MEAN) / STD)[..., None]


def _draw_cells(
    rng: np.random.Generator, shape: tuple[int, ...], empty: float
) -> Int32[np.ndarray, "I rows cols"]:
    digits = rng.integers(CLASSES, size=shape, dtype=np.int32)
    return np.where(rng.random(shape) < empty, np.int32(-1), digits)


@functools.cache
def _instances(split: str) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, "10"]]:
    """The rows of the split, ordered by class, and how many each class has."""
    _, labels = load_digits_split(split)
    return np.argsort(labels, kind="stable"), np.bincount(labels, minlength=CLASSES)


def draw_ink(
    rng: np.random.Generator,
    cells: Int[np.ndarray, "rows cols"],
    split: str,
    cell: int = DIGIT,
    shift: int = 0,
) -> Float32[np.ndarray, "Y X"]:
    """A drawn instance of each digit in the middle of its cell; ink in [0, 1]."""
    pool, _ = load_digits_split(split)
    order, counts = _instances(split)
    places = np.nonzero(cells >= 0)
    digits = cells[places]
    first = np.cumsum(counts) - counts
    drawn = pool[order[first[digits] + rng.integers(counts[digits])]]
    if shift:
        by = rng.integers(-shift, shift + 1, (len(drawn), 2)).tolist()
        for number, (down, right) in enumerate(by):
            drawn[number] = shift_ink(drawn[number], down, right)
    ink = np.zeros((*cells.shape, cell, cell), np.float32)
    inside = slice((cell - DIGIT) // 2, (cell + DIGIT) // 2)
    ink[(*places, inside, inside)] = drawn
    rows, cols = cells.shape
    return ink.swapaxes(1, 2).reshape(rows * cell, cols * cell)


def accuracy_by_region(
    right: Bool[np.ndarray, " B"], evidence: Bool[np.ndarray, "B *I rows cols"]
) -> Float64[np.ndarray, "rows cols"]:
    """The share of right answers to the questions whose evidence is one cell, by that cell.

    nan where there is no such question. Several canvases count as one. A method that keeps tokens
    by their place rather than by what they show does better in some regions than in others.
    """
    needed = evidence.sum(tuple(range(1, evidence.ndim - 2)))
    asked = (needed > 0) & (needed.sum((1, 2)) == 1)[:, None, None]
    total, hits = asked.sum(0), (asked & right[:, None, None]).sum(0)
    return np.where(total > 0, hits / np.maximum(total, 1), np.nan)


def evidence_patches(
    evidence: Bool[Any, "*B rows cols"], grid: tuple[int, int]
) -> Bool[Any, "*B N"]:
    """Patches of a ViT that lie in the cells, row by row, of NumPy or JAX arrays; grid: its h, w.

    Raises ValueError where cells would share patches.
    """
    cells = evidence.shape[-2:]
    nearest = tuple(max(1, round(g / c)) * c for g, c in zip(grid, cells, strict=True))
    if nearest != tuple(grid):
        raise ValueError(
            f"grid must be a multiple of the {cells} cells, got {tuple(grid)}: "
            f"change grid to {nearest}."
        )
    tall = evidence.repeat(grid[0] // cells[0], axis=-2)
    return tall.repeat(grid[1] // cells[1], axis=-1).reshape(*evidence.shape[:-2], -1)
