"""Deleted bytes: which kind, which script, and the texts with them struck out."""

from typing import Any

import numpy as np
import pytest

from tokred.data.tokenizers import END, ByteTokenizer
from tokred.viz import deletion_html, deletion_rates, deletion_text, write_deletion
from tokred.viz.deletion import strike
from tokred.viz.scripts import script_of, split_characters

BYTES = ByteTokenizer()


def rows(*texts, length=24):
    ids = np.zeros((len(texts), length), int)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text) + 1] = np.append(BYTES.encode(text), END)
    return ids, ids > 0


def table(rates):
    return {rate.name: (rate.deleted, rate.total) for rate in rates}


def test_rates_count_valid_bytes_by_kind_script_and_language():
    ids, valid = rows("Ab 1,é".encode(), "жд\xff".encode("latin-1", "ignore") + "ж".encode())
    deleted = np.zeros_like(valid)
    deleted[0, [0, 2, 6]] = True  # A, the space, the second byte of é
    deleted[:, 20:] = True  # padding
    tables = deletion_rates(ids, deleted, valid, ["en", "ru"])
    assert table(tables["kind of byte"]) == {
        "letter": (1, 2),
        "digit": (0, 1),
        "whitespace": (1, 1),
        "punctuation": (0, 1),
        "lead byte": (0, 2),
        "continuation byte": (1, 2),
        "no UTF-8 or sentinel": (0, 1),
        "special": (0, 2),
    }
    assert table(tables["script"]) == {"Latin": (2, 4), "Cyrillic": (0, 2)}
    assert table(tables["language"]) == {"en": (3, 8), "ru": (0, 4)}
    assert "language" not in deletion_rates(ids, deleted, valid)
    assert tables["language"][0].share == 3 / 8


@pytest.mark.parametrize(
    "character, script",
    [("a", "Latin"), ("ß", "Latin"), ("ω", "Greek"), ("ы", "Cyrillic"), ("ש", "Hebrew"),
     ("ع", "Arabic"), ("ह", "Devanagari"), ("ท", "Thai"), ("한", "Hangul"), ("の", "Hiragana"),
     ("カ", "Katakana"), ("字", "Han"), ("1", None), ("。", None), ("😀", None), ("ế", "Latin")],
)  # fmt: skip
def test_scripts(character, script):
    assert script_of(character) == script


def test_characters_cover_every_id_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, 262, 60)
        found = split_characters(ids)
        assert [c.start for c in found] == [0, *(c.stop for c in found[:-1])]
        assert found[-1].stop == 60
    text = "aé漢😀\n"
    assert "".join(c.text for c in split_characters(BYTES.encode(text))) == text
    broken = np.append(BYTES.encode("é")[:1], [BYTES.encode("b")[0], 258, 259, END, 3 + 27])
    assert [c.text for c in split_characters(broken)] == [
        "<198>",
        "b",
        "<258>",
        "<259>",
        "</s>",
        "<30>",
    ]


def test_terminal_strikes_out_and_underlines():
    ids = BYTES.encode("a b\né")
    assert strike(ids, np.array([0, 1, 1, 0, 0, 1], bool)) == "a\x1b[2;9m␣b\x1b[0m\n\x1b[4mé\x1b[0m"
    assert strike(ids, np.zeros(6, bool)) == "a b\né"
    valid = np.array([[1, 1, 1, 0, 0, 0]], bool)
    told = deletion_text(ids[None], np.ones((1, 6), bool), valid)
    assert told.startswith("3 of 3 bytes deleted (100.0%)\n") and told.endswith("a␣b\x1b[0m")


def test_page_is_self_contained_and_escaped(tmp_path):
    ids, valid = rows(b"<b>{0}", "ж{".encode())
    deleted = np.zeros_like(valid)
    deleted[0, :2] = deleted[1, 0] = True
    page = write_deletion(ids, deleted, valid, tmp_path, ["<en>", "ru"]).read_text("utf-8")
    assert page == deletion_html(ids, deleted, valid, ["<en>", "ru"])
    assert "<del>&lt;b</del>&gt;{0}&lt;/s&gt;" in page and "&lt;en&gt;" in page
    assert '<u title="1 of 2 bytes">ж</u>{' in page and "3 of 11 bytes" in page
    assert "http" not in page and "src=" not in page
    assert deletion_html(ids, deleted, valid, shown=1).count("<pre>") == 1


def test_nothing_valid_and_bad_shapes(unchecked):
    ids, valid = rows(b"ab")
    assert deletion_text(ids, valid, np.zeros_like(valid)).startswith("0 of 0 bytes")
    for name in ("deleted", "valid"):
        masks: Any = {"deleted": valid, "valid": valid, name: valid[:, 1:]}
        with pytest.raises(ValueError, match=f"^{name} must have the shape of ids, .*{name}\\.$"):
            deletion_rates(ids, **masks)
    with pytest.raises(ValueError, match=r"^labels must hold one language per row, 1, got 2: "):
        deletion_rates(ids, valid, valid, ["en", "de"])
