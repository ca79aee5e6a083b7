"""Tasks on characters for a byte-level encoder-decoder: an input and its answer, both in ASCII.

    vowel_removal             #abcEdi    #bcd        (Kallini et al. 2024, MrT5, arXiv 2410.20771)
    contextual_vowel_removal  #abcEdi    #abcd       after a lower-case consonant alone
    merge_abc                 #xABCy     #xDy
    spelling_correction       Retrun the nme.    Return the name.
    word_search               eegnr: kotelneerggust    green

Examples are those of tokred.data.pairs, drawn from (seed, split, index), so they are the same in
every epoch. The texts of the last two tasks come from the docstrings of the Python standard
library, and so change with its version; each sentence and each word belongs to one split.
"""

import dataclasses
import difflib
import functools
import re
import string
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tokred.data.corpora import load_stdlib, split_of
from tokred.data.diagnostics import SIZES
from tokred.data.pairs import Example, expect, make_pair
from tokred.data.tokenizers import ByteTokenizer

LETTERS = string.ascii_lowercase + string.ascii_uppercase
VOWELS = "aeiouAEIOU"
CONSONANTS = [letter for letter in LETTERS if letter not in VOWELS]
AFTER_CONSONANT = re.compile(r"([b-df-hj-np-tv-z])[aeiouAEIOU]")
START = "#"  # of every random string, as in the paper, so that none is empty
ENCODER = ByteTokenizer()

DOCSTRING = re.compile(rb'"""(.*?)"""', re.DOTALL)
SENTENCE = re.compile(r"[A-Z][A-Za-z ,;'-]*[.!?]")
WORD = re.compile(r"[a-z]+")
MISSPELT = re.compile(r"[A-Za-z]{3,}")
SHORTEST, LONGEST, SEEN = 4, 12, 3  # letters of words to search, how often docstrings have them
CUE_END = ": "


