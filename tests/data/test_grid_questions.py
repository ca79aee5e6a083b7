"""Answers and evidence recomputed from the cells; splits, balance and the two region functions."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from tokred.data.digits import DIGIT, MEAN, STD, load_digits_split
from tokred.data.grid_kinds import KINDS, cell_name
from tokred.data.grid_questions import GridQuestions, accuracy_by_region, evidence_patches
from tokred.data.pipeline import eval_batches, train_batches

PLACE = 259


def draw(task, count=1, seed=0):
    rng = np.random.default_rng(seed)
    return [task.ask(task[i % len(task)], rng) for i in range(count)]


def read(task, example):
    """The row with # for an image, and the answer."""
    ids = np.where(example["input"] == PLACE, 3 + ord("#"), example["input"])
    counted = example["target"][example["weight"] > 0]
    assert counted[-1] == 1
    row, answer = (task.tokenizer.decode(x) for x in (ids, counted))
    assert row.endswith(answer)
    return row[: len(row) - len(answer)], answer


def solve(prompt, cells):
    """The answer to a question about one canvas, and the cells that it needs."""
    kind, *words = prompt.rstrip("?").split(" ")
    names = {cell_name(i, cells.shape[1]): i for i in range(cells.size)}
    spell = lambda digits: "".join("-" if d < 0 else str(d) for d in digits)  # noqa: E731
    flat, every = cells.ravel(), set(range(cells.size))
    if kind == "which":
        digit = flat[names[words[0]]]
        return "none" if digit < 0 else str(digit), {names[words[0]]}
    if kind == "where":
        [place] = np.flatnonzero(flat == int(words[0]))
        return next(name for name, i in names.items() if i == place), {int(place)}
    if kind == "count":
        return str((flat == int(words[0])).sum()), every
    if kind == "row":
        row = int(words[0]) - 1
        cols = cells.shape[1]
        return spell(cells[row]), set(range(row * cols, (row + 1) * cols))
    if kind == "read":
        return spell(flat), every
    first, second = (names[word] for word in words)
    assert min(flat[first], flat[second]) >= 0 and first != second
    if kind == "same":
        return "yes" if flat[first] == flat[second] else "no", {first, second}
    assert flat[first] != flat[second]
    return words[int(flat[second] > flat[first])], {first, second}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cells": (2, 3), "empty": 0.0, "where_image": "end"},
        {"cells": (1, 2), "images": 2, "where_image": "middle", "empty": 0.6},
        {"cells": (11, 3), "images": 3, "where_image": "drawn", "cell": 9},
    ],
)
def test_answers_and_evidence_follow_from_the_cells(fields):
    task = GridQuestions("train", **fields)
    longest = 0
    for example in draw(task, 250):
        row, answer = read(task, example)
        prompt, number = row.replace("#", ""), 0
        if task.images > 1:
            named = re.fullmatch(r"in (\d) (.*)", prompt)
            assert named is not None
            number, prompt = int(named[1]) - 1, named[2]
        expected, places = solve(prompt, example["cells"][number])
        assert answer == expected
        evidence = np.zeros((task.images, task.cells[0] * task.cells[1]), bool)
        evidence[number, list(places)] = True
        np.testing.assert_array_equal(example["evidence"].reshape(task.images, -1), evidence)
        assert KINDS[example["kind"]] == prompt.split(" ")[0]
        assert (example["input"] == PLACE).sum() == task.images
        longest = max(longest, int(example["input_valid"].sum()))
    assert longest == task.longest == len(example["input"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_example_of_each_kind_fills_the_row(kind):
    task = GridQuestions("train", cells=(3, 3), kinds=(kind,))
    assert max(example["input_valid"].sum() for example in draw(task, 60)) == task.longest


@pytest.mark.parametrize("empty", [0.0, 0.3])
def test_the_pixels_are_the_digits(empty):
    task = GridQuestions("test", cells=(2, 2), empty=empty, cell=12, images=2)
    pool, labels = load_digits_split("test")
    for example in draw(task, 10):
        assert example["image"].shape == (2, 24, 24, 1) and example["image"].dtype == np.float32
        ink = example["image"][..., 0] * STD + MEAN
        for number, row, col in itertools.product(range(2), repeat=3):
            block = ink[number, 12 * row : 12 * row + 12, 12 * col : 12 * col + 12]
            digit = example["cells"][number, row, col]
            if digit < 0:
                np.testing.assert_allclose(block, 0, atol=1e-6)
                continue
            inside = block[2:10, 2:10]
            found = np.flatnonzero(np.abs(pool - inside).max((1, 2)) < 1e-5)
            assert len(found) and digit in labels[found]
            np.testing.assert_allclose(block.sum(), inside.sum(), rtol=1e-4)


def test_no_instance_is_in_both_splits():
    seen = {"train": set(), "test": set()}
    for split, found in seen.items():
        for example in draw(GridQuestions(split, kinds=("read",)), 40):
            ink = np.rint(16 * (example["image"][0, ..., 0] * STD + MEAN)).astype(np.uint8)
            blocks = ink.reshape(4, DIGIT, 4, DIGIT).swapaxes(1, 2).reshape(-1, DIGIT, DIGIT)
            found.update(block.tobytes() for block in blocks if block.any())
    assert min(map(len, seen.values())) > 150 and not seen["train"] & seen["test"]


def test_training_digits_alone_are_jittered():
    for split, moved in (("train", True), ("test", False)):
        task = GridQuestions(split, cells=(2, 2), shift=2, empty=0.0)
        pool, _ = load_digits_split(split)
        whole = {digit.tobytes() for digit in np.rint(16 * pool).astype(np.uint8)}
        ink = np.rint(16 * (draw(task)[0]["image"][0, ..., 0] * STD + MEAN)).astype(np.uint8)
        blocks = ink.reshape(2, DIGIT, 2, DIGIT).swapaxes(1, 2).reshape(-1, DIGIT, DIGIT)
        assert any(block.tobytes() not in whole for block in blocks) == moved


def test_test_questions_are_fixed_and_training_ones_are_drawn():
    def texts(task, seed):
        return [read(task, example) for example in draw(task, 20, seed)]

    test, train = GridQuestions("test"), GridQuestions("train")
    assert texts(test, 0) == texts(test, 1) == texts(GridQuestions("test"), 2)
    assert texts(test, 0) != texts(GridQuestions("test", seed=1), 0)
    assert texts(train, 0) == texts(train, 0) != texts(train, 1)
    one, other = draw(test)[0], draw(test, seed=1)[0]
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def test_answers_are_balanced():
    def answers(kind, count=300):
        task = GridQuestions("train", cells=(2, 2), kinds=(kind,))
        return Counter(read(task, example)[1] for example in draw(task, count))

    for kind, size in (("which", 11), ("where", 4), ("count", 5), ("larger", 4), ("same", 2)):
        counts = answers(kind)
        assert len(counts) == size
        expected = 300 / size
        spread = 5 * np.sqrt(expected)
        assert all(abs(count - expected) < spread for count in counts.values()), (kind, counts)


def test_no_cell_is_empty_unless_asked_for():
    for example in draw(GridQuestions("train", empty=0.0), 60):
        assert example["cells"].min() >= 0


@pytest.mark.parametrize(
    "where, pattern",
    [
        ("front", r"##in \d \w+( [a-z0-9]+)+\??"),
        ("end", r"in \d \w+( [a-z0-9]+)+\?##"),
        ("middle", r"in[ #].*[a-z0-9]\?"),
    ],
)
def test_places_of_the_images(where, pattern):
    task = GridQuestions("train", images=2, where_image=where)
    for example in draw(task, 40):
        assert re.fullmatch(pattern, read(task, example)[0])


def test_drawn_places_are_all_between_words():
    task = GridQuestions("train", kinds=("where",), where_image="drawn")
    rows = {re.sub(r"\d", "n", read(task, example)[0]) for example in draw(task, 60)}
    assert rows == {"#where n?", "where# n?", "where n?#"}


def test_batches():
    pytest.importorskip("grain")
    task = GridQuestions("train", cells=(2, 2))
    batch = next(train_batches(task, task.ask, batch=4, seed=0))
    assert batch["image"].shape == (4, 1, 16, 16, 1) and batch["evidence"].shape == (4, 1, 2, 2)
    test = GridQuestions("test", cells=(2, 2))
    one, other = (next(iter(eval_batches(test, test.ask, batch=4, seed=s))) for s in (0, 1))
    np.testing.assert_array_equal(one["input"], other["input"])
    assert (len(task), len(test)) == (100_000, 2_000)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"split": "valid"}, r"^split must be one of \('train', 'test'\), got 'valid': "),
        ({"cells": (0, 4)}, r"^cells must be at least 1 row and 1 to 26 columns, got \(0, 4\): "),
        ({"cells": (4, 27)}, r"^cells must be at least 1 row and 1 to 26 columns, got \(4, 27\): "),
        ({"cells": (1, 1)}, r"^cells must be two or more for the kinds \('larger', 'same'\), got "),
        ({"images": 0}, r"^images must be at least 1, got 0: "),
        ({"kinds": ()}, r"^kinds must be some of \('which', "),
        ({"kinds": ("what",)}, r"^kinds must be some of .*, got \('what',\): change kinds\.$"),
        ({"cell": 7}, r"^cell must be at least the 8 pixels of a digit, got 7: "),
        ({"empty": 1.0}, r"^empty must be in \[0, 1\), got 1\.0: "),
        ({"shift": 8}, r"^shift must be in 0\.\.7, got 8: "),
        ({"where_image": "back"}, r"^where_image must be one of .*, got 'back': "),
        ({"seed": -1}, r"^seed must be in 0\.\.2\*\*32 - 1, got -1: "),
        ({"length": 25}, r"^length must be at least 26, for the longest example, got 25: "),
    ],
)
def test_errors(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        GridQuestions(**{"split": "train", **fields})


def test_one_cell_and_indices():
    task = GridQuestions("test", cells=(1, 1), kinds=("which", "where", "count", "row", "read"))
    assert all(solve(*_parts(task, e))[0] == read(task, e)[1] for e in draw(task, 40))
    with pytest.raises(IndexError, match=r"^index must be in 0\.\.1999, got 2000: "):
        task[2000]


def _parts(task, example):
    return read(task, example)[0].replace("#", ""), example["cells"][0]


def test_accuracy_by_region():
    evidence = np.zeros((6, 2, 2, 3), bool)
    for row, place in enumerate([(0, 0, 0), (1, 0, 0), (0, 1, 2), (1, 0, 1)]):
        evidence[(row, *place)] = True
    evidence[4, 0, :, 0] = True  # two cells: no part of it
    evidence[5, :, 1, 1] = True  # the same cell of two canvases is two cells as well
    right = np.array([True, False, True, False, True, True])
    nan = np.nan
    expected = [[0.5, 0.0, nan], [nan, nan, 1.0]]
    np.testing.assert_array_equal(accuracy_by_region(right, evidence), expected)
    plain = accuracy_by_region(right, evidence[:, 0])
    np.testing.assert_array_equal(plain, [[1.0, nan, nan], [nan, 1.0, 1.0]])
    assert np.isnan(accuracy_by_region(right[:0], evidence[:0])).all()


def test_evidence_patches():
    evidence = np.array([[True, False], [False, False], [False, True]])
    patches = evidence_patches(evidence[None, None], (6, 2))
    assert patches.shape == (1, 1, 12)
    grid = patches.reshape(6, 2)
    np.testing.assert_array_equal(grid[::2], evidence)
    np.testing.assert_array_equal(grid[1::2], evidence)
    wide = evidence_patches(evidence, (3, 4)).reshape(3, 4)
    np.testing.assert_array_equal(wide, evidence[:, [0, 0, 1, 1]])
    sentence = r"^grid must be a multiple of the \(3, 2\) cells, got \(7, 1\): .* to \(6, 2\)\.$"
    with pytest.raises(ValueError, match=sentence):
        evidence_patches(evidence, (7, 1))


def test_patches_of_evidence_cover_the_ink():
    task = GridQuestions("train", kinds=("which",), empty=0.0)
    for example in draw(task, 5):
        patches = evidence_patches(example["evidence"], (16, 16)).reshape(16, 16)
        pixels = patches.repeat(2, 0).repeat(2, 1)
        row, col = np.argwhere(example["evidence"][0])[0] * DIGIT
        box = np.zeros((32, 32), bool)
        box[row : row + DIGIT, col : col + DIGIT] = True
        np.testing.assert_array_equal(pixels, box)
