"""Texts in several languages, each as often as every other.

open_languages('wiki40b', 'train', ('en', 'de'))    the sets wiki40b/en and wiki40b/de of TFDS
open_languages('mc4', 'train', MRT5)                fifteen languages of c4/multilingual
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from tokred.data.corpora import SPLITS, Corpus, open_corpus
from tokred.data.pairs import expect
from tokred.data.pipeline import Example, Source
from tokred.data.tfds_text import open_text_set

# Those of XNLI, in which MrT5 was trained.
MRT5 = ("en", "fr", "es", "de", "el", "bg", "ru", "tr", "ar", "vi", "th", "zh", "hi", "sw", "ur")
MC4 = "c4/multilingual"  # one set, whose splits are the languages
MC4_NAMES = ("mc4", MC4)


@dataclass(frozen=True, eq=False)
class MixedRows:
    """Row i is row i // L of source i % L, with the source's number as 'language' int32 [].

    Every run of L rows has one of each source. An epoch is one of the largest source; the others
    begin anew. A row is in one language, unlike rows packed from mixed documents.
    Raises ValueError without sources, or with an empty one.
    """

    sources: tuple[Source, ...]

    def __post_init__(self):
        expect(len(self.sources) >= 1, "sources", "at least one", self.sources)
        sizes = [len(source) for source in self.sources]
        expect(min(sizes) >= 1, "sources", "at least one row long each", sizes)

    def __len__(self) -> int:
        return len(self.sources) * max(map(len, self.sources))

    def __getitem__(self, index: int) -> Example:
        """The row of a source and 'language'; IndexError outside 0..len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}: change index.")
        place, language = divmod(index, len(self.sources))
        source = self.sources[language]
        return {**source[place % len(source)], "language": np.int32(language)}


def open_languages(
    name: str,
    split: str,
    languages: Sequence[str],
    *,
    data_dir: str | PathLike | None = None,
    mock: int = 0,
) -> tuple[Corpus, ...]:
    """A corpus per language: the TFDS sets 'name/language', or of 'mc4' its splits.

    split, data_dir, mock: see open_corpus; mock documents are the same in every language.

    Raises:
      ValueError: no languages, one given twice, a name or a language that TFDS lacks.
      FileNotFoundError: a set that was not prepared on this machine.
    """
    unique = len(set(languages)) == len(languages) > 0
    expect(unique, "languages", "one or more names, all different", tuple(languages))
    if name in MC4_NAMES and not mock:
        expect(split in SPLITS, "split", f"one of {SPLITS}", split)
        return tuple(_open_mc4(split, language, data_dir) for language in languages)
    names = (f"{name}/{language}" for language in languages)
    return tuple(open_corpus(each, split, data_dir=data_dir, mock=mock) for each in names)


def _open_mc4(split: str, language: str, data_dir: str | PathLike | None) -> Corpus:
    records, fingerprint = open_text_set(MC4, split, data_dir, language=language)
    return Corpus(f"{MC4}/{language}", split, fingerprint, records, in_memory=False)
