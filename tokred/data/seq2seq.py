"""Data of encoder-decoders by name: what a byte-level model trains on.

    data = open_seq2seq('stdlib', 'train', length=1024)             span corruption of a corpus
    data = open_seq2seq('mc4', 'train', length=1024, languages=MRT5)     in fifteen languages
    data = open_seq2seq('spelling_correction', 'train', length=64)  a task on characters
    train_batches(data.source, data.transform, batch=32, seed=0)

Examples are those of tokred.data.pairs, whatever the name.
"""

import dataclasses
from collections.abc import Sequence
from os import PathLike
from typing import Any

from tokred.data.byte_tasks import BYTE_TASKS, open_byte_task
from tokred.data.corpora import open_corpus
from tokred.data.diagnostics import keep_example
from tokred.data.languages import MC4_NAMES, MixedRows, open_languages
from tokred.data.pairs import expect
from tokred.data.span_corruption import SpanCorruption
from tokred.data.text import Text, open_text, pack_rows
from tokred.data.tokenizers import ByteTokenizer

OBJECTIVES = ("spans", "causal")
SPAN_OPTIONS = {f.name for f in dataclasses.fields(SpanCorruption)} - {"length", "target_length"}


def open_seq2seq(
    name: str,
    split: str,
    *,
    length: int,
    target_length: int | None = None,
    seed: int = 0,
    objective: str = "spans",
    languages: Sequence[str] = (),
    packed: bool = True,
    data_dir: str | PathLike | None = None,
    mock: int = 0,
    **options: Any,
) -> Text:
    """Inputs of `length` bytes and targets of `target_length`: of a corpus or one of BYTE_TASKS.

    split: 'train', 'valid' or 'test'. target_length: if None, what the longest target takes.
    seed: of the documents' order, or of a task's draws. options: of SpanCorruption, such as
    mean_span, or of the task, such as rate.
    Corpora (see open_corpus) only: languages, each as often as every other (see open_languages),
    which examples then tell by their number, 'language' int32 []; packed (see pack_rows); data_dir
    and mock; objective, 'spans', or 'causal' for the next bytes: open_text's, for a decoder alone.

    Raises:
      ValueError: names, lengths and options that do not fit; see the functions above.
      FileNotFoundError: a missing file, or a set that was not prepared on this machine.
      TypeError: other options.
    """
    expect(objective in OBJECTIVES, "objective", f"one of {OBJECTIVES}", objective)
    where = {"data_dir": data_dir, "mock": mock}
    how = {"packed": packed, "seed": seed}
    if name in BYTE_TASKS or objective == "causal":
        what = f"the task {name!r}" if name in BYTE_TASKS else "objective='causal'"
        expect(not languages, "languages", f"none for {what}", tuple(languages))
    if name in BYTE_TASKS:
        task = open_byte_task(name, split, length, target_length, seed=seed, **options)
        return Text(task, keep_example, task.vocab)
    if objective == "causal":
        wanted = "None with objective='causal', whose targets have the length of the inputs"
        expect(target_length is None, "target_length", wanted, target_length)
        return open_text(
            name, split, length=length, tokenizer=ByteTokenizer(), **how, **where, **options
        )
    return _corrupt(name, split, _spans(length, target_length, options), languages, how, where)


def _spans(length: int, target_length: int | None, options: dict[str, Any]) -> SpanCorruption:
    if not set(options) <= SPAN_OPTIONS:
        raise TypeError(
            f"options of span corruption must be among {sorted(SPAN_OPTIONS)}, got "
            f"{sorted(set(options) - SPAN_OPTIONS)}: remove or rename it."
        )
    return SpanCorruption(length, target_length, **options)


def _corrupt(
    name: str,
    split: str,
    transform: SpanCorruption,
    languages: Sequence[str],
    how: dict[str, Any],
    where: dict[str, Any],
) -> Text:
    """Rows of raw_length bytes; packed ones share their last byte with the next row."""
    row = transform.raw_length - 1
    if languages:
        corpora = open_languages(name, split, languages, **where)
        parts = (pack_rows(corpus, ByteTokenizer(), row, **how) for corpus in corpora)
        return Text(MixedRows(tuple(parts)), transform, transform.vocab)
    known = name not in MC4_NAMES or where["mock"] > 0
    expect(known, "languages", f"given for {name!r}, such as ('en', 'de')", tuple(languages))
    corpus = open_corpus(name, split, others=tuple(BYTE_TASKS), **where)
    return Text(pack_rows(corpus, ByteTokenizer(), row, **how), transform, transform.vocab)
