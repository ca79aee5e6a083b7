"""Data of vision-language models by name.

    data = open_conversations('grid_questions', 'train', cells=(4, 4))   digits, without any files
    data = open_conversations('mix.json', 'train', length=512)           as LLaVA's data are stored
    data = open_conversations('coco_captions', 'train', length=256)      a set prepared by TFDS
    train_batches(data.source, data.transform, batch=32, seed=0)

Examples are those of tokred.data.conversations, whatever the name.
"""

import dataclasses
from os import PathLike
from typing import Any, NamedTuple

from tokred.data.conversations import (
    BYTES,
    TEMPLATE,
    ConversationFormat,
    ConversationTransform,
)
from tokred.data.grid_questions import GridQuestions
from tokred.data.llava import open_llava
from tokred.data.pairs import expect
from tokred.data.pipeline import Source, Transform
from tokred.data.tfds_pairs import MockPairs, open_tfds_pairs
from tokred.data.tokenizers import ByteTokenizer, Tokenizer

GRID = "grid_questions"
FILE = ".json"
VIEW = ("mean", "std")
FILE_OPTIONS = ("too_long",)
SET_OPTIONS = ("text", "question", "ask")
GRID_OPTIONS = {f.name for f in dataclasses.fields(GridQuestions)} - {
    "split", "length", "images", "tokenizer", "seed"
}  # fmt: skip


class Conversations(NamedTuple):
    """What train_batches and eval_batches take, and the sizes that a model needs."""

    source: Source
    transform: Transform
    form: ConversationFormat

    @property
    def vocab(self) -> int:
        """The number of ids, form.placeholder's among them."""
        return self.form.vocab


def open_conversations(
    name: str,
    split: str,
    *,
    length: int | None = None,
    images: int = 1,
    image_size: tuple[int, int] | None = None,
    tokenizer: Tokenizer = BYTES,
    seed: int = 0,
    data_dir: str | PathLike | None = None,
    mock: int = 0,
    **options: Any,
) -> Conversations:
    """Rows of `length` tokens about up to `images` images of (Y, X) pixels.

    name: 'grid_questions' (see GridQuestions), a .json (see open_llava) or a TFDS set (see
    open_tfds_pairs). split: 'train' or 'test'; files and sets: also 'valid', files: also 'all'.
    length, image_size: may be None for 'grid_questions' alone, which knows its own. tokenizer: of
    'grid_questions' it must be of bytes. seed: of the test split of 'grid_questions'. data_dir: the
    folder of a file's images, or where TFDS keeps its sets; None for their defaults. mock: so many
    made-up pairs instead of a file or a set.
    options: of 'grid_questions' the fields of GridQuestions; else template (of the prompts), mean
    and std (see ConversationTransform) and, of a file, too_long; of a set, text, question and ask.
    One of a set's captions is drawn in 'train', else the first is taken.

    Raises:
      ValueError: names, sizes and options that do not fit; see the functions above.
      FileNotFoundError: a missing file, or a set that was not prepared on this machine.
      TypeError: other options.
    """
    if name == GRID:
        _check_options(name, options, GRID_OPTIONS)
        how = {"length": length, "images": images, "seed": seed, "tokenizer": tokenizer}
        return _open_grid(split, image_size, {**how, **options})
    if length is None or image_size is None:
        raise TypeError(
            f"length and image_size must be given for {name!r}, got {length} and {image_size}: "
            "pass length=512, image_size=(224, 224)."
        )
    own = FILE_OPTIONS if name.endswith(FILE) else SET_OPTIONS
    _check_options(name, options, {"template", *VIEW, *own})
    form = ConversationFormat(length, images, tokenizer, options.get("template", TEMPLATE))
    view = {key: options[key] for key in VIEW if key in options}
    transform = ConversationTransform(form, image_size, **view, draw=split == "train")
    how = {key: options[key] for key in own if key in options}
    if mock:
        source = MockPairs(mock, split, len(transform.mean))
    elif name.endswith(FILE):
        how |= {"split": split, "folder": data_dir, "channels": len(transform.mean)}
        source = open_llava(name, form, **how)
    else:
        source = open_tfds_pairs(name, split, data_dir=data_dir, others=(GRID,), **how)
    return Conversations(source, transform, form)


def _open_grid(
    split: str, image_size: tuple[int, int] | None, how: dict[str, Any]
) -> Conversations:
    tokenizer = how["tokenizer"]
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    expect(is_bytes, "tokenizer", f"a ByteTokenizer for {GRID!r}", tokenizer)
    task = GridQuestions(split, **how)
    fits = image_size is None or tuple(image_size) == task.image_size
    expect(fits, "image_size", f"{task.image_size} for these cells, or None", image_size)
    return Conversations(task, task.ask, task.form)


def _check_options(name: str, options: dict[str, Any], known: set[str]) -> None:
    if not set(options) <= known:
        raise TypeError(
            f"options of {name!r} must be among {sorted(known)}, got "
            f"{sorted(set(options) - known)}: remove or rename it."
        )
