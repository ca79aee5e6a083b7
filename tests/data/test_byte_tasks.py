"""Tasks on characters: the answer follows from the input, as a reader by hand finds it."""

import difflib
import itertools
import string

import numpy as np
import pytest

from tokred.data.byte_tasks import (
    BYTE_TASKS,
    find_words,
    load_sentences,
    load_words,
    misspell,
    open_byte_task,
)
from tokred.data.diagnostics import keep_example
from tokred.data.pairs import shift_right
from tokred.data.pipeline import Source, eval_batches
from tokred.data.tokenizers import END, PAD, ByteTokenizer

LENGTH = 64
SPLITS = ("train", "valid", "test")
LOWER = set(string.ascii_lowercase) - set("aeiou")


def read(example):
    return [ByteTokenizer().decode(example[name]) for name in ("input", "target")]


def drop_vowels(text):
    return "".join(letter for letter in text if letter.lower() not in "aeiou")


def drop_after_consonant(text):
    before = zip(" " + text, text, strict=False)
    return "".join(b for a, b in before if not (b.lower() in "aeiou" and a in LOWER))


ORACLES = {
    "vowel_removal": drop_vowels,
    "contextual_vowel_removal": drop_after_consonant,
    "merge_abc": lambda text: "D".join(text.split("ABC")),
}


@pytest.mark.parametrize("length", [16, LENGTH])
@pytest.mark.parametrize("task", ORACLES)
def test_answers_of_random_strings(task, length):
    source = open_byte_task(task, "train", length)
    shorter = 0
    for index in range(100):
        example = source[index]
        text, answer = read(example)
        assert answer == ORACLES[task](text) and text[0] == answer[0] == "#"
        assert example["input_valid"].all() and len(text) == length - 1
        shorter += len(answer) < len(text)
    assert shorter > 90


def test_pairs_and_abcs_are_as_frequent_as_asked():
    merges = open_byte_task("merge_abc", "train", LENGTH, count=8)
    assert 6 < np.mean([read(merges[i])[0].count("ABC") for i in range(300)]) < 9
    many, few = (
        open_byte_task("contextual_vowel_removal", "train", LENGTH, pairs=n) for n in (25, 3)
    )
    left = [np.mean([len(read(source[i])[1]) for i in range(200)]) for source in (many, few)]
    assert left[0] < left[1] - 3


def test_spelling_is_set_right():
    source = open_byte_task("spelling_correction", "train", LENGTH, rate=0.3)
    sentences, wrong = set(load_sentences("train")), []
    for index in range(200):
        noisy, clean = read(source[index])
        assert clean in sentences and noisy != clean
        assert noisy.count(" ") == clean.count(" ")
        pairs = list(zip(noisy.split(), clean.split(), strict=True))
        changed = [pair for pair in pairs if len(set(pair)) == 2]
        assert all(difflib.SequenceMatcher(None, *pair).ratio() > 0.4 for pair in changed)
        wrong.append(len(changed) / len(pairs))
    assert 0.2 < np.mean(wrong) < 0.5


def test_every_kind_of_misspelling_comes():
    rng = np.random.default_rng(0)
    drawn = [misspell("word", rng) for _ in range(400)]
    sizes = np.bincount([len(word) for word in drawn]) / 400
    assert "word" not in drawn and {"wrod", "wor"} <= set(drawn)
    assert sizes[3] == pytest.approx(0.25, abs=0.08) and sizes[5] == pytest.approx(0.25, abs=0.08)


def test_words_hide_backwards():
    source = open_byte_task("word_search", "train", 128)
    words, places = set(load_words("train")), []
    for index in range(200):
        example = source[index]
        text, word = read(example)
        cue, row = text.split(": ")
        assert cue == "".join(sorted(word)) and word in words
        assert find_words(cue, row) == {word} and example["input_valid"].all()
        assert example["target"].shape == (13,)
        places.append(row.index(word[::-1]) / len(row))
    assert min(places) < 0.1 and max(places) > 0.8
    assert find_words("abc", "xcbaxcab") == {"abc", "bac"}


