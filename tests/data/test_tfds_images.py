"""The five image sets, on TFDS's mock data and on a tiny set that is really on disk."""

import io
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tokred.data.augment import Augmentation
from tokred.data.pipeline import eval_batches, train_batches
from tokred.data.tfds_images import IMAGE_SETS, find_image_set, open_source

tfds = pytest.importorskip("tensorflow_datasets")

SHAPES = {
    "mnist": (10, 28, 1),
    "fashion_mnist": (10, 28, 1),
    "cifar10": (10, 32, 3),
    "cifar100": (100, 32, 3),
    "imagenet2012": (1000, 224, 3),
}
STORED = 5  # examples in the set on disk


@pytest.fixture(scope="module", autouse=True)
def quiet():
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)


@pytest.fixture
def mock():
    with tfds.testing.mock_data(num_examples=20):
        yield


def draw_images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (STORED, 28, 28, 1), dtype=np.uint8)


def store(folder, file_format="array_record"):
    """Write MNIST as TFDS would: PNG in shards, described by dataset_info.json."""
    from tensorflow_datasets.core import example_serializer, naming, splits, writer

    builder = tfds.builder("mnist", data_dir=folder, file_format=file_format)
    builder.data_path.mkdir(parents=True)
    template = naming.ShardedFileTemplate(
        data_dir=builder.data_path,
        dataset_name="mnist",
        split="test",
        filetype_suffix=builder.info.file_format.file_suffix,
    )
    shards = writer.Writer(
        serializer=example_serializer.ExampleSerializer(
            builder.info.features.get_serialized_info()
        ),
        filename_template=template,
        hash_salt="test",
        disable_shuffling=True,
        example_writer=writer.ExampleWriter(file_format=builder.info.file_format),
    )
    for label, image in enumerate(draw_images()):
        png = io.BytesIO()
        Image.fromarray(image[..., 0]).save(png, "PNG")
        shards.write(label, {"image": png.getvalue(), "label": label})
    lengths, size = shards.finalize()
    split = splits.SplitInfo("test", lengths, size, template)
    builder.info.set_splits(splits.SplitDict([split]))
    builder.info.write_to_directory(builder.data_path)


def test_all_sets_are_listed():
    assert set(IMAGE_SETS) == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_views_of_mock_data(name, split, mock):
    classes, size, channels = SHAPES[name]
    images = find_image_set(name)
    assert (images.classes, images.size, images.channels) == SHAPES[name]
    source = open_source(name, split)
    assert len(source) == 20
    transform = images.train_transform() if split == "train" else images.eval_transform()
    for raw in source:
        view = transform(raw, np.random.default_rng(0))
        assert view["image"].shape == (size, size, channels)
        assert view["image"].dtype == np.float32
        assert view["label"].dtype == np.int32 and view["label"].shape == ()
        assert 0 <= view["label"] < classes


@pytest.mark.parametrize("name", SHAPES)
def test_batches_of_mock_data(name, mock):
    channels = SHAPES[name][-1]
    images = find_image_set(name)
    source = open_source(name, "train")
    batch = next(train_batches(source, images.train_transform(16), batch=4, seed=0))
    assert batch["image"].shape == (4, 16, 16, channels)
    labels = []
    for batch in eval_batches(source, images.eval_transform(16), batch=8, seed=0):
        assert batch["image"].shape == (8, 16, 16, channels)
        labels.extend(batch["label"][batch["valid"]])
    assert labels == [raw["label"] for raw in source]


@pytest.mark.parametrize("name", SHAPES)
def test_normalisation_inverts_to_the_pixels(name):
    images = find_image_set(name)
    shape = (images.size, images.size, images.channels)
    if images.crop_ratio < 1:
        pixels = np.broadcast_to(np.arange(images.channels, dtype=np.uint8) * 100, (300, 400, 3))
    else:
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    view = images.eval_transform()({"image": pixels, "label": 1}, np.random.default_rng(0))
    restored = 255 * (view["image"] * np.array(images.std) + np.array(images.mean))
    expected = np.broadcast_to(pixels[0, 0], shape) if images.crop_ratio < 1 else pixels
    np.testing.assert_allclose(restored, expected, atol=1e-3)


