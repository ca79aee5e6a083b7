"""Tokenizers: round trips, special ids, how many bytes an id stands for."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokred.data.tokenizers import (
    END,
    PAD,
    UNKNOWN,
    ByteTokenizer,
    Tokenizer,
    bytes_of,
    load_bpe,
    train_bpe,
)

TEXTS = ["the cat sat on the mat, the cat sat", "größer als </s> and 漢字 😀\n\n\tthe end <pad>"]


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    return train_bpe(TEXTS, vocab=300)


def test_bytes_are_those_of_byt5():
    ids = ByteTokenizer().encode("Aé")
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [65 + 3, 0xC3 + 3, 0xA9 + 3])
    assert (PAD, END, UNKNOWN, ByteTokenizer().vocab) == (0, 1, 2, 259)


@given(st.binary())
def test_any_bytes_survive(data):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode(errors="replace")
    assert bytes_of(ids, tokenizer) == len(data)


@given(st.text())
def test_any_text_survives(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_left_out_and_stand_for_no_byte():
    tokenizer = ByteTokenizer(sentinels=2)
    ids = np.array([PAD, 68, END, UNKNOWN, tokenizer.sentinel(0), tokenizer.sentinel(1)])
    assert tokenizer.decode(ids) == "A" and bytes_of(ids, tokenizer) == 1
    assert (tokenizer.vocab, tokenizer.sentinel(0), tokenizer.sentinel(1)) == (261, 259, 260)


@given(st.text())
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int32 and (ids >= 3).all() and (ids < bpe.vocab).all()
    assert bpe.decode(ids) == text
    assert bytes_of(ids, bpe) == len(text.encode())


@given(st.binary())
def test_bpe_replaces_what_is_no_text(bpe, data):
    assert bpe.decode(bpe.encode(data)) == data.decode(errors="replace")


def test_bpe_learns_pairs_and_is_deterministic(bpe):
    again = train_bpe(TEXTS, vocab=300)
    assert again == bpe and isinstance(bpe, Tokenizer)
    assert 259 < bpe.vocab <= 300 and len(bpe.encode(TEXTS[0])) < len(TEXTS[0])
    assert bpe.decode(np.array([PAD, *bpe.encode("cat"), END])) == "cat"
    assert bpe.byte_counts.shape == (bpe.vocab,) and not bpe.byte_counts[:3].any()


def test_bpe_saves_and_loads(bpe, tmp_path):
    bpe.save(tmp_path / "bpe.json")
    loaded = load_bpe(tmp_path / "bpe.json")
    assert loaded == bpe and repr(loaded) == f"BpeTokenizer(vocab={bpe.vocab})"
    for text in TEXTS:  # also those with '</s>' in them
        np.testing.assert_array_equal(loaded.encode(text), bpe.encode(text))


def test_bad_input(bpe, tmp_path, unchecked):
    with pytest.raises(ValueError, match=r"^sentinels must be at least 0, got -1: "):
        ByteTokenizer(-1)
    with pytest.raises(ValueError, match=r"^number must be below sentinels=1, got 1: "):
        ByteTokenizer(1).sentinel(1)
    for tokenizer in (ByteTokenizer(), bpe):
        with pytest.raises(TypeError, match=r"^text must be str or bytes, got int: "):
            tokenizer.encode(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^vocab must be at least 259, got 258: "):
        train_bpe(TEXTS, vocab=258)
    with pytest.raises(FileNotFoundError, match=r"^path must be a tokenizer that was saved, "):
        load_bpe(tmp_path / "none.json")


def test_bpe_of_another_kind(bpe):
    other = type(bpe)
    with pytest.raises(ValueError, match=r"^definition must begin with the ids "):
        other(bpe.definition.replace("</s>", "[SEP]"))


def test_bpe_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'run `pip install "tokred\[bpe\]"`\.$'):
        train_bpe(TEXTS, vocab=300)
