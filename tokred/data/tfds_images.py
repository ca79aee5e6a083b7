"""Image sets by name, read through TFDS as random-access array_record: no TensorFlow, no download.

For example:

    images = find_image_set('cifar10')
    source = open_source('cifar10', 'train', data_dir=...)
    train_batches(source, images.train_transform(), batch=128, seed=0)

`open_source(..., mock=1000)` makes 1000 examples up instead: noise, for tests and for speed.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from tokred.data.augment import Augmentation, augment, view
from tokred.data.prepared import how_to_prepare

Example = dict[str, Any]

SPLITS = ("train", "test")
SPLIT = re.compile(r"(train|test)(\[[^\[\]]*\])?")


@dataclass(frozen=True)
class ImageSet:
    """One image set; all of it static.

    size: side of the square model input in pixels. mean, std: per channel of pixels in [0, 1].
    augmentation: of the training split by default. test: TFDS's name of the split to evaluate on.
    crop_ratio: of the evaluation view. manual: what must be downloaded by hand, if anything.
    """

    name: str
    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    test: str = "test"
    crop_ratio: float = 1.0
    manual: tuple[str, ...] = ()

    def train_transform(
        self, size: int | None = None, augmentation: Augmentation | None = None
    ) -> "Transform":
        """Augmented training views; size and augmentation default to the set's own."""
        size = self.size if size is None else size
        return Transform(self, size, self.augmentation if augmentation is None else augmentation)

    def eval_transform(self, size: int | None = None) -> "Transform":
        """The view for evaluation, without randomness; size defaults to the set's own."""
        return Transform(self, self.size if size is None else size)


@dataclass(frozen=True)
class Transform:
    """Raw TFDS example to 'image' float32 [size, size, C], normalised, and 'label' int32 [].

    augmentation None is the view for evaluation, which draws nothing.
    """

    images: ImageSet
    size: int
    augmentation: Augmentation | None = None

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}: change size.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Pure; all randomness is rng's."""
        target = {"size": self.size, "mean": self.images.mean, "std": self.images.std}
        if self.augmentation is None:
            image = view(example["image"], **target, ratio=self.images.crop_ratio)
        else:
            image = augment(example["image"], rng, **target, how=self.augmentation)
        return {"image": image, "label": np.int32(example["label"])}


_SETS = (
    ImageSet("mnist", 10, 1, 28, (0.1307,), (0.3081,), Augmentation(pad=2, flip=0.0)),
    ImageSet("fashion_mnist", 10, 1, 28, (0.2860,), (0.3530,), Augmentation(pad=2)),
    ImageSet(
        "cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), Augmentation()
    ),
    ImageSet(
        "cifar100", 100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), Augmentation()
    ),
    ImageSet(
        "imagenet2012",
        1000,
        3,
        224,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        Augmentation("resized", operations=2, chance=0.5, spread=0.5, erase=0.25),
        test="validation",
        crop_ratio=0.875,
        manual=("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
    ),
)
IMAGE_SETS = {images.name: images for images in _SETS}


def find_image_set(name: str) -> ImageSet:
    """The image set of that name; ValueError with the nearest name otherwise."""
    if name not in IMAGE_SETS:
        nearest = difflib.get_close_matches(name, IMAGE_SETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"name must be one of {sorted(IMAGE_SETS)}, got {name!r}: did you mean {nearest!r}?"
        )
    return IMAGE_SETS[name]


@dataclass(frozen=True)
class MockImages:
    """`count` made-up examples of a set: uniform noise and labels, fixed by split and index.

    Images have the size from which the evaluation view is cut without loss. Needs no TFDS.
    Raises ValueError for no examples, or for a split that is not 'train' or 'test'.
    """

    images: ImageSet
    count: int
    split: str = "train"

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"mock must be at least 1 example, got {self.count}: change mock.")
        if self.split not in SPLITS:
            raise ValueError(
                f"split must be one of {SPLITS} with mock data, got {self.split!r}: change split."
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        """'image' uint8 [H, W, C] and 'label' int64 []; IndexError outside 0..count - 1."""
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in 0..{self.count - 1}, got {index}: change index.")
        rng = np.random.default_rng((SPLITS.index(self.split), index))
        side = int(self.images.size / self.images.crop_ratio)
        label = rng.integers(self.images.classes)
        image = rng.integers(0, 256, (side, side, self.images.channels), dtype=np.uint8)
        return {"image": image, "label": label}


def open_source(
    name: str, split: str, *, data_dir: str | PathLike | None = None, mock: int = 0
) -> Sequence[Example] | MockImages:
    """Random access to the raw examples: 'image' uint8 [H, W, C], 'label' int64 [], and more.

    split: 'train' or 'test' (the split to evaluate on, whatever TFDS calls it), also with a slice
    such as 'train[:90%]'. data_dir: where TFDS keeps its sets, its own default if None. mock: so
    many made-up examples instead, 0 for the real ones; see MockImages.
    Raises ValueError for an unknown name or split, FileNotFoundError for a set that was not
    prepared on this machine.
    """
    images = find_image_set(name)
    if mock:
        return MockImages(images, mock, split)
    import tensorflow_datasets as tfds

    matched = SPLIT.fullmatch(split)
    if matched is None:
        raise ValueError(
            "split must be 'train' or 'test', also with a slice such as 'train[:90%]', "
            f"got {split!r}: change split."
        )
    stored = images.test if matched[1] == "test" else "train"
    builder = tfds.builder(images.name, data_dir=data_dir)
    return _open_prepared(builder, stored + (matched[2] or ""), images)


def _open_prepared(builder: Any, split: str, images: ImageSet) -> Sequence[Example]:
    """The builder itself says whether the set is prepared; as_data_source never downloads."""
    try:
        return builder.as_data_source(split=split)
    except (KeyError, NotImplementedError):
        raise FileNotFoundError(_how_to_prepare(builder, images)) from None


def _how_to_prepare(builder: Any, images: ImageSet) -> str:
    return how_to_prepare(
        images.name,
        str(builder.data_path.parent.parent),
        in_other_format=bool(builder.info.splits),
        manual=images.manual,
    )