def test_training_views_are_random_and_follow_the_generator():
    raw = {"image": draw_images()[0], "label": 3}
    transform = find_image_set("mnist").train_transform()
    views = [transform(raw, np.random.default_rng(seed))["image"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(views[0], views[1])
    assert (views[0] != views[2]).any()


def test_augmentation_and_size_can_be_chosen():
    raw = {"image": draw_images()[0], "label": 3}
    images = find_image_set("mnist")
    plain = images.train_transform(20, Augmentation("centre", flip=0.0))
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(
        plain(raw, rng)["image"], images.eval_transform(20)(raw, rng)["image"]
    )


@pytest.mark.parametrize(
    "given, nearest",
    [("cifar11", "cifar10"), ("imagenet", "imagenet2012"), ("fashionmnist", "fashion_mnist")],
)
def test_unknown_names_get_the_nearest(given, nearest):
    for call in (find_image_set, lambda name: open_source(name, "train")):
        with pytest.raises(ValueError, match=f"got '{given}': did you mean '{nearest}'\\?$"):
            call(given)


@pytest.mark.parametrize("split", ["validation", "tset", "train+test", "", "train[:5%"])
def test_unknown_splits(split):
    with pytest.raises(ValueError, match=r"^split must be 'train' or 'test'.*: change split\.$"):
        open_source("mnist", split)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match=r"^size must be at least 1 pixel, got 0: "):
        find_image_set("mnist").eval_transform(0)


def test_the_labelled_split_of_imagenet_is_the_test_split(mock):
    assert "split='validation[:5]'" in repr(open_source("imagenet2012", "test[:5]"))


def test_reads_what_is_on_disk(tmp_path):
    store(tmp_path)
    source = open_source("mnist", "test", data_dir=tmp_path)
    np.testing.assert_array_equal([raw["image"] for raw in source], draw_images())
    assert [raw["label"] for raw in source] == list(range(STORED))
    assert len(open_source("mnist", "test[:2]", data_dir=tmp_path)) == 2


def test_another_format_on_disk_is_told_apart(tmp_path):
    store(tmp_path)
    [info] = tmp_path.rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(FileNotFoundError, match=r"in another format .*data_dir='ANOTHER_FOLDER'"):
        open_source("mnist", "test", data_dir=tmp_path)


@pytest.mark.parametrize("name", SHAPES)
def test_unprepared_sets_fail_fast_and_say_what_to_run(name, tmp_path):
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as caught:
        open_source(name, "train", data_dir=tmp_path)
    assert time.perf_counter() - start < 60  # a download that is tried takes minutes
    message = str(caught.value)
    assert message.startswith(f"{name} is not prepared in {tmp_path}: ") and "\n" not in message
    assert 'pip install "tokred[tf]"' in message
    command = f"tfds.builder('{name}', file_format='array_record', data_dir='{tmp_path}')"
    assert f"{command}.download_and_prepare()" in message
    assert ("ILSVRC2012_img_val.tar" in message) == (name == "imagenet2012")
    assert not list(tmp_path.iterdir())


FRESH = """
import sys
from tokred.data import augment, pipeline, tfds_images
assert not {'tensorflow', 'tensorflow_datasets', 'grain'} & set(sys.modules)
try:
    tfds_images.open_source('cifar10', 'train', data_dir=sys.argv[1])
except FileNotFoundError as error:
    print(error)
assert 'tensorflow' not in sys.modules
"""


def test_a_fresh_process_imports_lazily_and_fails_fast(tmp_path):
    start = time.perf_counter()
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("cifar10 is not prepared in ")
    assert time.perf_counter() - start < 60  # a download that is tried takes minutes