@pytest.mark.parametrize("task", BYTE_TASKS)
def test_examples_have_the_form_of_pairs(task):
    source = open_byte_task(task, "test", LENGTH, 80)
    for index in range(20):
        example = source[index]
        assert {name: (x.shape, x.dtype.type) for name, x in example.items()} == {
            "input": ((LENGTH,), np.int32),
            "input_valid": ((LENGTH,), np.bool_),
            "decoder_input": ((80,), np.int32),
            "target": ((80,), np.int32),
            "weight": ((80,), np.float32),
        }
        np.testing.assert_array_equal(example["decoder_input"], shift_right(example["target"]))
        np.testing.assert_array_equal(example["weight"], example["target"] != PAD)
        np.testing.assert_array_equal(example["input_valid"], example["input"] != PAD)
        assert (example["target"] == END).sum() == (example["input"] == END).sum() == 1
        assert max(example["input"].max(), example["target"].max()) < source.vocab == 259


@pytest.mark.parametrize("task", BYTE_TASKS)
def test_seed_split_and_index_fix_an_example(task):
    def draw(split="train", index=3, **options):
        return read(open_byte_task(task, split, LENGTH, **options)[index])[0]

    assert draw() == draw()
    assert len({draw(), draw(index=4), draw("valid"), draw("test"), draw(seed=1)}) == 5


@pytest.mark.parametrize("task", BYTE_TASKS)
def test_splits_are_disjoint(task):
    sources = [open_byte_task(task, split, LENGTH) for split in SPLITS]
    assert [len(source) for source in sources] == [100_000, 2_000, 2_000]
    for part in (0, 1):  # neither inputs nor answers
        drawn = [{read(source[i])[part] for i in range(300)} for source in sources]
        assert all(not one & other for one, other in itertools.combinations(drawn, 2))


def test_words_and_sentences_belong_to_one_split():
    for load in (load_words, load_sentences):
        parts = [set(load(split)) for split in SPLITS]
        assert len(set.union(*parts)) == sum(map(len, parts)) and min(map(len, parts)) > 100
        assert list(load("test")) == sorted(load("test"))


def test_batches():
    pytest.importorskip("grain")
    source = open_byte_task("spelling_correction", "test", LENGTH)
    assert isinstance(source, Source) and "0x" not in repr(source)
    batch = next(iter(eval_batches(source, keep_example, batch=8, seed=0)))
    np.testing.assert_array_equal(batch["input"], [source[i]["input"] for i in range(8)])


@pytest.mark.parametrize(
    "task, options, named",
    [
        ("vowel_removal", {"length": 15}, "length"),
        ("vowel_removal", {"target_length": 63}, "target_length"),
        ("contextual_vowel_removal", {"pairs": 0}, "pairs"),
        ("merge_abc", {"count": 0}, "count"),
        ("spelling_correction", {"rate": 1.5}, "rate"),
        ("spelling_correction", {"length": 16, "split": "test"}, "length"),
        ("spelling_correction", {"target_length": 3}, "target_length"),
        ("word_search", {"length": 26}, "length"),
        ("word_search", {"target_length": 12}, "target_length"),
        ("word_search", {"split": "validation"}, "split"),
        ("merge_abc", {"seed": -1}, "seed"),
    ],
)
def test_errors_name_the_field_in_one_sentence(task, options, named):
    with pytest.raises(ValueError, match=f"^{named} must be [^\n]*: change {named}\\.$"):
        open_byte_task(task, **{"split": "train", "length": LENGTH, **options})


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"got 'merge': did you mean 'merge_abc'\?$"):
        open_byte_task("merge", "train", LENGTH)
    with pytest.raises(TypeError, match=r"^options of merge_abc must be among .*, got \['rate'\]"):
        open_byte_task("merge_abc", "train", LENGTH, rate=0.1)
    with pytest.raises(IndexError, match=r"^index must be in 0\.\.1999, got 2000: "):
        open_byte_task("word_search", "test", LENGTH)[2000]
