"""The data that a config asks for: batches to train on, and fixed passes to evaluate on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tokred.data.conversations import BYTES
from tokred.data.diagnostics import DIAGNOSTICS
from tokred.data.digits import Canvas, DigitSource
from tokred.data.pipeline import Batches, Source, Transform, eval_batches, train_batches
from tokred.data.seq2seq import open_seq2seq
from tokred.data.text import open_text
from tokred.data.tfds_images import find_image_set, open_source
from tokred.data.tokenizers import ByteTokenizer, Tokenizer, bytes_of, load_bpe
from tokred.data.vision_language import open_conversations
from tokred.models.decoder import DecoderConfig
from tokred.models.encoder_decoder_config import EncoderDecoderConfig
from tokred.models.vit import ViTConfig
from tokred.models.vlm import VLMConfig
from tokred.train.config import FREE, Config
from tokred.train.mesh import round_up, shard_of

SPLITS = ("train", "test")
EVAL_SEED = 1000  # the same placements for every model and every method


@dataclass(frozen=True)
class Inputs:
    """Sources with their transforms.

    passes: over the test split, each with its own draws, which never change. tokenizer: of text.
    bytes_per_token: of the test split, None where tokens stand for no bytes.
    """

    train: Source
    augment: Transform
    test: Source
    view: Transform
    batch: int
    eval_batch: int
    threads: int
    passes: int = 1
    shard: int = 0
    count: int = 1
    tokenizer: Any = None
    bytes_per_token: float | None = None

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Each token as a reader sees it."""
        if self.tokenizer is None:
            return [str(int(i)) for i in ids]
        return [self.tokenizer.decode(np.asarray([i], np.int32)) for i in ids]

    def train_batches(self, seed: int) -> Batches:
        """Endless shuffled batches, of each the rows that this process reads."""
        return train_batches(
            self.train, self.augment, batch=self.batch, seed=seed, **self._reading()
        )

    def eval_batches(self) -> Iterable[Mapping[str, np.ndarray]]:
        """Every test example, once per pass, in an order and with draws that never change."""
        for seed in range(EVAL_SEED, EVAL_SEED + self.passes):
            yield from eval_batches(
                self.test, self.view, batch=self.eval_batch, seed=seed, **self._reading()
            )

    def _reading(self) -> dict[str, int]:
        prefetch = max(2, self.threads)
        return {
            "shard": self.shard,
            "count": self.count,
            "num_threads": self.threads,
            "prefetch": prefetch,
        }


def make_inputs(config: Config, model: Any, mesh: Mesh) -> Inputs:
    """The inputs of config.data, sized for the model and cut for this process.

    The evaluation batch is rounded up to what divides over the mesh; surplus rows do not count.

    Raises:
      ValueError: an unknown set, or one that does not fit the model.
      FileNotFoundError: a set that is not prepared on this machine.
    """
    data, (shard, count) = config.data, shard_of(mesh)
    sizes = {"batch": data.batch, "eval_batch": round_up(mesh, data.eval_batch)}
    sizes |= {"threads": data.threads, "shard": shard, "count": count}
    if config.task == "text":
        return _text(config, model, sizes)
    if config.task == "seq2seq":
        return _pairs(config, model, sizes)
    if config.task == "talk":
        return _talk(config, model, sizes)
    return _images(data, model, sizes)


def _text(config: Config, model: DecoderConfig, sizes: dict[str, int]) -> Inputs:
    """Sequences of config.data.length tokens of a corpus or a diagnostic; see `data.open_text`."""
    data = config.data
    tokenizer = ByteTokenizer() if data.tokenizer == "bytes" else load_bpe(data.tokenizer)
    how = {"length": data.length, "tokenizer": tokenizer, "packed": data.packed}
    how |= {"data_dir": data.data_dir, "mock": data.mock, **data[FREE]}
    train = open_text(data.name, "train", seed=config.seed, **how)
    test = open_text(data.name, "test", **how)  # the same rows for every seed
    if train.vocab > model.vocab or data.length > model.context:
        raise ValueError(
            f"data {data.name!r} has {train.vocab} different tokens in sequences of {data.length}, "
            f"the model takes {model.vocab} in a context of {model.context}; set "
            f"config.model.vocab={max(train.vocab, model.vocab)} and "
            f"config.model.context={max(data.length, model.context)}."
        )
    held = Head(test.source, data.eval_rows or len(test.source))
    known = None if data.name in DIAGNOSTICS else tokenizer
    per_token = None if known is None else _bytes_per_token(held, test.transform, known)
    return Inputs(
        train.source, train.transform, held, test.transform, **sizes, tokenizer=known,
        bytes_per_token=per_token,
    )  # fmt: skip


