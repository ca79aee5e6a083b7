"""Placed digits: what is drawn, from what, where it lies, and what it depends on."""

import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from tokred.data.digits import (
    DIGIT,
    MEAN,
    STD,
    Canvas,
    DigitSource,
    box_of_ink,
    draw_batch,
    draw_clutter,
    load_digits_split,
    place_digit,
    shift_ink,
)

pytest.importorskip("sklearn")
TRAIN, TEST = DigitSource("train", shift=1), DigitSource("test")
CANVASES = [
    Canvas(),
    Canvas(stride=2, piece=2, pieces=20),
    Canvas(size=8, pieces=0),
    Canvas(size=32, patch=4, stride=4, piece=8),
]


def rng(seed=0):
    return np.random.default_rng(seed)


def same(first, second):
    return all(np.array_equal(first[name], second[name]) for name in first)


def ink(image):
    """The image without its standardisation and channel."""
    return image[..., 0] * STD + MEAN


def tracer_pool(size):
    """A pool whose digit i has the constant ink i + 1: clutter tells where it comes from."""
    return np.broadcast_to(np.arange(1, size + 1, dtype=np.float32)[:, None, None], (size, 8, 8))


def locate(image, digit):
    """The corners (top, left) at which the digit's box stands in the ink of a canvas."""
    views = np.lib.stride_tricks.sliding_window_view(image, (DIGIT, DIGIT))
    return np.argwhere(np.abs(views - digit).max((2, 3)) < 1e-5)


def test_shapes_and_dtypes():
    batch = draw_batch(TRAIN, range(5), seed=0)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "image": ((5, 16, 16, 1), np.float32),
        "label": ((5,), np.int32),
        "mask": ((5, 16, 16), np.bool_),
    }


def test_split_is_disjoint_complete_and_stratified():
    (train, train_labels), (test, test_labels) = map(load_digits_split, ("train", "test"))
    instances = {digit.tobytes() for digit in train}, {digit.tobytes() for digit in test}
    assert not instances[0] & instances[1]
    assert (len(train), len(test)) == (len(TRAIN), len(TEST)) == (1438, 359)
    assert np.abs(np.bincount(test_labels) / np.bincount(train_labels) - 0.25).max() < 0.02


def test_split_is_read_only_and_unit_scaled():
    images, labels = load_digits_split("train")
    assert not images.flags.writeable and not labels.flags.writeable
    assert (images.min(), images.max()) == (0, 1)