@dataclass(frozen=True)
class ByteTask(ABC):
    """A source of finished examples with inputs of `length` bytes and targets of `target_length`.

    Both count the end token; target_length is `length` if None. Static.
    Raises ValueError for numbers that do not fit each other.
    """

    split: str
    length: int
    target_length: int | None = None
    seed: int = 0

    vocab: ClassVar[int] = ENCODER.vocab
    LEAST: ClassVar[int] = 16  # shorter random strings would stand in several splits

    def __post_init__(self):
        expect(self.split in SIZES, "split", f"one of {tuple(SIZES)}", self.split)
        expect(0 <= self.seed < 2**32, "seed", "in 0..2**32 - 1", self.seed)
        expect(self.length >= self.LEAST, "length", f"at least {self.LEAST} bytes", self.length)
        self._check()

    @property
    def targets(self) -> int:
        """M."""
        return self.length if self.target_length is None else self.target_length

    @abstractmethod
    def _check(self) -> None: ...

    @abstractmethod
    def _draw(self, rng: np.random.Generator) -> tuple[str, str]:
        """An input and its answer, which fit in without their end tokens."""

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, index: int) -> Example:
        """The finished example; IndexError outside 0..len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}: change index.")
        rng = np.random.default_rng((self.seed, list(SIZES).index(self.split), index))
        source, target = map(ENCODER.encode, self._draw(rng))
        return make_pair(source, target, length=self.length, target_length=self.targets)


@dataclass(frozen=True)
class RandomString(ByteTask):
    """'#' and random letters that fill the input; the answer is a shorter string."""

    def _check(self) -> None:
        wanted = f"at least length={self.length}, which an answer may take"
        expect(self.targets >= self.length, "target_length", wanted, self.target_length)

    @property
    def _letters(self) -> int:
        return self.length - len(START) - 1

    def _string(self, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(list(LETTERS), self._letters)

    def _places(self, rng: np.random.Generator, mean: float, width: int) -> np.ndarray:
        """About `mean` places in the string, `width` or more apart: normal, sd mean / 2."""
        most = self._letters // width
        count = min(max(int(rng.normal(mean, mean / 2)), 1), most)
        slots = self._letters - count * (width - 1)
        return np.sort(rng.choice(slots, count, replace=False)) + np.arange(count) * (width - 1)


@dataclass(frozen=True)
class VowelRemoval(RandomString):
    """The answer lacks all vowels."""

    def _draw(self, rng: np.random.Generator) -> tuple[str, str]:
        text = START + "".join(self._string(rng))
        return text, text.translate({ord(vowel): None for vowel in VOWELS})


@dataclass(frozen=True)
class ContextualVowelRemoval(RandomString):
    """The answer lacks the vowels that follow a lower-case consonant.

    pairs: mean number of pairs of a consonant (of either case) and a vowel put into the string.
    """

    pairs: float = 25.0

    def _check(self) -> None:
        super()._check()
        expect(self.pairs > 0, "pairs", "above 0", self.pairs)

    def _draw(self, rng: np.random.Generator) -> tuple[str, str]:
        letters, places = self._string(rng), self._places(rng, self.pairs, 2)
        letters[places] = rng.choice(CONSONANTS, len(places))
        letters[places + 1] = rng.choice(list(VOWELS), len(places))
        text = START + "".join(letters)
        return text, AFTER_CONSONANT.sub(r"\1", text)


@dataclass(frozen=True)
class MergeAbc(RandomString):
    """The answer has D for every ABC. count: mean number of ABCs put into the string."""

    count: float = 5.0

    def _check(self) -> None:
        super()._check()
        expect(self.count > 0, "count", "above 0", self.count)

    def _draw(self, rng: np.random.Generator) -> tuple[str, str]:
        letters, places = self._string(rng), self._places(rng, self.count, 3)
        for shift, letter in enumerate("ABC"):
            letters[places + shift] = letter
        text = START + "".join(letters)
        return text, text.replace("ABC", "D")


@functools.cache
def _docstrings() -> tuple[str, ...]:
    found = (text for _, module in load_stdlib() for text in DOCSTRING.findall(module))
    return tuple(text.decode("utf-8", errors="replace") for text in found)


@functools.cache
def load_sentences(split: str) -> tuple[str, ...]:
    """Sentences of three words or more, of letters and plain punctuation, sorted."""
    paragraphs = (part for text in _docstrings() for part in re.split(r"\n\s*\n", text))
    pieces = (piece for p in paragraphs for piece in re.split(r"(?<=[.!?]) ", " ".join(p.split())))
    found = {text for text in pieces if SENTENCE.fullmatch(text) and text.count(" ") >= 2}
    return tuple(sorted(text for text in found if split_of(text) == split))


@functools.cache
def load_words(split: str) -> tuple[str, ...]:
    """Words of 4 to 12 letters, in lower case, that stand in docstrings three times, sorted."""
    words, counts = np.unique(
        [word for text in _docstrings() for word in WORD.findall(text.lower())], return_counts=True
    )
    common = words[counts >= SEEN].tolist()
    fit = (word for word in common if SHORTEST <= len(word) <= LONGEST)
    return tuple(word for word in fit if split_of(word) == split)


@dataclass(frozen=True)
class SpellingCorrection(ByteTask):
    """A sentence with misspelt words is set right.

    rate: the chance of a word of three letters or more to be misspelt (one of them always is), by a
    letter that is inserted, deleted, substituted, or swapped with the next, all equally likely.
    Only sentences are used that fit whatever is drawn.
    """

    rate: float = 0.2

    def _check(self) -> None:
        expect(0 <= self.rate <= 1, "rate", "in [0, 1]", self.rate)
        for name, targets in (("length", self.length), ("target_length", self.targets)):
            some = bool(_fitting(self.split, self.length, targets))
            expect(some, name, "enough for at least one sentence", getattr(self, name))

    def _draw(self, rng: np.random.Generator) -> tuple[str, str]:
        sentences = _fitting(self.split, self.length, self.targets)
        clean = sentences[rng.integers(len(sentences))]
        words = list(MISSPELT.finditer(clean))
        wrong = rng.random(len(words)) < self.rate
        wrong[rng.integers(len(words))] = True
        parts, done = [], 0
        for word in (word for word, misspelt in zip(words, wrong, strict=True) if misspelt):
            parts += [clean[done : word.start()], misspell(word[0], rng)]
            done = word.end()
        return "".join(parts) + clean[done:], clean


@functools.cache
def _fitting(split: str, length: int, target_length: int) -> tuple[str, ...]:
    """Sentences that fit as targets, and as inputs with a letter more in every word."""
    counted = ((text, len(MISSPELT.findall(text))) for text in load_sentences(split))
    return tuple(
        text
        for text, words in counted
        if words and len(text) < target_length and len(text) + words < length
    )


def misspell(word: str, rng: np.random.Generator) -> str:
    """Another word, one letter inserted, deleted, substituted or swapped away; case is not kept."""
    wrong = word
    while wrong == word:
        kind, place = rng.integers(4), rng.integers(len(word))
        letter = string.ascii_lowercase[rng.integers(26)]
        before, here, after = word[:place], word[place], word[place + 1 :]
        swapped = before + after[:1] + here + after[1:]
        inserted, substituted = before + letter + here + after, before + letter + after
        wrong = (inserted, before + after, substituted, swapped)[kind]
    return wrong


@dataclass(frozen=True)
class WordSearch(ByteTask):
    """A word stands backwards in a row of letters; a cue tells which one.

    After the game of Huang et al. 2022 (arXiv 2212.09897), where a definition is the cue; here it
    is the word's letters in alphabetical order, so that no dictionary is needed. Other words, half
    of them backwards, fill the row; no other stretch of it has the letters of the cue.
    """

    LEAST: ClassVar[int] = 2 * LONGEST + len(CUE_END) + 1

    @property
    def targets(self) -> int:
        """M: if None, what the longest word takes."""
        return LONGEST + 1 if self.target_length is None else self.target_length

    def _check(self) -> None:
        wanted = f"at least {LONGEST + 1}, for a word of {LONGEST} letters"
        expect(self.targets > LONGEST, "target_length", wanted, self.target_length)

    def _draw(self, rng: np.random.Generator) -> tuple[str, str]:
        words = load_words(self.split)
        while True:
            word = words[rng.integers(len(words))]
            cue = "".join(sorted(word))
            row = self._hide(word, self.length - len(cue + CUE_END) - 1, rng)
            if find_words(cue, row) == {word}:
                return cue + CUE_END + row, word

    def _hide(self, word: str, room: int, rng: np.random.Generator) -> str:
        words = load_words(self.split)
        drawn = rng.integers(len(words), size=room // SHORTEST)
        turns = np.where(rng.random(len(drawn)) < 0.5, -1, 1)
        others = [words[i][::turn] for i, turn in zip(drawn, turns, strict=True)]
        fits = np.flatnonzero(np.cumsum([0, *map(len, others)]) + len(word) <= room)
        place = rng.integers(len(fits))
        return "".join([*others[:place], word[::-1], *others[place:]])[:room]


def find_words(letters: str, row: str) -> set[str]:
    """What stands backwards in the row with exactly these letters, which are in order."""
    size = len(letters)
    stretches = {row[i : i + size] for i in range(len(row) - size + 1)}
    return {text[::-1] for text in stretches if "".join(sorted(text)) == letters}


BYTE_TASKS: dict[str, type[ByteTask]] = {
    "vowel_removal": VowelRemoval,
    "contextual_vowel_removal": ContextualVowelRemoval,
    "merge_abc": MergeAbc,
    "spelling_correction": SpellingCorrection,
    "word_search": WordSearch,
}


def open_byte_task(
    name: str, split: str, length: int, target_length: int | None = None, **options: Any
) -> ByteTask:
    """The source of one of BYTE_TASKS.

    split: 'train' (100 000 examples), 'valid' or 'test' (2 000 each), drawn apart. options: the
    task's other fields, such as seed or rate.
    Raises ValueError for an unknown name or values that do not fit, TypeError for other options.
    """
    if name not in BYTE_TASKS:
        nearest = difflib.get_close_matches(name, BYTE_TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"name must be one of {sorted(BYTE_TASKS)}, got {name!r}: did you mean {nearest!r}?"
        )
    task = BYTE_TASKS[name]
    fields = {f.name for f in dataclasses.fields(task)} - {"split", "length", "target_length"}
    if not fields >= set(options):
        unknown = sorted(set(options) - fields)
        raise TypeError(
            f"options of {name} must be among {sorted(fields)}, got {unknown}: remove or rename it."
        )
    return task(split, length, target_length, **options)
