"""Which bytes a model deleted: rates by kind of byte, script and language, and the texts.

    print(deletion_text(ids, deleted, valid))             for a terminal
    write_deletion(ids, deleted, valid, workdir)          deletion.html, one self-contained page

ids are those of ByteTokenizer. Deleted bytes are struck out; characters of which only some bytes
were deleted are underlined.
"""

import html
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from tokred.viz.scripts import CLASSES, classify, split_characters

SHOWN = 8  # texts, by default
KEPT, PART, GONE = range(3)  # of a character's bytes
ANSI = {KEPT: "{}", PART: "\x1b[4m{}\x1b[0m", GONE: "\x1b[2;9m{}\x1b[0m"}
TAGS = {KEPT: "{0}", PART: '<u title="{1} of {2} bytes">{0}</u>', GONE: "<del>{0}</del>"}
SPACES = str.maketrans({"\n": "⏎\n", "\t": "⇥\t", " ": "␣"})  # where they are struck out
PAGE = """<!doctype html><meta charset="utf-8"><title>Deletion</title>
<style>body {{ font: 15px/1.7 monospace; max-width: 70em; margin: 2em auto; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
del {{ color: #9a9a9a; background: #f3e3e3; }} u {{ background: #fdf3d8; }}
td {{ padding-right: 2em; }} td:nth-child(n+2) {{ text-align: right; }}
i {{ display: inline-block; height: .8em; background: #d55e00; }}</style>
<p>{deleted} of {total} bytes were deleted ({share:.1%}). Deleted bytes are struck out; of
underlined characters some bytes were deleted (hover for how many).</p>
{tables}
{texts}
"""
TABLE = "<h3>{title}</h3>\n<table>{rows}</table>"
ROW = (
    "<tr><td>{0}</td><td>{1.deleted}</td><td>{1.total}</td><td>{1.share:.1%}</td>"
    '<td style="text-align: left"><i style="width: {width:.1f}em"></i></td></tr>'
)

Ids = Int[np.ndarray, "B N"]
Mask = Bool[np.ndarray, "B N"]


class Rate(NamedTuple):
    """How many bytes of a kind there were, and how many of them were deleted."""

    name: str
    deleted: int
    total: int

    @property
    def share(self) -> float:
        return self.deleted / self.total if self.total else 0.0


def deletion_rates(
    ids: Ids, deleted: Mask, valid: Mask, labels: Sequence[str] | None = None
) -> dict[str, list[Rate]]:
    """Tables by title: 'kind of byte', 'script' (of letters alone), and 'language' with labels.

    labels: the language of every row. What does not occur is left out.
    Raises ValueError for shapes that do not fit.
    """
    _check(ids, deleted, valid, labels)
    tables = {"kind of byte": _count(CLASSES, classify(ids), deleted, valid)}
    scripts, number = _scripts(ids, valid)
    tables["script"] = _count(scripts, number, deleted, valid & (number >= 0))
    if labels is not None:
        names = sorted(set(labels))
        rows = np.array([names.index(label) for label in labels], int)
        tables["language"] = _count(
            names, np.repeat(rows[:, None], ids.shape[1], 1), deleted, valid
        )
    return tables


def _count(names: Sequence[str], number: np.ndarray, deleted: Mask, valid: Mask) -> list[Rate]:
    total = np.bincount(number[valid], minlength=len(names))
    gone = np.bincount(number[valid & deleted], minlength=len(names))
    rates = (Rate(*row) for row in zip(names, gone.tolist(), total.tolist(), strict=True))
    return [rate for rate in rates if rate.total]


def _scripts(ids: Ids, valid: Mask) -> tuple[list[str], np.ndarray]:
    """Names, and per byte the number of its script, -1 where it is no letter's."""
    names: list[str] = []
    number = np.full(ids.shape, -1)
    for row, (line, real) in enumerate(zip(ids, valid, strict=True)):
        places = np.flatnonzero(real)
        for character in split_characters(line[real]):
            if character.script is not None:
                if character.script not in names:
                    names.append(character.script)
                bytes_ = places[character.start : character.stop]
                number[row, bytes_] = names.index(character.script)
    return names, number


