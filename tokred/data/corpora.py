"""Corpora: named random-access sets of documents, as bytes, split into train, valid and test.

    open_corpus('stdlib', 'train')            the Python standard library, needs no network
    open_corpus('file:notes.txt', 'train')    a file, a directory or a glob of text files
    open_corpus('lm1b', 'train')              a text set that TFDS has prepared on this machine
    open_corpus('lm1b', 'train', mock=100)    a hundred made-up documents instead

What comes from files is split by a hash of the documents' names (90, 5 and 5 percent), so a
document stays in its split whatever others come and go.
"""

import functools
import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np

from tokred.data.tfds_text import open_text_set

SPLITS = ("train", "valid", "test")
SHARES = {"train": 0.90, "valid": 0.05, "test": 0.05}  # of the documents of files
CHUNK = 8192  # bytes of a document cut from one large file

PREFIX = "file:"
MAGIC = "*?["
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
GENERATED = ("config-", "_sysconfigdata")  # differ from machine to machine

WORDS = "the of and to in is was it for on as with at by from they we an or one had not but what"

NamedDocuments = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of one split: `len` and `[index]`, which gives bytes.

    fingerprint: 16 hexadecimal digits over names and contents of all splits (of a TFDS set over
    its name, version and the sizes of its splits): equal fingerprints, equal data.
    in_memory: whether a pass over all documents is cheap.
    """

    name: str
    split: str
    fingerprint: str
    documents: Sequence[bytes] = field(repr=False)
    in_memory: bool = True

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> bytes:
        return self.documents[index]


def open_corpus(
    name: str,
    split: str,
    *,
    data_dir: str | PathLike | None = None,
    mock: int = 0,
    others: Sequence[str] = (),
) -> Corpus:
    """The documents of one split of 'stdlib', of text files, or of a TFDS text set.

    name: 'stdlib'; 'file:PATH' or a path that exists, where PATH is a file (cut into documents of
    about 8 KiB, at blank lines where there are any), a directory or a glob (one document per file,
    hidden and empty ones left out); or 'name' or 'name/config' of TFDS. split: 'train', 'valid'
    or 'test'. data_dir: where TFDS keeps its sets, its own default if None. mock: so many made-up
    documents instead, whatever the name; 0 for the real ones. others: names that the caller serves
    itself, only to be proposed for a misspelt one.

    Raises:
      ValueError: an unknown name or split, a set without text, a split without documents.
      FileNotFoundError: a missing file, or a set that was not prepared on this machine.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}: change split.")
    if mock:
        fingerprint = _fingerprint([(f"mock {mock}", b"")])
        return Corpus(name, split, fingerprint, MockDocuments(split, mock), in_memory=False)
    if name == "stdlib":
        return _take_split(name, split, load_stdlib())
    path = name.removeprefix(PREFIX)
    if name.startswith(PREFIX) or _looks_like_path(path) or os.path.exists(path):
        return _take_split(name, split, load_files(path))
    records, fingerprint = open_text_set(name, split, data_dir, others=("stdlib", *others))
    return Corpus(name, split, fingerprint, records, in_memory=False)


def _looks_like_path(name: str) -> bool:
    return name.startswith((os.sep, "~", ".")) or _has_magic(name)


def _has_magic(part: str) -> bool:
    return any(sign in part for sign in MAGIC)


def _take_split(name: str, split: str, documents: NamedDocuments) -> Corpus:
    chosen = tuple(text for key, text in documents if split_of(key) == split)
    if not chosen:
        raise ValueError(
            f"split must have at least one document, got none of the {len(documents)} documents "
            f"of {name!r} in {split!r}: add documents or change split."
        )
    return Corpus(name, split, _fingerprint(documents), chosen)


def split_of(document: str) -> str:
    """The split of a document of that name: by its hash, 90 percent 'train'."""
    digest = hashlib.sha256(document.encode("utf-8", "surrogateescape")).digest()
    place, end = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for split, share in SHARES.items():
        end += share
        if place < end:
            return split
    return "test"


def _fingerprint(documents: Sequence[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, text in documents:
        for part in (name.encode("utf-8", "surrogateescape"), text):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


@functools.cache
def load_stdlib() -> NamedDocuments:
    """Relative path and content of every module of this Python's standard library, by path.

    Without tests, idlelib, lib2to3, what pip installed, what the build generated, empty files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = _read(root, (path for path in _walk(root) if path.suffix == ".py"))
    if not documents:
        raise FileNotFoundError(
            f"The standard library must lie in {str(root)!r} as .py files, got none: "
            "use another corpus."
        )
    return documents


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED and not f.startswith(GENERATED)]
        yield from (Path(folder, file) for file in files if not file.startswith(GENERATED))


def load_files(path: str) -> NamedDocuments:
    """Names and contents of the documents of a file, a directory or a glob, sorted by name.

    Raises FileNotFoundError where there is no file.
    """
    place = Path(path).expanduser()
    if place.is_file():
        chunks = cut_document(place.read_bytes())
        return tuple((f"{place.name}#{i}", chunk) for i, chunk in enumerate(chunks))
    if place.is_dir():
        found = (p for p in place.rglob("*") if p.is_file() and not _is_hidden(p, place))
        documents = _read(place, found)
    else:
        found = (Path(match) for match in glob.glob(str(place), recursive=True))
        root = Path(*itertools.takewhile(lambda part: not _has_magic(part), place.parts))
        documents = _read(root, (match for match in found if match.is_file()))
    if not documents:
        raise FileNotFoundError(
            f"name must be an existing file, directory or glob with text, got {path!r}: "
            "change the path."
        )
    return documents


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _read(root: Path, paths: Iterable[Path]) -> NamedDocuments:
    """Documents named by their path below root; the empty ones are left out."""
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    read = ((name, path.read_bytes()) for name, path in named)
    return tuple((name, text) for name, text in read if text)


def cut_document(text: bytes, size: int = CHUNK) -> list[bytes]:
    """Cut into pieces of 3/4 to 5/4 of size (the last one: anything up to that).

    Each is cut behind the first blank line in that range, else behind a line, a word, or anywhere.
    Joined, they are the text.
    """
    pieces, start = [], 0
    while len(text) - start > size * 5 // 4:
        stop = _place_to_cut(text, start + size * 3 // 4, start + size * 5 // 4)
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]] if text[start:] else pieces


def _place_to_cut(text: bytes, first: int, last: int) -> int:
    for mark in (b"\n\n", b"\n\r\n", b"\n", b" "):
        found = text.find(mark, first, last)
        if found >= 0:
            return found + len(mark)
    return last


@dataclass(frozen=True)
class MockDocuments(Sequence[bytes]):
    """`count` made-up documents of 20 to 400 English words, fixed by split and index.

    Raises ValueError for a count below 1.
    """

    split: str
    count: int

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"mock must be at least 1 document, got {self.count}: change mock.")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in 0..{self.count - 1}, got {index}: change index.")
        rng = np.random.default_rng((SPLITS.index(self.split), index))
        words = rng.choice(WORDS.split(), rng.integers(20, 401))
        return " ".join(words).encode()
