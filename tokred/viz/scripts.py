"""Bytes as a reader sees them: what kind each is, which characters they make, of which script."""

import unicodedata
from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from tokred.data.tokenizers import BYTES, SPECIALS

CLASSES = (
    "letter", "digit", "whitespace", "punctuation", "control",
    "lead byte", "continuation byte", "no UTF-8 or sentinel", "special",
)  # fmt: skip

# Where the Unicode blocks of a script begin; what lies between the named ones is 'other'.
BLOCKS = (
    (0x0000, "Latin"), (0x02B0, "other"), (0x0370, "Greek"), (0x0400, "Cyrillic"),
    (0x0530, "Armenian"), (0x0590, "Hebrew"), (0x0600, "Arabic"), (0x0700, "other"),
    (0x0750, "Arabic"), (0x0780, "other"), (0x08A0, "Arabic"), (0x0900, "Devanagari"),
    (0x0980, "Bengali"), (0x0A00, "Gurmukhi"), (0x0A80, "Gujarati"), (0x0B00, "Odia"),
    (0x0B80, "Tamil"), (0x0C00, "Telugu"), (0x0C80, "Kannada"), (0x0D00, "Malayalam"),
    (0x0D80, "Sinhala"), (0x0E00, "Thai"), (0x0E80, "Lao"), (0x0F00, "Tibetan"),
    (0x1000, "Myanmar"), (0x10A0, "Georgian"), (0x1100, "Hangul"), (0x1200, "Ethiopic"),
    (0x13A0, "other"), (0x1780, "Khmer"), (0x1800, "Mongolian"), (0x18B0, "other"),
    (0x1E00, "Latin"), (0x1F00, "Greek"), (0x2000, "other"), (0x3040, "Hiragana"),
    (0x30A0, "Katakana"), (0x3100, "other"), (0x3130, "Hangul"), (0x3190, "other"),
    (0x3400, "Han"), (0x4DC0, "other"), (0x4E00, "Han"), (0xA000, "other"),
    (0xAC00, "Hangul"), (0xD7B0, "other"), (0xF900, "Han"), (0xFB00, "Latin"),
    (0xFB07, "other"), (0xFB1D, "Hebrew"), (0xFB50, "Arabic"), (0xFE00, "other"),
    (0xFE70, "Arabic"), (0xFEFF, "other"), (0x20000, "Han"), (0x323B0, "other"),
)  # fmt: skip
STARTS = [start for start, _ in BLOCKS]


class Character(NamedTuple):
    """Ids start..stop - 1 of a row and what they stand for: one character, or one odd id."""

    text: str
    start: int
    stop: int
    script: str | None


def script_of(character: str) -> str | None:
    """The script of the block that a letter or mark lies in; None for anything else."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    return BLOCKS[bisect_right(STARTS, ord(character)) - 1][1]


def classify(ids: Int[np.ndarray, "*B N"]) -> Int[np.ndarray, "*B N"]:
    """The number in CLASSES of each id."""
    return _CLASS_OF[np.clip(ids, 0, len(_CLASS_OF) - 1)]


def _class_of(byte: int) -> str:
    if byte >= 0x80:
        if byte < 0xC0:
            return "continuation byte"
        return "lead byte" if 0xC2 <= byte < 0xF5 else "no UTF-8 or sentinel"
    character = chr(byte)
    for name, holds in (
        ("letter", str.isalpha),
        ("digit", str.isdigit),
        ("whitespace", str.isspace),
    ):
        if holds(character):
            return name
    return "punctuation" if character.isprintable() else "control"


_NAMES = ["special"] * len(SPECIALS) + [_class_of(byte) for byte in range(BYTES)] + ["special"]
_CLASS_OF = np.array([CLASSES.index(name) for name in _NAMES])


def split_characters(ids: Int[np.ndarray, " N"]) -> list[Character]:
    """The characters of a row of byte ids, in order; special ids and bytes that are no UTF-8 stand
    alone, named in angle brackets."""
    found, place = [], 0
    while place < len(ids):
        found.append(_read(ids, place))
        place = found[-1].stop
    return found


def _read(ids: np.ndarray, place: int) -> Character:
    """The character that begins there; what is none, or would steer a terminal, is named."""
    first = int(ids[place]) - len(SPECIALS)
    stop = place + 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
    bytes_ = ids[place:stop] - len(SPECIALS)
    if ((bytes_ >= 0) & (bytes_ < BYTES)).all():
        raw = bytes_.astype(np.uint8).tobytes()
        text = raw.decode("utf-8", errors="ignore")
        readable = text.isprintable() or text in "\n\t" or text > "\x9f"
        if text.encode() == raw and readable:
            return Character(text, place, stop, script_of(text))
    return Character(_name(int(ids[place])), place, place + 1, None)


def _name(id_: int) -> str:
    return SPECIALS[id_] if 0 <= id_ < len(SPECIALS) else f"<{id_}>"
