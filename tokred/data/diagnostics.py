"""Synthetic tasks that a small decoder learns in minutes, and that show what it can recall.

Examples are those of tokred.data.packing, with one document per row; `weight` is 1 on the answers
alone. An example is drawn from (seed, split, index), so it is the same in every epoch. Only token
ids matter, there is no text; id 0 is never an answer.
"""

import dataclasses
import difflib
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float64, Int64

Example = dict[str, Any]
Drawn = tuple[Int64[np.ndarray, " M"], Bool[np.ndarray, " N"]]  # M = N + 1

SIZES = {"train": 100_000, "valid": 2_000, "test": 2_000}


def keep_example(example: Example, rng: np.random.Generator) -> Example:
    """The transform of diagnostics, whose source gives finished examples: the example itself."""
    return example


@dataclass(frozen=True)
class Diagnostic(ABC):
    """A source of `length` tokens per example, with ids in 0..vocab - 1; all of it static.

    Raises ValueError for numbers that do not fit each other.
    """

    split: str
    length: int
    vocab: int = 64
    seed: int = 0

    def __post_init__(self):
        _expect(self.split in SIZES, "split", f"one of {tuple(SIZES)}", self.split)
        _expect(0 <= self.seed < 2**32, "seed", "in 0..2**32 - 1", self.seed)
        self._check()

    @abstractmethod
    def _check(self) -> None: ...

    @abstractmethod
    def _draw(self, rng: np.random.Generator) -> Drawn:
        """length + 1 tokens, and at which of the first `length` the next one is an answer."""

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, index: int) -> Example:
        """The finished example; IndexError outside 0..len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}: change index.")
        stream = np.random.default_rng((self.seed, list(SIZES).index(self.split), index))
        tokens, answers = self._draw(stream)
        return {
            "input": tokens[:-1].astype(np.int32),
            "target": tokens[1:].astype(np.int32),
            "weight": answers.astype(np.float32),
            "position": np.arange(self.length, dtype=np.int32),
            "document": np.zeros(self.length, np.int32),
        }


@dataclass(frozen=True)
class AssociativeRecall(Diagnostic):
    """Multi-query associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927).

    First `pairs` times a key and its value; later every key comes back once, at a random place,
    and its value is the answer. Keys are in 1..vocab // 2 - 1, values above; both are drawn
    without repetition. The gaps between pairs and queries follow the power law of the paper,
    p(gap) ~ gap ** (power - 1); power 1 is uniform. Unlike in the paper's code the token behind a
    query is its value, and what fills the rest are values, so that no key stands there by chance.
    """

    vocab: int = 256
    pairs: int = 8
    power: float = 0.01

    def _check(self) -> None:
        _expect(self.pairs >= 1, "pairs", "at least 1", self.pairs)
        _expect(self.power > 0, "power", "above 0", self.power)
        for name, least in (("vocab", 2 * self.pairs + 2), ("length", 4 * self.pairs - 1)):
            got = getattr(self, name)
            _expect(got >= least, name, f"at least {least} for {self.pairs} pairs", got)

    def _draw(self, rng: np.random.Generator) -> Drawn:
        context, middle = 2 * self.pairs, self.vocab // 2
        keys = 1 + rng.permutation(middle - 1)[: self.pairs]
        values = middle + rng.permutation(self.vocab - middle)[: self.pairs]
        tokens = rng.integers(middle, self.vocab, self.length + 1)
        tokens[:context:2], tokens[1:context:2] = keys, values
        slots = (self.length + 1 - context) // 2
        weights = np.arange(1.0, slots + 1) ** (self.power - 1)
        gaps = rng.choice(slots, self.pairs, replace=False, p=weights / weights.sum())
        queries = context + 2 * gaps
        tokens[queries], tokens[queries + 1] = keys, values
        return tokens, _at(queries, self.length)


@dataclass(frozen=True)
class Needle(Diagnostic):
    """Needle retrieval: a marked key and its value far back among filler, asked for at the end.

    After Kamradt 2023 ("Needle in a haystack") and the passkeys of Mohtashami and Jaggi 2023,
    arXiv 2305.16300. Id 1 marks a needle (mark, key, value), id 2 asks (ask, key): the value is
    the answer, the last target. Keys are the next eighth of the vocabulary, values the one after,
    all else is filler. The needles stand in the first `reach` of the row. Of several needles, with
    different keys, one is asked for.
    """

    needles: int = 1
    reach: float = 0.5

    MARK: ClassVar[int] = 1
    ASK: ClassVar[int] = 2
    FIRST: ClassVar[int] = 3

    def _check(self) -> None:
        _expect(self.vocab >= 16, "vocab", "at least 16", self.vocab)
        _expect(0 < self.reach <= 1, "reach", "in (0, 1]", self.reach)
        _expect(
            1 <= self.needles <= self._keys, "needles", f"in 1..{self._keys} (keys)", self.needles
        )
        needed = f"enough for {self.needles} needles in the first {self.reach:g} of the row"
        _expect(self._slots >= self.needles, "length", needed, self.length)

    @property
    def _keys(self) -> int:
        return self.vocab // 8

    @property
    def _slots(self) -> int:
        """Places for a needle; the question and its answer take the last three tokens."""
        return int(self.reach * max(self.length - 2, 0)) // 3

    def _draw(self, rng: np.random.Generator) -> Drawn:
        values, filler = self.FIRST + self._keys, self.FIRST + 2 * self._keys
        tokens = rng.integers(filler, self.vocab, self.length + 1)
        places = 3 * rng.permutation(self._slots)[: self.needles]
        tokens[places] = self.MARK
        tokens[places + 1] = self.FIRST + rng.permutation(self._keys)[: self.needles]
        tokens[places + 2] = rng.integers(values, filler, self.needles)
        asked = places[rng.integers(self.needles)]
        tokens[-3:] = self.ASK, tokens[asked + 1], tokens[asked + 2]
        return tokens, _at(np.array([self.length - 1]), self.length)


@dataclass(frozen=True)
class Copy(Diagnostic):
    """Copying (Jelassi et al. 2024, Repeat After Me, arXiv 2402.01032).

    A random string of length // 2 tokens, the separator (id 1), and the same string: the second
    string is the answer. The length must be even.
    """

    SEPARATOR: ClassVar[int] = 1

    def _check(self) -> None:
        _expect(self.length >= 2, "length", "at least 2", self.length)
        _expect(self.length % 2 == 0, "length", "even", self.length)
        _expect(self.vocab >= 3, "vocab", "at least 3", self.vocab)

    def _draw(self, rng: np.random.Generator) -> Drawn:
        half = self.length // 2
        string = rng.integers(self.SEPARATOR + 1, self.vocab, half)
        tokens = np.concatenate([string, [self.SEPARATOR], string])
        return tokens, np.arange(self.length) >= half


@dataclass(frozen=True)
class BigramBackcopy(Diagnostic):
    """Bigram-backcopy (Guo et al. 2024, Active-dormant attention heads, arXiv 2410.13835).

    Id 0 begins; a token that is no trigger follows, uniformly drawn; then a trigger at place i is
    followed by the token at i - 1 (the answers), any other token by a draw from its row of a
    bigram table. Triggers are the `triggers` most frequent tokens. The paper counts the table in
    Shakespeare's characters; here its rows are Dirichlet(concentration) draws from `seed`, the
    same for all splits. everywhere: weight 1 at every place but the first, as the paper trains:
    attention sinks arise because heads rest where there is nothing to copy.
    """

    vocab: int = 65
    triggers: int = 3
    concentration: float = 0.2
    everywhere: bool = False

    def _check(self) -> None:
        _expect(self.length >= 2, "length", "at least 2", self.length)
        _expect(self.triggers >= 1, "triggers", "at least 1", self.triggers)
        least = self.triggers + 2
        _expect(self.vocab >= least, "vocab", f"at least {least}, above the triggers", self.vocab)
        _expect(self.concentration > 0, "concentration", "above 0", self.concentration)

    @cached_property
    def table(self) -> Float64[np.ndarray, "V V"]:
        """Probability of the next token (column) after each one (row); nothing leads to id 0."""
        rng = np.random.default_rng((self.seed, len(SIZES)))
        rows = rng.dirichlet(np.full(self.vocab - 1, self.concentration), self.vocab)
        return np.pad(rows, ((0, 0), (1, 0)))

    @cached_property
    def _cumulative(self) -> list[list[float]]:
        sums = np.cumsum(self.table, axis=1)
        sums[:, -1] = 1.0
        return sums.tolist()

    @cached_property
    def trigger_ids(self) -> Int64[np.ndarray, " triggers"]:
        """The most frequent tokens of the bigram chain, in ascending order."""
        frequency = np.linalg.matrix_power(self.table, 1024)[0]
        return np.sort(np.argsort(frequency)[-self.triggers :])

    def _draw(self, rng: np.random.Generator) -> Drawn:
        triggers = set(self.trigger_ids.tolist())
        starts = np.setdiff1d(np.arange(1, self.vocab), self.trigger_ids)
        tokens = [0, int(rng.choice(starts))]
        for chance in rng.random(self.length - 1).tolist():
            if tokens[-1] in triggers:
                tokens.append(tokens[-2])
            else:
                tokens.append(bisect_right(self._cumulative[tokens[-1]], chance))
        inputs = np.array(tokens[:-1])
        answers = inputs != 0 if self.everywhere else np.isin(inputs, self.trigger_ids)
        return np.array(tokens), answers


DIAGNOSTICS: dict[str, type[Diagnostic]] = {
    "associative_recall": AssociativeRecall,
    "needle": Needle,
    "copy": Copy,
    "bigram_backcopy": BigramBackcopy,
}


def open_diagnostic(
    name: str, split: str, length: int, vocab: int | None = None, **options: Any
) -> Diagnostic:
    """The source of one of DIAGNOSTICS: rows of `length` tokens with ids below `vocab`.

    split: 'train' (100 000 examples), 'valid' or 'test' (2 000 each), drawn apart. vocab: the
    task's own default if None. options: its other fields, such as seed or pairs.
    Raises ValueError for an unknown name or values that do not fit, TypeError for other options.
    """
    if name not in DIAGNOSTICS:
        nearest = difflib.get_close_matches(name, DIAGNOSTICS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"name must be one of {sorted(DIAGNOSTICS)}, got {name!r}: did you mean {nearest!r}?"
        )
    task = DIAGNOSTICS[name]
    fields = {f.name for f in dataclasses.fields(task)} - {"split", "length"}
    if not fields >= set(options):
        unknown = sorted(set(options) - fields)
        raise TypeError(
            f"options of {name} must be among {sorted(fields)}, got {unknown}: remove or rename it."
        )
    if vocab is not None:
        options["vocab"] = vocab
    return task(split, length, **options)


def _at(places: Int64[np.ndarray, " K"], length: int) -> Bool[np.ndarray, " N"]:
    return np.isin(np.arange(length), places)


def _expect(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {got!r}: change {name}.")
