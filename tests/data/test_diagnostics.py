"""Diagnostics: every answer follows from the inputs before it, as a reader by hand finds it."""

import itertools

import numpy as np
import pytest

from tokred.data.diagnostics import (
    DIAGNOSTICS,
    AssociativeRecall,
    BigramBackcopy,
    Copy,
    Needle,
    keep_example,
    open_diagnostic,
)
from tokred.data.pipeline import Source, eval_batches, train_batches

LENGTH = 48
CASES = [
    open_diagnostic("associative_recall", "train", LENGTH),
    open_diagnostic("associative_recall", "test", 31, vocab=18, power=1.0),
    open_diagnostic("needle", "train", LENGTH),
    open_diagnostic("needle", "test", LENGTH, vocab=100, needles=5, reach=1.0),
    open_diagnostic("copy", "train", LENGTH),
    open_diagnostic("bigram_backcopy", "train", LENGTH),
    open_diagnostic("bigram_backcopy", "valid", LENGTH, vocab=8, seed=5),
]


def recall(source, seen):
    """The value behind the first place of the key that was just read."""
    return seen[list(seen).index(seen[-1]) + 1]


def find_needle(source, seen):
    """The value behind the mark and the key that was just asked for."""
    assert seen[-2] == Needle.ASK
    [place] = [
        i for i in range(len(seen) - 2) if seen[i] == Needle.MARK and seen[i + 1] == seen[-1]
    ]
    return seen[place + 2]


def copy(source, seen):
    """As far behind the start as the separator is behind us."""
    return seen[len(seen) - 1 - list(seen).index(Copy.SEPARATOR)]


def copy_back(source, seen):
    assert seen[-1] in source.trigger_ids
    return seen[-2]


ORACLES = {AssociativeRecall: recall, Needle: find_needle, Copy: copy, BigramBackcopy: copy_back}
ANSWERS = {AssociativeRecall: 8, Needle: 1, Copy: LENGTH // 2}


def name(source):
    return repr(source)


@pytest.mark.parametrize("source", CASES, ids=name)
def test_an_oracle_finds_every_answer(source):
    solve, kind = ORACLES[type(source)], type(source)
    counts = []
    for index in range(50):
        example = source[index]
        places = np.flatnonzero(example["weight"])
        for place in places:
            assert solve(source, example["input"][: place + 1]) == example["target"][place]
        counts.append(len(places))
    assert set(counts) == {ANSWERS[kind]} if kind in ANSWERS else np.mean(counts) > 2


@pytest.mark.parametrize("source", CASES, ids=name)
def test_examples_have_the_form_of_rows(source):
    for index in range(20):
        example = source[index]
        assert {name: (x.shape, x.dtype.type) for name, x in example.items()} == {
            "input": ((source.length,), np.int32),
            "target": ((source.length,), np.int32),
            "weight": ((source.length,), np.float32),
            "position": ((source.length,), np.int32),
            "document": ((source.length,), np.int32),
        }
        np.testing.assert_array_equal(example["input"][1:], example["target"][:-1])
        np.testing.assert_array_equal(example["position"], np.arange(source.length))
        assert not example["document"].any() and set(example["weight"]) <= {0.0, 1.0}
        tokens = np.append(example["input"], example["target"])
        assert tokens.min() >= 0 and tokens.max() < source.vocab
        assert (example["target"][example["weight"] > 0] > 0).all()


@pytest.mark.parametrize("task", DIAGNOSTICS)
def test_seed_split_and_index_fix_an_example(task):
    def draw(split="train", index=3, **options):
        return open_diagnostic(task, split, LENGTH, **options)[index]["input"].tolist()

    assert draw() == draw()
    others = [draw(index=4), draw("valid"), draw("test"), draw(seed=1)]
    assert len({tuple(tokens) for tokens in [draw(), *others]}) == 5


@pytest.mark.parametrize("task", DIAGNOSTICS)
def test_splits_are_disjoint_and_large(task):
    sources = [open_diagnostic(task, split, LENGTH) for split in ("train", "valid", "test")]
    assert [len(source) for source in sources] == [100_000, 2_000, 2_000]
    drawn = [{source[i]["input"].tobytes() for i in range(300)} for source in sources]
    assert all(len(one) == 300 for one in drawn)
    assert all(not one & other for one, other in itertools.combinations(drawn, 2))


def test_keys_come_first_and_queries_follow_the_power_law():
    near, uniform = (AssociativeRecall("train", 128, power=power) for power in (0.01, 1.0))
    places = [
        np.concatenate([np.flatnonzero(source[i]["weight"]) for i in range(200)])
        for source in (near, uniform)
    ]
    assert min(map(np.min, places)) >= 16 and max(map(np.max, places)) <= 126
    assert places[0].mean() < 55 and abs(places[1].mean() - (16 + 127) / 2) < 3
    example = near[0]
    assert (example["input"][:16:2] < 128).all() and (example["input"][1:16:2] >= 128).all()


def test_needles_lie_far_back():
    source = Needle("train", 100, needles=3, reach=0.25)
    for index in range(100):
        marks = np.flatnonzero(source[index]["input"] == Needle.MARK)
        assert len(marks) == 3 and marks.max() + 2 < 25


def test_bigrams_follow_their_table():
    source = BigramBackcopy("train", 400, vocab=6, triggers=1, seed=2)
    counts = np.zeros((6, 6))
    for index in range(100):
        example = source[index]
        assert example["input"][0] == 0 and example["input"][1] not in source.trigger_ids
        free = (example["weight"] == 0) & (example["input"] > 0)
        np.add.at(counts, (example["input"][free], example["target"][free]), 1)
    seen = counts.sum(1) > 500
    assert seen.sum() >= 3
    frequencies = counts[seen] / counts[seen].sum(1, keepdims=True)
    np.testing.assert_allclose(frequencies, source.table[seen], atol=0.06)


def test_triggers_are_frequent_and_the_table_is_that_of_all_splits():
    train, test = (BigramBackcopy(split, 64) for split in ("train", "test"))
    np.testing.assert_array_equal(train.table, test.table)
    np.testing.assert_allclose(train.table.sum(1), 1)
    frequency = np.linalg.matrix_power(train.table, 1024)[0]
    rest = np.setdiff1d(np.arange(train.vocab), train.trigger_ids)
    assert frequency[train.trigger_ids].min() >= frequency[rest].max()
    everywhere = BigramBackcopy("train", 64, everywhere=True)[0]
    np.testing.assert_array_equal(everywhere["weight"], everywhere["input"] > 0)


@pytest.mark.parametrize("task", DIAGNOSTICS)
def test_batches(task):
    pytest.importorskip("grain")
    train, test = (open_diagnostic(task, split, LENGTH) for split in ("train", "test"))
    assert isinstance(train, Source) and "0x" not in repr(train)
    running, resumed = (train_batches(train, keep_example, batch=8, seed=0) for _ in range(2))
    next(running)
    resumed.set_state(running.get_state())
    for one, other in zip(next(running).items(), next(resumed).items(), strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])
    batch = next(iter(eval_batches(test, keep_example, batch=8, seed=0)))
    np.testing.assert_array_equal(batch["input"], [test[i]["input"] for i in range(8)])


