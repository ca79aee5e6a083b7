"""Text to token ids and back: plain bytes, or byte-level pairs (BPE) trained on one's own text.

Both start with the same special ids: 0 padding, 1 end of document, 2 unknown.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

PAD, END, UNKNOWN = 0, 1, 2
SPECIALS = ("<pad>", "</s>", "<unk>")
BYTES = 256


@runtime_checkable
class Tokenizer(Protocol):
    """What packing and decoding need; `vocab` is the number of ids, all of them in 0..vocab - 1."""

    @property
    def vocab(self) -> int: ...

    @property
    def byte_counts(self) -> Int32[np.ndarray, " V"]:
        """The number of bytes that each id stands for, 0 for special ids."""
        ...

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " N"]:
        """Ids of the text, without an end token."""
        ...

    def decode(self, ids: Int[np.ndarray, " N"]) -> str:
        """The text of the ids; special ids are left out, broken UTF-8 becomes U+FFFD."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """ByT5's bytes: id = byte + 3, after the three special ids; any bytes survive a round trip.

    sentinels: so many further ids after the bytes, for span corruption; see `sentinel`.
    Raises ValueError for a negative number of sentinels.
    """

    sentinels: int = 0

    def __post_init__(self):
        if self.sentinels < 0:
            raise ValueError(
                f"sentinels must be at least 0, got {self.sentinels}: change sentinels."
            )

    @property
    def vocab(self) -> int:
        return len(SPECIALS) + BYTES + self.sentinels

    @property
    def byte_counts(self) -> Int32[np.ndarray, " V"]:
        """1 for the ids of bytes, 0 for all others."""
        return _is_byte(np.arange(self.vocab)).astype(np.int32)

    def sentinel(self, number: int) -> int:
        """The id of sentinel 0, 1, ...; ValueError for one that the vocabulary lacks."""
        if not 0 <= number < self.sentinels:
            raise ValueError(
                f"number must be below sentinels={self.sentinels}, got {number}: "
                "change sentinels of the tokenizer."
            )
        return len(SPECIALS) + BYTES + number

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " N"]:
        """One id per byte, of UTF-8 for a str; TypeError for anything else."""
        return np.frombuffer(_as_bytes(text), np.uint8).astype(np.int32) + len(SPECIALS)

    def decode(self, ids: Int[np.ndarray, " N"]) -> str:
        """The bytes as UTF-8; special ids are left out, what is no UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Int[np.ndarray, " N"]) -> bytes:
        """The bytes themselves; special ids are left out."""
        ids = np.asarray(ids)
        return (ids[_is_byte(ids)] - len(SPECIALS)).astype(np.uint8).tobytes()


def _is_byte(ids: np.ndarray) -> np.ndarray:
    return (ids >= len(SPECIALS)) & (ids < len(SPECIALS) + BYTES)


def _as_bytes(text: str | bytes) -> bytes:
    if isinstance(text, str):
        return text.encode("utf-8")
    if isinstance(text, bytes):
        return text
    raise TypeError(f"text must be str or bytes, got {type(text).__name__}: convert text.")


@dataclass(frozen=True)
class BpeTokenizer:
    """Byte pairs (BPE) over the bytes of UTF-8; made by `train_bpe` or `load_bpe`.

    definition: the JSON of the `tokenizers` library. Any str survives a round trip; in bytes, what
    is no UTF-8 becomes U+FFFD before it is encoded.
    Raises ImportError without the library, ValueError for a definition of another kind.
    """

    definition: str = field(repr=False)
    vocab: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "vocab", self._library.get_vocab_size())
        found = tuple(map(self._library.id_to_token, range(len(SPECIALS))))
        if found != SPECIALS:
            raise ValueError(
                f"definition must begin with the ids {SPECIALS}, got {found}: "
                "train the tokenizer with train_bpe."
            )

    @cached_property
    def _library(self) -> Any:
        library = _import_tokenizers().Tokenizer.from_str(self.definition)
        library.encode_special_tokens = True  # '</s>' in a text is text
        return library

    @property
    def byte_counts(self) -> Int32[np.ndarray, " V"]:
        """The bytes of each id, 0 for special ids."""
        return self._byte_counts

    @cached_property
    def _byte_counts(self) -> Int32[np.ndarray, " V"]:
        # The library writes a byte as one character.
        names = map(self._library.id_to_token, range(self.vocab))
        return np.array([0 if name in SPECIALS else len(name) for name in names], np.int32)

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " N"]:
        """Ids without an end token; TypeError for anything but str and bytes."""
        readable = _as_bytes(text).decode("utf-8", errors="replace")
        return np.array(self._library.encode(readable).ids, np.int32)

    def decode(self, ids: Int[np.ndarray, " N"]) -> str:
        """The text; special ids are left out, a character cut in two becomes U+FFFD."""
        return self._library.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def save(self, path: str | PathLike) -> None:
        """Write the definition, a JSON file for `load_bpe`."""
        Path(path).write_text(self.definition, encoding="utf-8")


def train_bpe(texts: Iterable[str | bytes], *, vocab: int) -> BpeTokenizer:
    """A tokenizer with up to `vocab` ids (fewer where the texts hold fewer pairs).

    The same texts give the same tokenizer. Raises ValueError for a vocab below the 259 ids of
    bytes and specials, ImportError without the `tokenizers` library.
    """
    least = len(SPECIALS) + BYTES
    if vocab < least:
        raise ValueError(f"vocab must be at least {least}, got {vocab}: change vocab.")
    library = _import_tokenizers()
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    readable = (_as_bytes(text).decode("utf-8", errors="replace") for text in texts)
    model.train_from_iterator(readable, trainer)
    return BpeTokenizer(model.to_str())


def load_bpe(path: str | PathLike) -> BpeTokenizer:
    """The tokenizer that `save` wrote; FileNotFoundError without the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"path must be a tokenizer that was saved, got {str(path)!r}: "
            "train one with train_bpe and save it."
        )
    return BpeTokenizer(Path(path).read_text(encoding="utf-8"))


def _import_tokenizers() -> Any:
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "BPE needs the library tokenizers, which is not installed: "
            'run `pip install "tokred[bpe]"`.'
        ) from error
    return tokenizers


def bytes_of(ids: Int[np.ndarray, "..."], tokenizer: Tokenizer) -> int:
    """How many bytes the ids stand for: the divisor of a loss in bits per byte.

    Bits per byte = (sum of the targets' nats) / ln 2 / bytes_of(the targets that count), which
    compares tokenizers; end tokens cost bits and stand for no byte.
    """
    return int(tokenizer.byte_counts[np.asarray(ids)].sum())
