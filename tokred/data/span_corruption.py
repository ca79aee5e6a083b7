"""Span corruption, the objective of T5: a text with holes is read, and what was in them written.

    text       the quick brown fox jumps
    input      the <0> brown <1> jumps </s>
    target     <0> quick <1> fox </s>        (T5 writes each sentinel ahead of what it stood for)

A row of L tokens has round(L * density) noise tokens in round(noise / mean_span) spans, at least
one of each; all masks with these counts, and with a text before each span, are equally likely.

Sentinels count from `first_sentinel` in steps of `direction`. The default is that of ByT5's own
checkpoints, 258 and downwards, in a vocabulary of 259: id 258 is also that of byte 255, 257 that
of byte 254, and so on. The first eleven, down to 248, are bytes that UTF-8 never has, so in a text
they are told apart from it; further ones, or bytes that are no UTF-8, share ids with the text. The
sentinels of ByteTokenizer(sentinels=n) have ids of their own: first_sentinel=259, direction=1.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from tokred.data.pairs import Example, expect, make_pair
from tokred.data.tokenizers import BYTES, SPECIALS

LAST_BYTE = len(SPECIALS) + BYTES - 1  # 258


def span_lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many raw tokens give an input of `length`, and the length of their target.

    Both with their end token, as T5 counts them: the largest raw row whose input is not longer. At
    density 0.5 the target is not longer than the input.
    """
    raw = length
    while _lengths(raw + 1, *_planned(raw + 1, density, mean_span))[0] <= length:
        raw += 1
    inputs, targets = _lengths(raw, *_planned(raw, density, mean_span))
    shorten = density == 0.5 and targets > inputs
    return raw - shorten, targets - shorten


def _planned(raw: int, density: float, mean_span: float) -> tuple[int, int]:
    """Noise tokens and spans, which may be 0 in a short row."""
    noise = round(raw * density)
    return noise, round(noise / mean_span)


def count_spans(raw: int, density: float, mean_span: float) -> tuple[int, int]:
    """Noise tokens and spans of a row of `raw` >= 2 tokens: at least one, at most what fits."""
    noise = min(max(round(raw * density), 1), raw - 1)
    return noise, max(round(min(noise, raw - noise) / mean_span), 1)


def _lengths(raw: int, noise: int, spans: int) -> tuple[int, int]:
    return raw - noise + spans + 1, noise + spans + 1


def draw_mask(
    raw: int, *, density: float, mean_span: float, rng: np.random.Generator
) -> Bool[np.ndarray, " {raw}"]:
    """True at noise; a row begins with text and ends with noise. Below 2 tokens there is none."""
    if raw < 2:
        return np.zeros(raw, bool)
    noise, spans = count_spans(raw, density, mean_span)
    noisy = _segments(noise, spans, rng)
    clean = _segments(raw - noise, spans, rng)
    return np.repeat(np.tile([False, True], spans), np.stack([clean, noisy], 1).ravel())


def _segments(items: int, count: int, rng: np.random.Generator) -> Int[np.ndarray, " {count}"]:
    """Lengths of `count` non-empty pieces of `items`, every partition equally likely."""
    cuts = np.arange(items - 1) < count - 1
    rng.shuffle(cuts)
    return np.diff(np.concatenate([[0], 1 + np.flatnonzero(cuts), [items]]))


def replace_spans(
    ids: Int[np.ndarray, " L"],
    mask: Bool[np.ndarray, " L"],
    *,
    first_sentinel: int = LAST_BYTE,
    direction: int = -1,
) -> Int[np.ndarray, " n"]:
    """The row with a sentinel in place of each masked span; n = L - masked + spans.

    With ~mask for mask it is the target. No end token.
    """
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    sentinels = first_sentinel + direction * (np.cumsum(begins) - 1)
    return np.where(begins, sentinels, ids)[~mask | begins]


@dataclass(frozen=True)
class SpanCorruption:
    """The transform of rows 'token' [R]: draws the spans and makes the example of data.pairs.

    length: of the input, N, for which a row of `raw_length` tokens is needed. target_length: M, as
    much as such rows need if None. density: share of noise. mean_span: tokens of a span.
    first_sentinel, direction (-1 or 1): see above. sentinels: so many there are, ByT5's 100.
    A longer row is cut at random to raw_length; a shorter one gives a padded example, and so may
    density 0.5, by one place. 'language' int32 [] of a row is kept.

    Raises ValueError for numbers that do not fit each other.
    """

    length: int
    target_length: int | None = None
    density: float = 0.15
    mean_span: float = 20.0
    first_sentinel: int = LAST_BYTE
    direction: int = -1
    sentinels: int = 100

    def __post_init__(self):
        expect(0 < self.density <= 0.5, "density", "in (0, 0.5]", self.density)
        expect(self.mean_span >= 1, "mean_span", "at least 1 token", self.mean_span)
        expect(self.direction in (-1, 1), "direction", "-1 or 1", self.direction)
        self._check_lengths()
        self._check_sentinels()

    def _check_lengths(self) -> None:
        wanted = "at least 3, for a token, a span and the end"
        expect(self.length >= 3, "length", wanted, self.length)
        if self.target_length is not None:
            least = _lengths(self.raw_length, *self._counts)[1]
            wanted = f"at least {least} for inputs of length={self.length}"
            expect(self.target_length >= least, "target_length", wanted, self.target_length)

    def _check_sentinels(self) -> None:
        spans, first = self._counts[1], self.first_sentinel
        if spans > self.sentinels:
            raise ValueError(
                f"mean_span must give at most sentinels={self.sentinels} spans at "
                f"length={self.length}, got {spans} with {self.mean_span:g}: change mean_span."
            )
        lowest = min(first, first + self.direction * (spans - 1))
        wanted = f"such that all {spans} sentinels have ids from {len(SPECIALS)} on"
        expect(lowest >= len(SPECIALS), "first_sentinel", wanted, first)

    @cached_property
    def raw_length(self) -> int:
        """Tokens of a row that fill the input: R.

        That of span_lengths, less where its count leaves out the one span that there always is.
        """
        raw = span_lengths(self.length, self.density, self.mean_span)[0]
        while _lengths(raw, *count_spans(raw, self.density, self.mean_span))[0] > self.length:
            raw -= 1
        return raw

    @property
    def targets(self) -> int:
        """M."""
        return self.target_length or _lengths(self.raw_length, *self._counts)[1]

    @property
    def vocab(self) -> int:
        """Ids of bytes and of all sentinels: 259, more where sentinels have ids of their own."""
        last = self.first_sentinel + self.direction * (self.sentinels - 1)
        return max(LAST_BYTE, self.first_sentinel, last) + 1

    @property
    def _counts(self) -> tuple[int, int]:
        return count_spans(self.raw_length, self.density, self.mean_span)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Pure; all randomness is rng's."""
        token = example["token"]
        surplus = len(token) - self.raw_length
        if surplus > 0:
            start = int(rng.integers(surplus + 1))
            token = token[start : start + self.raw_length]
        mask = draw_mask(len(token), density=self.density, mean_span=self.mean_span, rng=rng)
        how = {"first_sentinel": self.first_sentinel, "direction": self.direction}
        rows: dict[str, Any] = {"length": self.length, "target_length": self.targets}
        source, target = replace_spans(token, mask, **how), replace_spans(token, ~mask, **how)
        kept = {key: example[key] for key in ("language",) if key in example}
        return make_pair(source, target, **rows) | kept