@pytest.mark.parametrize(
    "task, options, named",
    [
        ("associative_recall", {"pairs": 0}, "pairs"),
        ("associative_recall", {"power": 0}, "power"),
        ("associative_recall", {"vocab": 17}, "vocab"),
        ("associative_recall", {"length": 30}, "length"),
        ("needle", {"vocab": 15}, "vocab"),
        ("needle", {"reach": 1.5}, "reach"),
        ("needle", {"needles": 9}, "needles"),
        ("needle", {"length": 7}, "length"),
        ("copy", {"length": 47}, "length"),
        ("copy", {"vocab": 2}, "vocab"),
        ("bigram_backcopy", {"length": 1}, "length"),
        ("bigram_backcopy", {"triggers": 0}, "triggers"),
        ("bigram_backcopy", {"vocab": 4}, "vocab"),
        ("bigram_backcopy", {"concentration": 0}, "concentration"),
        ("copy", {"split": "validation"}, "split"),
        ("copy", {"seed": -1}, "seed"),
    ],
)
def test_errors_name_the_field_in_one_sentence(task, options, named):
    with pytest.raises(ValueError, match=f"^{named} must be [^\n]*: change {named}\\.$"):
        open_diagnostic(task, **{"split": "train", "length": LENGTH, **options})


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"got 'bigram': did you mean 'bigram_backcopy'\?$"):
        open_diagnostic("bigram", "train", LENGTH)
    with pytest.raises(TypeError, match=r"^options of copy must be among .*, got \['pairs'\]: "):
        open_diagnostic("copy", "train", LENGTH, pairs=3)
    with pytest.raises(IndexError, match=r"^index must be in 0\.\.1999, got 2000: "):
        open_diagnostic("copy", "test", LENGTH)[2000]