def test_default_canvas_is_standardised_and_has_64_patches():
    image = draw_batch(TRAIN, range(0, len(TRAIN), 4), seed=0)["image"]
    assert abs(image.mean()) < 0.02 and abs(image.std() - 1) < 0.02
    assert (image.shape[1] // Canvas().patch) ** 2 == 64


@pytest.mark.parametrize("canvas", CANVASES)
def test_a_seed_fixes_the_draw_and_another_changes_it(canvas):
    source = DigitSource("train", canvas, shift=1)
    draw = [[source.place(source[i], rng(seed)) for i in range(8)] for seed in (0, 0, 1)]
    assert all(map(same, draw[0], draw[1]))
    assert not all(map(same, draw[0], draw[2]))


def test_batches_depend_on_seed_epoch_and_index_alone():
    whole = draw_batch(TRAIN, [3, 7, 5], seed=1, epoch=2)
    alone = draw_batch(TRAIN, [5], seed=1, epoch=2)
    assert all(np.array_equal(whole[name][2], alone[name][0]) for name in whole)
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not same(whole, draw_batch(TRAIN, [3, 7, 5], **other))


def test_placing_leaves_example_and_pool_alone():
    example, before = TRAIN[4], TRAIN[4]["digit"].copy()
    placed = TRAIN.place(example, rng())
    assert np.array_equal(example["digit"], before)
    assert not np.shares_memory(placed["image"], example["digit"])


@pytest.mark.parametrize("canvas", CANVASES)
def test_mask_is_the_box_of_the_ink_at_an_aligned_place(canvas):
    source = DigitSource("test", canvas)
    for index in range(40):
        example = source[index]
        placed = source.place(example, rng(index))
        corners = locate(ink(placed["image"]), example["digit"])
        masks = [np.zeros_like(placed["mask"]) for _ in corners]
        for mask, (top, left) in zip(masks, corners, strict=True):
            mask[top : top + DIGIT, left : left + DIGIT] = box_of_ink(example["digit"])
        found = [np.array_equal(mask, placed["mask"]) for mask in masks]
        assert found.count(True) == 1
        top, left = corners[found.index(True)]
        assert top % canvas.stride == left % canvas.stride == 0
        assert top % canvas.patch == left % canvas.patch == 0


def test_every_place_is_used():
    mask = draw_batch(TEST, range(200), seed=0)["mask"]
    quadrants = mask.reshape(200, 2, 8, 2, 8).any((2, 4)).reshape(200, 4)
    assert (quadrants.sum(1) == 1).all()
    assert quadrants.sum(0).min() > 30


@pytest.mark.parametrize("canvas", CANVASES)
def test_clutter_is_aligned_and_never_in_the_box_of_the_digit(canvas):
    pool, digit = tracer_pool(9), np.full((DIGIT, DIGIT), 0.5, np.float32)
    example = {"digit": digit, "label": np.int32(0), "index": 4}
    side = canvas.size // canvas.patch
    for seed in range(20):
        placed = place_digit(example, rng(seed), pool=pool, canvas=canvas)
        image = ink(placed["image"]).round(3)
        assert (image[placed["mask"]] == np.float32(0.5)).all()
        patches = image.reshape(side, canvas.patch, side, canvas.patch).swapaxes(1, 2)
        assert (np.ptp(patches, axis=(2, 3)) == 0).all()


def test_clutter_comes_from_the_other_digits_of_the_pool():
    pool = tracer_pool(5)
    drawn = {x for seed in range(50) for x in draw_clutter(rng(seed), 2, pool, Canvas()).flat}
    assert drawn == {0, 1, 2, 4, 5}


@pytest.mark.parametrize("source", [TRAIN, TEST], ids=lambda source: source.split)
def test_clutter_comes_from_the_same_split(source):
    pool, _ = load_digits_split(source.split)
    example = source[0]
    placed = source.place(example, rng(3))
    wanted = place_digit(example, rng(3), pool=pool, canvas=source.canvas, shift=source.shift)
    assert same(placed, wanted)


def test_no_pieces_is_an_empty_background():
    source = DigitSource("test", Canvas(pieces=0))
    placed = source.place(source[0], rng())
    assert np.abs(ink(placed["image"])[~placed["mask"]]).max() < 1e-6


@pytest.mark.parametrize("down, right", [(0, 0), (1, -1), (-2, 3), (7, -7)])
def test_shift_moves_ink_and_fills_with_nothing(down, right):
    digit = rng().random((DIGIT, DIGIT), np.float32)
    wide = np.pad(digit, DIGIT)
    rows, columns = DIGIT - down, DIGIT - right
    wanted = wide[rows : rows + DIGIT, columns : columns + DIGIT]
    assert np.array_equal(shift_ink(digit, down, right), wanted)


def test_shift_is_at_most_what_was_asked_for():
    example, canvas = TEST[0], Canvas(size=DIGIT, pieces=0)
    moved = {
        DigitSource("test", canvas, shift=1).place(example, rng(seed))["image"].tobytes()
        for seed in range(200)
    }
    assert len(moved) == 9


def test_box_of_ink():
    digit = np.zeros((DIGIT, DIGIT), np.float32)
    assert not box_of_ink(digit).any()
    digit[2, 5] = digit[4, 3] = 0.1
    wanted = np.zeros((DIGIT, DIGIT), bool)
    wanted[2:5, 3:6] = True
    assert np.array_equal(box_of_ink(digit), wanted)


def test_repr_is_stable_and_names_all_that_matters():
    assert repr(DigitSource("train", shift=1)) == repr(TRAIN)
    others = [TRAIN, TEST, DigitSource("train"), DigitSource("train", Canvas(pieces=1), shift=1)]
    assert all(repr(first) != repr(second) for first, second in pairwise(others))


def test_grain_pipelines():
    pytest.importorskip("grain")
    from tokred.data.pipeline import eval_batches, train_batches

    first, again = (next(train_batches(TRAIN, TRAIN.place, batch=8, seed=s)) for s in (0, 0))
    assert same(first, again)
    batch = next(iter(eval_batches(TEST, TEST.place, batch=8, seed=3)))
    assert same(draw_batch(TEST, range(8), seed=3), batch)


def test_import_needs_neither_grain_nor_sklearn():
    code = "import sys, tokred.data.digits; print({'grain', 'sklearn'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Canvas(size=6), "Canvas.size must be at least the 8 pixels of a digit, got 6"),
        (lambda: Canvas(size=18, patch=4), "Canvas.size must be a multiple of patch=4, got 18"),
        (lambda: Canvas(patch=3), "Canvas.patch must be a divisor of the digit side 8, got 3"),
        (lambda: Canvas(patch=0), "Canvas.patch must be at least 1, got 0"),
        (lambda: Canvas(stride=3), "Canvas.stride must be a multiple of patch=2, got 3"),
        (lambda: Canvas(stride=6), "Canvas.stride must be a divisor of size - 8 = 8, got 6"),
        (lambda: Canvas(piece=3), "Canvas.piece must be a multiple of patch=2, got 3"),
        (lambda: Canvas(piece=10), "Canvas.piece must be at most the 8 pixels of a digit, got 10"),
        (lambda: Canvas(pieces=-1), "Canvas.pieces must be at least 0, got -1"),
        (lambda: DigitSource("valid"), "split must be one of ('train', 'test'), got 'valid'"),
        (lambda: load_digits_split("all"), "split must be one of ('train', 'test'), got 'all'"),
        (lambda: DigitSource(shift=8), "shift must be in 0..7, got 8"),
    ],
)
def test_errors_are_one_sentence_that_names_the_field(make, sentence):
    field = sentence.split()[0]
    with pytest.raises(ValueError, match=f"^{re.escape(f'{sentence}: change {field}.')}$"):
        make()


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    load_digits_split.cache_clear()
    with pytest.raises(ImportError, match=r"pip install scikit-learn\.$"):
        load_digits_split("train")
