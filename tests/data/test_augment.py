"""Augmentations keep shape, dtype and range, follow their Generator, and do nothing at zero."""

import numpy as np
import pytest
from PIL import Image

from tokred.data import augment as aug

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (40, 30, 1), dtype=np.uint8)
IMAGES = {"colour": COLOUR, "grey": GREY}
KNOWS_NO_STRENGTH = {"auto_contrast", "equalize"}
SAME_SIZE = {
    "flip": aug.random_flip,
    "pad_and_crop": aug.pad_and_crop,
    "rand_augment": aug.rand_augment,
}


def rng(seed=0):
    return np.random.default_rng(seed)


def ramp(height, width):
    """An image whose pixels name their row and column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, rows * 0 + 1], -1).astype(np.uint8)


@pytest.fixture(params=IMAGES)
def image(request):
    picture = IMAGES[request.param].copy()
    before = picture.copy()
    yield picture
    np.testing.assert_array_equal(picture, before)


@pytest.mark.parametrize("name", SAME_SIZE)
def test_keeps_shape_dtype_and_follows_the_generator(name, image):
    outputs = [SAME_SIZE[name](image, rng(seed)) for seed in range(20)]
    assert {(x.shape, x.dtype) for x in outputs} == {(image.shape, image.dtype)}
    np.testing.assert_array_equal(outputs[3], SAME_SIZE[name](image, rng(3)))
    assert len({x.tobytes() for x in outputs}) > 1


@pytest.mark.parametrize("probability, mirrored", [(0.0, False), (1.0, True)])
def test_flip_mirrors_left_and_right(probability, mirrored, image):
    flipped = aug.random_flip(image, rng(), probability=probability)
    np.testing.assert_array_equal(flipped, np.flip(image, 1) if mirrored else image)


def test_flip_happens_with_its_probability():
    flipped = [aug.random_flip(COLOUR, rng(s), probability=0.3) is not COLOUR for s in range(2000)]
    assert abs(np.mean(flipped) - 0.3) < 0.04


def test_pad_and_crop_shifts_and_fills_with_zeros():
    image = ramp(12, 12)
    image[..., 2] = 1
    shifts = set()
    for seed in range(400):
        moved = aug.pad_and_crop(image, rng(seed), 2)
        inside = moved[..., 2] == 1
        y, x = np.argwhere(inside)[0]
        source = moved[y, x, :2].astype(int)
        shifts.add((source[0] - y, source[1] - x))
        assert not moved[~inside].any()
    assert shifts == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}


def test_zero_padding_is_the_identity(image):
    np.testing.assert_array_equal(aug.pad_and_crop(image, rng(), 0), image)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_random_resized_crop(kind, image):
    image = image.astype(kind)
    outputs = [aug.random_resized_crop(image, rng(seed), 16) for seed in range(10)]
    assert {(x.shape, x.dtype) for x in outputs} == {((16, 16, image.shape[-1]), np.dtype(kind))}
    np.testing.assert_array_equal(outputs[3], aug.random_resized_crop(image, rng(3), 16))
    assert len({x.tobytes() for x in outputs}) == 10


def test_random_boxes_obey_scale_and_ratio():
    boxes = [aug._random_box(rng(s), (200, 200), (0.1, 0.5), (0.5, 2.0)) for s in range(300)]
    top, left, height, width = np.array([box for box in boxes if box]).T
    share, aspect = height * width / 200**2, width / height
    assert (share > 0.09).all() and (share < 0.51).all() and share.std() > 0.08
    assert (aspect > 0.48).all() and (aspect < 2.1).all()
    assert abs(np.log(aspect).mean()) < 0.1
    assert (np.minimum(top, left) >= 0).all()
    assert (top + height <= 200).all() and (left + width <= 200).all()


def test_whole_image_is_the_box_of_scale_one():
    image = COLOUR[:30]
    cropped = aug.random_resized_crop(image, rng(), 30, scale=(1, 1), ratio=(1, 1))
    np.testing.assert_array_equal(cropped, image)


def test_box_that_never_fits_falls_back_to_the_centre():
    strip = np.zeros((10, 200, 3), np.uint8)
    assert aug._random_box(rng(), strip.shape, (1, 1), (1, 1)) is None
    assert aug._central_box(strip.shape, (3 / 4, 4 / 3)) == (0, 93, 10, 13)
    assert aug._central_box((200, 10), (3 / 4, 4 / 3)) == (93, 0, 13, 10)
    assert aug.random_resized_crop(strip, rng(), 8, scale=(1, 1)).shape == (8, 8, 3)


def test_evaluation_view_is_256_for_224():
    image = rng().integers(0, 256, (300, 400, 3), dtype=np.uint8)
    picture = Image.fromarray(image).resize((341, 256), Image.Resampling.BICUBIC)
    expected = np.asarray(picture)[16:240, 58:282]
    np.testing.assert_array_equal(aug.resize_and_centre_crop(image, 224), expected)


def test_evaluation_view_of_a_fitting_image_is_the_image(image):
    square = image[:30]
    np.testing.assert_array_equal(aug.resize_and_centre_crop(square, 30, ratio=1.0), square)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (33, 257), (500, 333)])
@pytest.mark.parametrize("ratio", [1.0, 0.875, 0.9])
def test_evaluation_view_has_its_size_for_any_image(shape, ratio):
    image = np.zeros((*shape, 3), np.uint8)
    assert aug.resize_and_centre_crop(image, 32, ratio=ratio).shape == (32, 32, 3)


def test_float_and_uint8_resize_agree():
    exact = aug.resize(COLOUR, 13, 17)
    close = aug.resize(COLOUR.astype(np.float64), 13, 17)
    assert close.dtype == np.float32
    assert np.abs(close.clip(0, 255) - exact).max() <= 1


@pytest.mark.parametrize("name", aug.OPERATIONS)
def test_operations_keep_shape_and_do_nothing_at_zero(name, image):
    for strength in (-1.0, -0.4, 0.7, 1.0):
        distorted = aug.distort(image, name, strength)
        assert distorted.shape == image.shape and distorted.dtype == np.uint8
    if name not in KNOWS_NO_STRENGTH:
        np.testing.assert_array_equal(aug.distort(image, name, 0.0), image)


@pytest.mark.parametrize("name", sorted(set(aug.OPERATIONS) - KNOWS_NO_STRENGTH - {"identity"}))
def test_operations_grow_with_strength(name):
    smooth = aug.resize(rng().integers(0, 256, (4, 4, 3), dtype=np.uint8), 32, 32)
    change = [
        np.abs(aug.distort(smooth, name, s).astype(int) - smooth).mean() for s in (0.2, 0.5, 1.0)
    ]
    assert 0 < change[0] < change[1] < change[2]


def test_the_common_operations_are_there():
    assert len(aug.OPERATIONS) == 14


def test_solarize_fully_inverts(image):
    np.testing.assert_array_equal(aug.distort(image, "solarize", 1.0), 255 - image)


def test_translate_moves_by_whole_pixels_and_fills_with_grey():
    moved = aug.distort(ramp(20, 20), "translate_x", 1.0)
    np.testing.assert_array_equal(moved[:, :11], ramp(20, 20)[:, 9:])
    assert (moved[:, 11:] == aug.GREY).all()


@pytest.mark.parametrize("options", [{"magnitude": 0}, {"operations": 0}])
def test_rand_augment_switched_off_is_the_identity(options, image):
    assert aug.rand_augment(image, rng(), **options) is image


def test_rand_augment_uses_every_operation(monkeypatch):
    used = set()
    monkeypatch.setattr(aug, "distort", lambda image, name, strength: used.add(name) or image)
    for seed in range(100):
        aug.rand_augment(COLOUR, rng(seed))
    assert used == set(aug.OPERATIONS)


def test_rand_augment_applies_an_operation_with_its_chance(monkeypatch):
    used = []
    monkeypatch.setattr(aug, "distort", lambda image, name, strength: used.append(name) or image)
    for seed in range(1000):
        aug.rand_augment(COLOUR, rng(seed), chance=0.3)
    assert abs(len(used) / 2000 - 0.3) < 0.04
    assert aug.rand_augment(COLOUR, rng(), chance=0.0) is COLOUR


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_rand_augment_spreads_its_magnitude(spread, monkeypatch):
    used = []
    monkeypatch.setattr(aug, "distort", lambda image, name, s: used.append(abs(s)) or image)
    for seed in range(1000):
        aug.rand_augment(COLOUR, rng(seed), magnitude=9.0, spread=spread)
    assert max(used) <= 1 and abs(np.mean(used) - 0.9) < 0.01
    assert abs(np.std(used) - spread / aug.MAX_MAGNITUDE) < 0.005


def test_erase_fills_one_box_with_noise():
    image = np.full((40, 40, 3), 9, np.float32)
    for seed in range(50):
        erased = aug.random_erase(image, rng(seed), probability=1.0)
        assert erased.shape == image.shape and erased.dtype == np.float32
        rows, columns = np.nonzero((erased != 9).any(-1))
        box = erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box != 9).all() and box.shape[0] * box.shape[1] == len(rows)
        assert 0.01 < len(rows) / 1600 < 0.36
    assert (image == 9).all()
    assert aug.random_erase(image, rng(), probability=0.0) is image


def test_normalise():
    image = np.array([[[0, 255]]], np.uint8)
    expected = [[[-0.5 / 0.25, 0.8 / 0.1]]]
    for given in (image, (image / 255), (image / 255).astype(np.float32)):
        out = aug.normalise(given, (0.5, 0.2), (0.25, 0.1))
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("crop", ["padded", "resized", "centre"])
@pytest.mark.parametrize("size", [16, 48])
def test_augment_gives_a_normalised_square(crop, size, image):
    how = aug.Augmentation(crop, operations=2, erase=1.0)
    channels = image.shape[-1]
    stats = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    first, again = (aug.augment(image, rng(1), size=size, how=how, **stats) for _ in range(2))
    assert first.shape == (size, size, channels) and first.dtype == np.float32
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)


def test_augmentation_without_randomness_is_the_evaluation_view(image):
    channels = image.shape[-1]
    target = {"size": 20, "mean": (0.4,) * channels, "std": (0.3,) * channels}
    out = aug.augment(image, rng(), **target, how=aug.Augmentation("centre", flip=0.0))
    np.testing.assert_array_equal(out, aug.view(image, **target, ratio=1.0))


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: aug.Augmentation(crop="tight"), "crop"),  # pyright: ignore[reportArgumentType]
        (lambda: aug.Augmentation(pad=-1), "pad"),
        (lambda: aug.Augmentation(flip=1.5), "flip"),
        (lambda: aug.Augmentation(erase=-0.1), "erase"),
        (lambda: aug.Augmentation(scale=(0.5, 0.1)), "scale"),
        (lambda: aug.Augmentation(magnitude=11), "magnitude"),
        (lambda: aug.Augmentation(operations=-1), "operations"),
        (lambda: aug.Augmentation(chance=1.1), "chance"),
        (lambda: aug.Augmentation(spread=-0.5), "spread"),
        (lambda: aug.pad_and_crop(COLOUR, rng(), -1), "pad"),
        (lambda: aug.random_flip(COLOUR, rng(), probability=2), "probability"),
        (lambda: aug.rand_augment(COLOUR, rng(), magnitude=-1), "magnitude"),
        (lambda: aug.distort(COLOUR, "blur", 1.0), "name"),
        (lambda: aug.resize_and_centre_crop(COLOUR, 8, ratio=0.0), "ratio"),
        (lambda: aug.resize(COLOUR, 0, 8), "height and width"),
        (lambda: aug.normalise(COLOUR, (0.5,), (0.5,)), "mean and std"),
        (lambda: aug.random_resized_crop(COLOUR, rng(), 8, ratio=(0, 1)), "ratio"),
    ],
)
def test_errors_name_the_field_in_one_sentence(call, named):
    with pytest.raises(ValueError, match=f"^{named} must [^\n]*: change {named}\\.$"):
        call()


@pytest.mark.parametrize("image", [COLOUR[..., :2], COLOUR.astype(np.float32), COLOUR[..., 0]])
def test_operations_ask_for_pictures(image, unchecked):
    with pytest.raises(TypeError, match=r"^image must be uint8"):
        aug.rand_augment(image, rng())
