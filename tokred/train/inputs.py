"""The data that a config asks for: batches to train on, and fixed passes to evaluate on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from tokred.data.digits import Canvas, DigitSource
from tokred.data.pipeline import Batches, Source, Transform, eval_batches, train_batches
from tokred.data.tfds_images import find_image_set, open_source
from tokred.models.vit import ViTConfig
from tokred.train.config import Config
from tokred.train.mesh import round_up, shard_of

SPLITS = ("train", "test")
EVAL_SEED = 1000  # the same placements for every model and every method


@dataclass(frozen=True)
class Inputs:
    """Sources with their transforms.

    passes: over the test split, each with its own draws, which never change.
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


def make_inputs(config: Config, model: ViTConfig, mesh: Mesh) -> Inputs:
    """The inputs of config.data, sized for the model and cut for this process.

    The evaluation batch is rounded up to what divides over the mesh; surplus rows do not count.

    Raises:
      ValueError: an unknown set, or one whose channels or classes do not fit the model.
      FileNotFoundError: a set that is not prepared on this machine.
    """
    data, (shard, count) = config.data, shard_of(mesh)
    size, channels, classes = model.image_size[0], model.channels, model.classes
    sizes = {"batch": data.batch, "eval_batch": round_up(mesh, data.eval_batch)}
    sizes |= {"threads": data.threads, "shard": shard, "count": count}
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