def _pairs(config: Config, model: EncoderDecoderConfig, sizes: dict[str, int]) -> Inputs:
    """Sources of config.data.length bytes with their targets; see `data.open_seq2seq`."""
    data = config.data
    how = {"length": data.length, "target_length": data.target_length, "packed": data.packed}
    how |= {"languages": tuple(data.languages), "data_dir": data.data_dir, "mock": data.mock}
    train = open_seq2seq(data.name, "train", seed=config.seed, **how, **data[FREE])
    test = open_seq2seq(data.name, "test", **how, **data[FREE])  # the same rows for every seed
    row = test.transform(test.source[0], np.random.default_rng(0))
    found = (train.vocab, data.length, len(row["target"]))
    room = (model.vocab, model.context, model.target_context)
    if any(need > has for need, has in zip(found, room, strict=True)):
        raise ValueError(
            f"data {data.name!r} needs (vocab, context, target_context) = {found}, the model has "
            f"{room}; raise those fields of config.model."
        )
    held = Head(test.source, data.eval_rows or len(test.source))
    tokenizer = ByteTokenizer()
    return Inputs(train.source, train.transform, held, test.transform, **sizes, tokenizer=tokenizer)


def _talk(config: Config, model: VLMConfig, sizes: dict[str, int]) -> Inputs:
    """Images with questions and answers; see `data.open_conversations`."""
    data, vision = config.data, model.vision
    how = {"images": model.images, "image_size": vision.image_size, "length": data.length}
    how |= {"data_dir": data.data_dir, "mock": data.mock, **data[FREE]}
    train, test = (open_conversations(data.name, split, **how) for split in SPLITS)
    row = test.transform(test.source[0], np.random.default_rng(0))
    found = (train.vocab, train.form.placeholder, row["image"].shape[-1])
    room = (model.decoder.vocab, model.image_id, vision.channels)
    if found[0] > room[0] or found[1:] != room[1:]:
        raise ValueError(
            f"data {data.name!r} has (vocab, image_id, channels) = {found}, the model {room}; set "
            "model.decoder.vocab, model.image_id and model.vision.channels."
        )
    held = Head(test.source, data.eval_rows or len(test.source))
    return Inputs(train.source, train.transform, held, test.transform, **sizes, tokenizer=BYTES)


@dataclass(frozen=True)
class Head:
    """The first rows of a source."""

    source: Source
    rows: int

    def __len__(self) -> int:
        return min(self.rows, len(self.source))

    def __getitem__(self, index: int) -> Any:
        return self.source[index]


def _bytes_per_token(source: Source, transform: Transform, tokenizer: Tokenizer) -> float:
    rng = np.random.default_rng(0)
    tokens, size = 0, 0
    for index in range(len(source)):
        row = transform(source[index], rng)
        counted = row["target"][row["weight"] > 0]
        tokens, size = tokens + len(counted), size + bytes_of(counted, tokenizer)
    return size / max(tokens, 1)


def _images(data: Config, model: ViTConfig, sizes: dict[str, int]) -> Inputs:
    size, channels, classes = model.image_size[0], model.channels, model.classes
    if data.name == "digits":
        _fit(data.name, (1, 10), (channels, classes))
        canvas = Canvas(size=size)
        train = DigitSource("train", canvas=canvas, shift=data.shift)
        test = DigitSource("test", canvas=canvas)
        return Inputs(train, train.place, test, test.place, passes=data.placements, **sizes)
    images = find_image_set(data.name)
    _fit(data.name, (images.channels, images.classes), (channels, classes))
    train, test = (
        open_source(data.name, split, data_dir=data.data_dir, mock=data.mock) for split in SPLITS
    )
    return Inputs(train, images.train_transform(size), test, images.eval_transform(size), **sizes)


def _fit(name: str, data: tuple[int, int], model: tuple[int, int]) -> None:
    if data != model:
        raise ValueError(
            f"data {name!r} has (channels, classes) = {data}, the model {model}; set "
            f"config.model.channels={data[0]} and config.model.classes={data[1]}."
        )
