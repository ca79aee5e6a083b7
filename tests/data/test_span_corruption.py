"""Span corruption: sentinels and texts put back together are the row, lengths are as promised."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokred.data.pairs import make_pair, shift_right
from tokred.data.span_corruption import (
    SpanCorruption,
    count_spans,
    draw_mask,
    replace_spans,
    span_lengths,
)
from tokred.data.tokenizers import END, PAD, ByteTokenizer

DENSITIES = st.sampled_from([0.05, 0.15, 0.3, 0.5])
SPANS = st.sampled_from([1.0, 2.5, 3.0, 20.0])


def fill_in(source, target, sentinels):
    """The row of which these are the input and the target, without end tokens."""
    parts, order = {}, [int(i) for i in target if i in sentinels]
    cuts = [*np.flatnonzero(np.isin(target, sentinels)), len(target)]
    for sentinel, start, stop in zip(order, cuts, cuts[1:], strict=False):
        parts[sentinel] = target[start + 1 : stop].tolist()
    filled = [parts.pop(int(i)) if i in sentinels else [int(i)] for i in source]
    assert not parts and order == [s for s in sentinels if s in order]
    return [token for part in filled for token in part]


def runs(mask):
    return int((np.diff(np.pad(mask, 1).astype(int)) == 1).sum())


@given(st.integers(2, 400), DENSITIES, SPANS, st.integers(0, 99))
def test_masks_have_their_counts_and_begin_with_text(length, density, mean_span, seed):
    rng = np.random.default_rng(seed)
    mask = draw_mask(length, density=density, mean_span=mean_span, rng=rng)
    noise, spans = count_spans(length, density, mean_span)
    assert mask.shape == (length,) and (mask.sum(), runs(mask)) == (noise, spans)
    assert not mask[0] and mask[-1]


def test_masks_of_the_same_counts_are_equally_likely():
    rng = np.random.default_rng(0)
    drawn = [draw_mask(8, density=0.5, mean_span=2.0, rng=rng) for _ in range(4500)]
    _, counts = np.unique(np.stack(drawn), axis=0, return_counts=True)
    assert len(counts) == 9 and counts.min() > 400  # 3 partitions of the noise, 3 of the text


@given(st.integers(3, 300), DENSITIES, SPANS, st.integers(0, 99))
def test_lengths_fit_exactly_and_nothing_is_lost(length, density, mean_span, seed):
    """Sentinels have ids of their own here, so that the row can be read back."""
    how = {"first_sentinel": 259, "direction": 1, "sentinels": 300}
    transform = SpanCorruption(length, density=density, mean_span=mean_span, **how)
    rng = np.random.default_rng(seed)
    row = rng.integers(3, 259, transform.raw_length, np.int32)
    example = transform({"token": row}, rng)
    lost = int(length - example["input_valid"].sum())
    assert lost == 0 or (density == 0.5 and lost == 1)
    assert example["weight"].all() and transform.vocab > example["input"].max()
    source, target = example["input"][: length - lost], example["target"]
    assert source[-1] == target[-1] == END
    sentinels = list(range(259, transform.vocab))
    assert fill_in(source[:-1], target[:-1], sentinels) == row.tolist()


def test_one_example_by_hand():
    ids = ByteTokenizer().encode("abcdefgh")
    mask = np.array([0, 1, 1, 0, 0, 0, 0, 1], bool)
    a, b, c, d, e, f, g, h = ids.tolist()
    assert replace_spans(ids, mask).tolist() == [a, 258, d, e, f, g, 257]
    assert replace_spans(ids, ~mask).tolist() == [258, b, c, 257, h]
    up = replace_spans(ids, mask, first_sentinel=259, direction=1)
    assert up.tolist() == [a, 259, d, e, f, g, 260]
    assert shift_right(np.array([[5, 6, 1], [7, 1, 0]])).tolist() == [[0, 5, 6], [0, 7, 1]]


def test_lengths_of_the_paper():
    assert span_lengths(1024, 0.15, 20) == (1193, 189)
    transform = SpanCorruption(1024)
    assert (transform.raw_length, transform.targets, transform.vocab) == (1193, 189, 259)
    own = SpanCorruption(1024, first_sentinel=259, direction=1)
    assert own.vocab == ByteTokenizer(sentinels=100).vocab


@pytest.mark.parametrize("size", [0, 1, 2, 5, 30])
def test_short_rows_are_padded(size):
    transform = SpanCorruption(64, 40)
    example = transform({"token": np.full(size, 70, np.int32)}, np.random.default_rng(0))
    shapes = {name: (x.shape, x.dtype.type) for name, x in example.items()}
    assert shapes == {
        "input": ((64,), np.int32),
        "input_valid": ((64,), np.bool_),
        "decoder_input": ((40,), np.int32),
        "target": ((40,), np.int32),
        "weight": ((40,), np.float32),
    }
    for ids, real in (("input", "input_valid"), ("target", "weight")):
        count = int(example[real].sum())
        assert example[ids][count - 1] == END and (example[ids][count:] == PAD).all()
        assert (example[ids][:count] != PAD).all()
    assert (example["input"] == 70).sum() + (example["target"] == 70).sum() == size
    np.testing.assert_array_equal(example["decoder_input"], shift_right(example["target"]))


def test_long_rows_are_cut_at_random_and_draws_are_the_generators():
    transform = SpanCorruption(32)
    row = {"token": 3 + np.arange(200, dtype=np.int32), "language": np.int32(7)}
    one, again, other = (transform(row, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one["input"], again["input"])
    assert one["input"][0] != other["input"][0] and one["language"] == 7


def test_any_bytes_will_do():
    """Byte 255 has the id of the first sentinel, as the docstring says; its own weight is kept."""
    row = np.random.default_rng(0).integers(3, 259, SpanCorruption(256).raw_length, np.int32)
    example = SpanCorruption(256)({"token": row}, np.random.default_rng(1))
    assert example["input_valid"].all() and example["weight"].all()


@pytest.mark.parametrize(
    "options, named",
    [
        ({"length": 2}, "length"),
        ({"density": 0.0}, "density"),
        ({"density": 0.6}, "density"),
        ({"mean_span": 0.5}, "mean_span"),
        ({"direction": 0}, "direction"),
        ({"target_length": 12}, "target_length"),
        ({"length": 1024, "mean_span": 1.0}, "mean_span"),
        ({"length": 64, "mean_span": 1.0, "first_sentinel": 10}, "first_sentinel"),
    ],
)
def test_errors_name_the_field_in_one_sentence(options, named):
    with pytest.raises(ValueError, match=f"^{named} must [^\n]*: change {named}\\.$"):
        SpanCorruption(**{"length": 64, **options})


def test_nothing_is_cut():
    ids = np.arange(3, 8)
    assert make_pair(ids, ids, length=6, target_length=6)["weight"].all()
    for lengths in ((5, 6), (6, 5)):
        with pytest.raises(ValueError, match=r"length must be at least 6 for this example, got 5"):
            make_pair(ids, ids, length=lengths[0], target_length=lengths[1])
