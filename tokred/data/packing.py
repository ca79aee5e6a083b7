"""Documents to rows of tokens: packed one after another, or one document to a row.

A source gives raw rows, 'token' and 'document' int32 [M] with M <= N + 1; RowTransform makes the
example of N tokens of them:

    input int32 [N], target int32 [N]   a token and the next one
    weight float32 [N]                  0 where the target does not count
    position int32 [N]                  place since the document began in this row, -1 padding
    document int32 [N]                  number of the document in the row, -1 padding

Every document is ended by the end token. A target counts unless it is padding or belongs to
another document than its input. A document that a row cuts into begins there at position 0, so a
position is always below N.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, Shaped

from tokred.data.tokenizers import END, PAD, Tokenizer

Example = dict[str, Any]


@runtime_checkable
class Documents(Protocol):
    """Random access to documents as bytes: a Corpus."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes: ...


def encode_document(document: bytes, tokenizer: Tokenizer) -> Int32[np.ndarray, " M"]:
    """The document's tokens and the end token."""
    return np.append(tokenizer.encode(document), np.int32(END))


@dataclass(frozen=True, eq=False)
class PackedRows:
    """All documents, in an order drawn from seed, as one stream cut into rows of `length` + 1.

    Row i is stream[i * length : (i + 1) * length + 1]: it shares its last token with the next row,
    so every token but those of the tail is an input once, and every one but the first a target.
    Tokenises all documents on first use and keeps them. Raises ValueError for a length below 1,
    or, on first use, for documents that do not fill one row.
    """

    documents: Documents
    tokenizer: Tokenizer
    length: int
    seed: int = 0

    def __post_init__(self):
        _expect_length(self.length)

    @cached_property
    def _stream(self) -> tuple[Shaped[np.ndarray, " T"], Int[np.ndarray, " documents"]]:
        """All tokens, and where each document begins."""
        order = np.random.default_rng(self.seed).permutation(len(self.documents))
        small = np.min_scalar_type(self.tokenizer.vocab - 1)
        documents = (self.documents[int(i)] for i in order)
        pieces = [encode_document(text, self.tokenizer).astype(small) for text in documents]
        stream = np.concatenate(pieces)
        if len(stream) <= self.length:
            raise ValueError(
                f"length must be below the {len(stream)} tokens of all documents, "
                f"got {self.length}: change length."
            )
        return stream, np.cumsum([0, *map(len, pieces[:-1])])

    def __len__(self) -> int:
        return (len(self._stream[0]) - 1) // self.length

    def __getitem__(self, index: int) -> Example:
        """'token' and 'document' int32 [length + 1]; IndexError outside 0..len - 1."""
        _expect_index(index, len(self))
        stream, begins = self._stream
        span = np.arange(index * self.length, (index + 1) * self.length + 1)
        document = np.searchsorted(begins, span, side="right")
        return {
            "token": stream[span].astype(np.int32),
            "document": (document - document[0]).astype(np.int32),
        }


@dataclass(frozen=True, eq=False)
class ChainedRows:
    """Row i begins with document i and goes on with the following ones until it is full.

    Random access without a pass over the set, for sets that are too large for one. Within an
    epoch a document that is shorter than a row stands in several rows (its own and those of its
    predecessors, about length / mean length in all), and what a document has beyond
    `length` + 1 tokens in no row: for long documents take DocumentRows. The last rows go on with
    the first documents. Raises ValueError for a length below 1.
    """

    documents: Documents
    tokenizer: Tokenizer
    length: int

    def __post_init__(self):
        _expect_length(self.length)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        """'token' and 'document' int32 [length + 1]; IndexError outside 0..len - 1."""
        _expect_index(index, len(self))
        pieces, room = [], self.length + 1
        while room > 0:
            following = (index + len(pieces)) % len(self)
            pieces.append(encode_document(self.documents[following], self.tokenizer)[:room])
            room -= len(pieces[-1])
        document = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        return {"token": np.concatenate(pieces), "document": document.astype(np.int32)}


@dataclass(frozen=True, eq=False)
class DocumentRows:
    """One whole document per row, of whatever length; RowTransform cuts or pads it."""

    documents: Documents
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        """'token' and 'document' int32 [M]; IndexError outside 0..len - 1."""
        _expect_index(index, len(self))
        token = encode_document(self.documents[index], self.tokenizer)
        return {"token": token, "document": np.zeros_like(token)}


@dataclass(frozen=True)
class RowTransform:
    """A raw row to the example of `length` tokens that this module's docstring describes.

    A row of up to length + 1 tokens draws nothing; of a longer one a random window is taken.
    """

    length: int

    def __post_init__(self):
        _expect_length(self.length)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Pure; all randomness is rng's."""
        token, document = example["token"], example["document"]
        surplus = len(token) - (self.length + 1)
        if surplus > 0:
            start = int(rng.integers(surplus + 1))
            token, document = (x[start : start + self.length + 1] for x in (token, document))
        return label_row(token, document, length=self.length)


def label_row(
    token: Int32[np.ndarray, " M"], document: Int32[np.ndarray, " M"], *, length: int
) -> Example:
    """Inputs, targets, weights, positions and document numbers of M <= length + 1 tokens.

    document: ascending numbers. What is missing to `length` is padded at the end.
    """
    here, follows = document[:-1], document[1:]
    _, first = np.unique(here, return_index=True)
    number = np.searchsorted(first, np.arange(len(here)), side="right") - 1
    position = np.arange(len(here)) - first[number]
    missing = (0, length - len(here))
    return {
        "input": np.pad(token[:-1], missing, constant_values=PAD),
        "target": np.pad(token[1:], missing, constant_values=PAD),
        "weight": np.pad((here == follows).astype(np.float32), missing),
        "position": np.pad(position.astype(np.int32), missing, constant_values=-1),
        "document": np.pad(number.astype(np.int32), missing, constant_values=-1),
    }


def _expect_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}: change length.")


def _expect_index(index: int, size: int) -> None:
    if not 0 <= index < size:
        raise IndexError(f"index must be in 0..{size - 1}, got {index}: change index.")
