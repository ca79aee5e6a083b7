"""Kinds of questions about a grid of digits, which each kind changes so that it makes sense.

    which    which b3?      7, or none: the digit in column b, row 3
    where    where 7?       b3: the cell of a digit that occurs once
    count    count 7?       0 to 4
    larger   larger b3 c1?  c1: the cell of the larger digit
    same     same b3 c1?    yes or no, equally often
    row      row 2?         37-1, with - for an empty cell
    read     read all?      37-10942..., row by row

Cells and, as far as the kind lets them, answers are uniform.
"""

import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from tokred.data.digits import CLASSES

PROMPTS = {
    "which": "which {}?",
    "where": "where {}?",
    "count": "count {}?",
    "larger": "larger {} {}?",
    "same": "same {} {}?",
    "row": "row {}?",
    "read": "read all?",
}
KINDS = tuple(PROMPTS)
PAIRED = ("larger", "same")  # need two cells
NONE, EMPTY = "none", "-"
MOST = 4  # of the digit that is counted
COLUMNS = string.ascii_lowercase


class Question(NamedTuple):
    """names: what fills the prompt. places: flat indices of the cells that the answer needs."""

    names: tuple[str, ...]
    answer: str
    cells: Int[np.ndarray, "rows cols"]
    places: Int[np.ndarray, " K"]


def draw_question(
    kind: str, rng: np.random.Generator, cells: Int[np.ndarray, "rows cols"], *, holes: bool
) -> Question:
    """A question of one of KINDS about the cells (a digit, or -1 for none), which it may change.

    holes: whether cells may become empty. All randomness is rng's; cells are left as they are.
    """
    return ASK[kind](rng, cells, holes)


def make_prompt(kind: str, names: tuple[str, ...]) -> str:
    """The words of a question."""
    return PROMPTS[kind].format(*names)


def longest_texts(kind: str, rows: int, cols: int, *, holes: bool) -> tuple[str, str]:
    """A prompt and an answer of the greatest length among the questions of one of KINDS."""
    name = cell_name(rows * cols - 1, cols)
    names, answer = {
        "which": ((name,), NONE if holes else "0"),
        "where": (("0",), name),
        "count": (("0",), "0"),
        "larger": ((name, name), name),
        "same": ((name, name), "yes"),
        "row": ((str(rows),), EMPTY * cols),
        "read": ((), EMPTY * cols * rows),
    }[kind]
    return make_prompt(kind, names), answer


def cell_name(place: int, cols: int) -> str:
    """The name of the cell with that flat index: its column's letter and its row's number."""
    return f"{COLUMNS[place % cols]}{place // cols + 1}"


def _which(rng: np.random.Generator, cells: np.ndarray, holes: bool) -> Question:
    places = rng.integers(cells.size, size=1)
    digit = rng.integers(-1 if holes else 0, CLASSES)
    answer = NONE if digit < 0 else str(digit)
    return Question(_names(places, cells), answer, _put(cells, places, digit), places)


def _where(rng: np.random.Generator, cells: np.ndarray, holes: bool) -> Question:
    places, digit = rng.integers(cells.size, size=1), int(rng.integers(CLASSES))
    [name] = _names(places, cells)
    cells = _put(_without(digit, rng, cells), places, digit)
    return Question((str(digit),), name, cells, places)


def _count(rng: np.random.Generator, cells: np.ndarray, holes: bool) -> Question:
    count, digit = rng.integers(min(MOST, cells.size) + 1), int(rng.integers(CLASSES))
    places = rng.choice(cells.size, count, replace=False)
    cells = _put(_without(digit, rng, cells), places, digit)
    return Question((str(digit),), str(count), cells, np.arange(cells.size))


def _larger(rng: np.random.Generator, cells: np.ndarray, holes: bool) -> Question:
    places = rng.choice(cells.size, 2, replace=False)
    digits = rng.choice(CLASSES, 2, replace=False)
    names = _names(places, cells)
    return Question(names, names[digits.argmax()], _put(cells, places, digits), places)


def _same(rng: np.random.Generator, cells: np.ndarray, holes: bool) -> Question:
    places = rng.choice(cells.size, 2, replace=False)
    same, first = rng.random() < 0.5, rng.integers(CLASSES)
    second = first if same else (first + rng.integers(1, CLASSES)) % CLASSES
    cells = _put(cells, places, [first, second])
    return Question(_names(places, cells), "yes" if same else "no", cells, places)


def _row(rng: np.random.Generator, cells: np.ndarray, holes: bool) -> Question:
    row, cols = rng.integers(len(cells)), cells.shape[1]
    places = row * cols + np.arange(cols)
    return Question((str(row + 1),), _spell(cells[row]), cells, places)


def _read(rng: np.random.Generator, cells: np.ndarray, holes: bool) -> Question:
    return Question((), _spell(cells), cells, np.arange(cells.size))


ASK: dict[str, Callable[[np.random.Generator, np.ndarray, bool], Question]] = {
    "which": _which,
    "where": _where,
    "count": _count,
    "larger": _larger,
    "same": _same,
    "row": _row,
    "read": _read,
}


def _names(places: np.ndarray, cells: np.ndarray) -> tuple[str, ...]:
    return tuple(cell_name(place, cells.shape[1]) for place in places.tolist())


def _spell(cells: np.ndarray) -> str:
    return "".join(EMPTY if digit < 0 else str(digit) for digit in cells.flat)


def _put(cells: np.ndarray, places: np.ndarray, digits: ArrayLike) -> np.ndarray:
    cells = cells.copy()
    cells.flat[places] = digits
    return cells


def _without(digit: int, rng: np.random.Generator, cells: np.ndarray) -> np.ndarray:
    """The cells with any other digit wherever this one stands."""
    others = (digit + rng.integers(1, CLASSES, cells.shape)) % CLASSES
    return np.where(cells == digit, others, cells)
