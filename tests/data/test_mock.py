"""Made-up images: shaped like the set, fixed by split and index, and free of TFDS."""

import sys

import numpy as np
import pytest

from tokred.data.pipeline import Source, eval_batches, train_batches
from tokred.data.tfds_images import IMAGE_SETS, MockImages, find_image_set, open_source

STORED = {"mnist": 28, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32, "imagenet2012": 256}


@pytest.fixture(autouse=True)
def without_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_examples_look_like_those_of_the_set(name):
    images, side = find_image_set(name), STORED[name]
    source = open_source(name, "train", mock=12)
    assert isinstance(source, Source) and len(source) == 12
    for index in range(12):
        raw = source[index]
        assert raw["image"].shape == (side, side, images.channels)
        assert raw["image"].dtype == np.uint8 and raw["label"].dtype == np.int64
        assert 0 <= raw["label"] < images.classes
    view = images.eval_transform()(source[0], np.random.default_rng(0))["image"]
    assert view.shape == (images.size, images.size, images.channels)


def test_split_and_index_fix_an_example():
    first, again = (open_source("cifar10", "train", mock=5)[3] for _ in range(2))
    np.testing.assert_array_equal(first["image"], again["image"])
    assert first["label"] == again["label"]
    for other in (
        open_source("cifar10", "train", mock=5)[2],
        open_source("cifar10", "test", mock=5)[3],
    ):
        assert (first["image"] != other["image"]).any()


def test_labels_cover_the_classes():
    source = open_source("mnist", "test", mock=200)
    assert {int(source[i]["label"]) for i in range(200)} == set(range(10))


def test_batches():
    pytest.importorskip("grain")
    images, source = find_image_set("imagenet2012"), open_source("imagenet2012", "train", mock=6)
    batch = next(train_batches(source, images.train_transform(32), batch=4, seed=0))
    assert batch["image"].shape == (4, 32, 32, 3)
    labels = [source[int(i)]["label"] for i in batch["id"]]
    np.testing.assert_array_equal(batch["label"], labels)
    assert len(list(eval_batches(source, images.eval_transform(32), batch=4, seed=0))) == 2


@pytest.mark.parametrize("index", [-1, 3])
def test_there_are_no_other_examples(index):
    with pytest.raises(IndexError, match=rf"^index must be in 0\.\.2, got {index}: "):
        MockImages(find_image_set("mnist"), 3)[index]


@pytest.mark.parametrize(
    "split, mock, sentence",
    [
        ("train", -1, r"^mock must be at least 1 example, got -1: change mock\.$"),
        ("train[:5]", 10, r"^split must be one of .* with mock data, got 'train\[:5\]': "),
    ],
)
def test_errors_name_the_argument_in_one_sentence(split, mock, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_source("mnist", split, mock=mock)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'cifar10'\?$"):
        open_source("cifar11", "train", mock=4)
