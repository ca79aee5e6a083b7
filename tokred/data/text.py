"""Language data by name: what a decoder trains on, from a corpus or from a diagnostic task.

    text = open_text('stdlib', 'train', length=256, tokenizer=ByteTokenizer())
    train_batches(text.source, text.transform, batch=32, seed=0)

Examples are those of tokred.data.packing, whatever the name.
"""

from os import PathLike
from typing import Any, NamedTuple

from tokred.data.corpora import Corpus, open_corpus
from tokred.data.diagnostics import DIAGNOSTICS, keep_example, open_diagnostic
from tokred.data.packing import ChainedRows, DocumentRows, PackedRows, RowTransform
from tokred.data.pipeline import Source, Transform
from tokred.data.tokenizers import Tokenizer

__all__ = ["Text", "open_corpus", "open_text", "pack_rows"]


class Text(NamedTuple):
    """What train_batches and eval_batches take, and the number of ids that a model needs."""

    source: Source
    transform: Transform
    vocab: int


def open_text(
    name: str,
    split: str,
    *,
    length: int,
    tokenizer: Tokenizer | None = None,
    packed: bool = True,
    seed: int = 0,
    data_dir: str | PathLike | None = None,
    mock: int = 0,
    **options: Any,
) -> Text:
    """Rows of `length` tokens of a corpus (see open_corpus) or of one of DIAGNOSTICS.

    split: 'train', 'valid' or 'test'. seed: of the documents' order, or of a diagnostic's draws.
    Corpora only: tokenizer, which they need; packed (see pack_rows); data_dir and mock.
    Diagnostics only: options, such as vocab; see open_diagnostic. They make their own tokens.

    Raises:
      ValueError, FileNotFoundError: of open_corpus, open_diagnostic and pack_rows.
      TypeError: a corpus without tokenizer, or with options; a diagnostic without that option.
    """
    if name in DIAGNOSTICS:
        source = open_diagnostic(name, split, length, seed=seed, **options)
        return Text(source, keep_example, source.vocab)
    if options:
        raise TypeError(
            f"options must be none for the corpus {name!r}, got {sorted(options)}: "
            f"remove them, they are for {list(DIAGNOSTICS)}."
        )
    corpus = open_corpus(name, split, data_dir=data_dir, mock=mock, others=tuple(DIAGNOSTICS))
    if tokenizer is None:
        raise TypeError(
            f"tokenizer must be given for the corpus {name!r}, got None: "
            "pass tokenizer=ByteTokenizer()."
        )
    source = pack_rows(corpus, tokenizer, length, packed=packed, seed=seed)
    return Text(source, RowTransform(length), tokenizer.vocab)


def pack_rows(
    corpus: Corpus, tokenizer: Tokenizer, length: int, *, packed: bool = True, seed: int = 0
) -> PackedRows | ChainedRows | DocumentRows:
    """Rows of a corpus: PackedRows if it is in memory, else ChainedRows; unpacked: DocumentRows."""
    if not packed:
        return DocumentRows(corpus, tokenizer)
    if corpus.in_memory:
        return PackedRows(corpus, tokenizer, length, seed)
    return ChainedRows(corpus, tokenizer, length)