def _check(ids: Ids, deleted: Mask, valid: Mask, labels: Sequence[str] | None) -> None:
    for name, array in (("deleted", deleted), ("valid", valid)):
        if array.shape != ids.shape:
            raise ValueError(
                f"{name} must have the shape of ids, {ids.shape}, got {array.shape}: change {name}."
            )
    if labels is not None and len(labels) != len(ids):
        raise ValueError(
            f"labels must hold one language per row, {len(ids)}, got {len(labels)}: change labels."
        )


def strike(ids: Int[np.ndarray, " N"], deleted: Bool[np.ndarray, " N"]) -> str:
    """One text for a terminal: what was deleted struck out, what was partly deleted underlined."""
    return "".join(ANSI[mark].format(text) for mark, text, _, _ in _runs(ids, deleted))


def _runs(ids: np.ndarray, deleted: np.ndarray) -> Iterator[tuple[int, str, int, int]]:
    """(mark, text, bytes deleted, bytes) of the longest stretches of one mark."""
    pieces = [
        (
            character.text,
            int(deleted[character.start : character.stop].sum()),
            character.stop - character.start,
        )
        for character in split_characters(ids)
    ]
    for mark, group in groupby(pieces, lambda piece: _mark(*piece[1:])):
        texts, gone, sizes = zip(*group, strict=True)
        text = "".join(texts)
        yield mark, text.translate(SPACES) if mark == GONE else text, sum(gone), sum(sizes)


def _mark(gone: int, size: int) -> int:
    return KEPT if gone == 0 else GONE if gone == size else PART


def deletion_text(
    ids: Ids,
    deleted: Mask,
    valid: Mask,
    labels: Sequence[str] | None = None,
    *,
    shown: int = SHOWN,
) -> str:
    """The tables of deletion_rates, and the first `shown` texts as `strike` gives them."""
    tables = deletion_rates(ids, deleted, valid, labels)
    all_ = _all(deleted, valid)
    lines = [f"{all_.deleted} of {all_.total} bytes deleted ({all_.share:.1%})"]
    for title, rates in tables.items():
        lines += ["", title]
        lines += [f"  {r.name:<22}{r.deleted:>9} of {r.total:>9}  {r.share:>6.1%}" for r in rates]
    texts = (strike(i[v], d[v]) for i, d, v in _rows(ids, deleted, valid, shown))
    return "\n".join([*lines, *("\n" + text for text in texts)])


def deletion_html(
    ids: Ids,
    deleted: Mask,
    valid: Mask,
    labels: Sequence[str] | None = None,
    *,
    shown: int = SHOWN,
) -> str:
    """The same as one page that needs no other file."""
    tables = deletion_rates(ids, deleted, valid, labels)
    all_ = _all(deleted, valid)
    texts = (
        f"<hr>\n<pre>{_tagged(i[v], d[v])}</pre>" for i, d, v in _rows(ids, deleted, valid, shown)
    )
    return PAGE.format(
        deleted=all_.deleted,
        total=all_.total,
        share=all_.share,
        tables="\n".join(_table(title, rates) for title, rates in tables.items()),
        texts="\n".join(texts),
    )


def write_deletion(
    ids: Ids,
    deleted: Mask,
    valid: Mask,
    workdir: Path,
    labels: Sequence[str] | None = None,
    *,
    shown: int = SHOWN,
) -> Path:
    """Writes deletion.html, the page of deletion_html."""
    page = workdir / "deletion.html"
    page.write_text(deletion_html(ids, deleted, valid, labels, shown=shown), encoding="utf-8")
    return page


def _all(deleted: Mask, valid: Mask) -> Rate:
    return Rate("all", int((deleted & valid).sum()), int(valid.sum()))


def _rows(
    ids: Ids, deleted: Mask, valid: Mask, shown: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return zip(ids[:shown], deleted[:shown], valid[:shown], strict=True)


def _tagged(ids: np.ndarray, deleted: np.ndarray) -> str:
    return "".join(
        TAGS[mark].format(html.escape(text), gone, size)
        for mark, text, gone, size in _runs(ids, deleted)
    )


def _table(title: str, rates: Sequence[Rate]) -> str:
    rows = (ROW.format(html.escape(rate.name), rate, width=12 * rate.share) for rate in rates)
    return TABLE.format(title=title, rows="\n".join(rows))
