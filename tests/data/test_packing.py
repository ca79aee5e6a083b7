"""Rows of tokens: nothing is lost, labels stay within documents, and batches do not depend on
how they are read."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokred.data.packing import ChainedRows, DocumentRows, PackedRows, RowTransform, label_row
from tokred.data.pipeline import Source, eval_batches, train_batches
from tokred.data.tokenizers import END, PAD, ByteTokenizer

BYTES = ByteTokenizer()
DOCUMENTS = [bytes([65 + i]) * (3 + 5 * i % 17) for i in range(20)]
KINDS = {
    "input": np.int32,
    "target": np.int32,
    "weight": np.float32,
    "position": np.int32,
    "document": np.int32,
}
few_documents = st.lists(st.binary(max_size=20), min_size=1, max_size=8)


def rng(seed: int | tuple[int, ...] = 0):
    return np.random.default_rng(seed)


def examples(source, length, seed=0):
    transform = RowTransform(length)
    return [transform(source[i], rng((seed, i))) for i in range(len(source))]


def check_labels(example, length):
    """Everything that holds for each row, from input and document alone."""
    assert {name: (x.shape, x.dtype.type) for name, x in example.items()} == {
        name: ((length,), kind) for name, kind in KINDS.items()
    }
    real = example["document"] >= 0
    count = real.sum()
    assert real[:count].all()
    for name, padding in (("input", PAD), ("target", PAD), ("weight", 0), ("position", -1)):
        assert (example[name][count:] == padding).all()
    np.testing.assert_array_equal(example["input"][1:count], example["target"][: max(count - 1, 0)])
    ends = example["input"][:count] == END
    np.testing.assert_array_equal(example["weight"][:count], ~ends)
    number = np.concatenate([[0], np.cumsum(ends)[:-1]]) if count else np.zeros(0)
    np.testing.assert_array_equal(example["document"][:count], number)
    for one in np.unique(number):
        positions = example["position"][:count][number == one]
        np.testing.assert_array_equal(positions, np.arange(len(positions)))


@given(few_documents, st.integers(1, 9), st.integers(0, 3))
def test_packing_loses_nothing_but_the_tail(documents, length, seed):
    source = PackedRows(documents, BYTES, length, seed)
    stream = [[*BYTES.encode(d), END] for d in documents]
    if sum(map(len, stream)) <= length:
        return
    rows = examples(source, length)
    for row in rows:
        check_labels(row, length)
    inputs = np.concatenate([row["input"] for row in rows])
    targets = np.concatenate([row["target"] for row in rows])
    order = np.random.default_rng(seed).permutation(len(documents))
    expected = np.concatenate([stream[i] for i in order])
    np.testing.assert_array_equal(inputs, expected[: len(inputs)])
    np.testing.assert_array_equal(targets, expected[1 : len(inputs) + 1])
    assert 0 < len(expected) - len(inputs) <= length


def test_a_seed_fixes_the_order_of_documents():
    first, again, other = (
        np.concatenate([row["input"] for row in examples(PackedRows(DOCUMENTS, BYTES, 16, s), 16)])
        for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_document_that_is_cut_goes_on_in_the_next_row():
    source = PackedRows([bytes(range(97, 117))], BYTES, 8)
    first, second = examples(source, 8)
    np.testing.assert_array_equal(second["position"], np.arange(8))
    assert first["target"][-1] == second["input"][0] and first["weight"][-1] == 1


@given(few_documents, st.integers(1, 9))
def test_chained_rows_begin_with_their_document(documents, length):
    source = ChainedRows(documents, BYTES, length)
    assert len(source) == len(documents)
    for index, row in enumerate(examples(source, length)):
        check_labels(row, length)
        following = itertools.cycle([*documents[index:], *documents[:index]])
        stream = list(
            itertools.islice(
                itertools.chain.from_iterable([*BYTES.encode(d), END] for d in following),
                length + 1,
            )
        )
        np.testing.assert_array_equal(row["input"], stream[:-1])
        np.testing.assert_array_equal(row["target"], stream[1:])


@given(st.binary(max_size=30), st.integers(1, 20), st.integers(0, 99))
def test_one_document_per_row_is_padded_or_cut_at_random(document, length, seed):
    row = RowTransform(length)(DocumentRows([document], BYTES)[0], rng(seed))
    check_labels(row, length)
    tokens = [*BYTES.encode(document), END]
    count = int((row["document"] >= 0).sum())
    assert count == min(length, len(document))
    shown = [*row["input"][:count], *row["target"][count - 1 : count]]
    assert not count or any(tokens[i : i + count + 1] == shown for i in range(len(tokens) - count))


def test_windows_reach_both_ends_and_follow_the_generator():
    source, transform = DocumentRows([bytes(range(97, 107))], BYTES), RowTransform(4)
    starts = [transform(source[0], rng(seed))["input"][0] - 100 for seed in range(100)]
    assert set(starts) == set(range(7))
    assert starts[3] == transform(source[0], rng(3))["input"][0] - 100


def test_labels_renumber_documents():
    tokens = np.arange(5, 11, dtype=np.int32)
    row = label_row(tokens, np.array([4, 4, 7, 9, 9, 9], np.int32), length=7)
    np.testing.assert_array_equal(row["document"], [0, 0, 1, 2, 2, -1, -1])
    np.testing.assert_array_equal(row["position"], [0, 1, 0, 0, 1, -1, -1])
    np.testing.assert_array_equal(row["weight"], [1, 0, 0, 1, 1, 0, 0])


SOURCES = {
    "packed": PackedRows(DOCUMENTS, BYTES, 12),
    "chained": ChainedRows(DOCUMENTS, BYTES, 12),
    "documents": DocumentRows(DOCUMENTS, BYTES),
}


@pytest.fixture(params=SOURCES)
def make(request):
    pytest.importorskip("grain")
    source = SOURCES[request.param]
    return lambda **options: train_batches(
        source, RowTransform(12), **{"batch": 8, "seed": 0, **options}
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() == {*KINDS, "id"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_batches_resume_from_their_state(make):
    running, resumed = make(), make()
    take(running, 5)
    resumed.set_state(running.get_state())
    assert_same(take(resumed, 6), take(running, 6))


def test_shards_are_parts_of_the_same_batches(make):
    shards = [take(make(shard=shard, count=2), 6) for shard in range(2)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    assert_same(joined, take(make(), 6))


def test_threads_change_nothing(make):
    assert_same(take(make(num_threads=2, prefetch=4), 6), take(make(num_threads=0), 6))


@pytest.mark.parametrize("name", SOURCES)
def test_evaluation_sees_every_row_once(name):
    pytest.importorskip("grain")
    source = SOURCES[name]
    batches = list(eval_batches(source, RowTransform(12), batch=8, seed=0))
    ids = np.concatenate([batch["id"][batch["valid"]] for batch in batches])
    np.testing.assert_array_equal(ids, np.arange(len(source)))
    again = list(eval_batches(source, RowTransform(12), batch=8, seed=0))
    np.testing.assert_array_equal(batches[0]["input"], again[0]["input"])


@pytest.mark.parametrize("name", SOURCES)
def test_sources_have_a_stable_repr_and_no_other_rows(name):
    source = SOURCES[name]
    assert isinstance(source, Source) and "0x" not in repr(source)
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=rf"^index must be in 0\.\.\d+, got {index}: "):
            source[index]


def test_bad_input():
    for build in (lambda: PackedRows(DOCUMENTS, BYTES, 0), lambda: RowTransform(0)):
        with pytest.raises(ValueError, match=r"^length must be at least 1 token, got 0: "):
            build()
    with pytest.raises(ValueError, match=r"^length must be below the 4 tokens of all documents, "):
        len(PackedRows([b"abc"], BYTES, 4))
