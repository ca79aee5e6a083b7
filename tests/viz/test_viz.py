"""Pictures are written and show what they should; tables say exactly what the rows hold."""

import re
import subprocess
import sys

import numpy as np
import pytest

from tokred.viz import curves, format_table, paint_tokens, plot_frontier, plot_pareto, plot_tokens
from tokred.viz.kept import ALONE, GONE, colour_groups, count_left, label_cells, stretch
from tokred.viz.table import FIELDS

GRID, PREFIX, SIDE = (2, 3), 1, 4
IDENTITY = np.arange(7)
MERGED = np.array([0, 1, 1, 2, -1, 3, 1])  # patches 0, 1 and 5 in one token, patch 3 gone


def row(method, seed=0, accuracy=0.9, **other):
    fields = {"recall": 0.8, "macs": 5e6, "macs_ratio": 0.5, "ms": 2.0, "ms_ratio": 0.6}
    return {"method": method, "seed": seed, "accuracy": accuracy, **fields, **other}


ROWS = [
    row("dense", accuracy=0.96, recall=None, macs=1e7, macs_ratio=1.0, ms=3.0, ms_ratio=1.0),
    row("tome", 0, 0.90),
    row("tome", 1, 0.92, ms=2.2, ms_ratio=0.7),
    row("a_longer_name", accuracy=0.5),
]


def images(count=2, channels=1):
    shape = (count, GRID[0] * SIDE, GRID[1] * SIDE, channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def draw(path, **changed):
    arguments = {
        "images": images(),
        "sources": [np.stack([IDENTITY, MERGED])],
        "grid": GRID,
        "prefix": PREFIX,
        "path": path,
    }
    plot_tokens(**(arguments | changed))


def png_size(path):
    """Width and height from the header of a PNG file."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def refuses(call, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        call()


def test_table_of_all_columns():
    assert format_table(ROWS).splitlines() == [
        "method         accuracy %  recall %  MMACs  MACs ratio           ms       ms ratio",
        "-------------  ----------  --------  -----  ----------  -----------  -------------",
        "dense                96.0         –  10.00       1.000         3.00          1.000",
        "tome           91.0 ± 1.0      80.0   5.00       0.500  2.10 ± 0.10  0.650 ± 0.050",
        "a_longer_name        50.0      80.0   5.00       0.500         2.00          0.600",
    ]


def test_table_of_chosen_columns_in_their_order():
    assert format_table(ROWS[:1], ["ms", "accuracy"]).splitlines() == [
        "method    ms  accuracy %",
        "------  ----  ----------",
        "dense   3.00        96.0",
    ]


def test_groups_of_answers_are_columns_too():
    rows = [{"method": "mqt", "tokens": 4, "exact_which": share} for share in (0.5, 0.75)]
    lines = format_table(rows, ("tokens", "exact_which")).splitlines()
    assert lines[0].split() == ["method", "tokens", "which", "%"]
    assert lines[2].split() == ["mqt", "4", "62.5", "±", "12.5"]


def test_table_reads_only_the_columns_it_shows():
    assert format_table([{"method": "tome", "ms": 1}], ["ms"]).endswith("tome    1.00")


@pytest.mark.parametrize(
    "rows, columns, sentence",
    [
        ([], None, "rows must hold at least one result, got none: change rows."),
        (
            [{"method": "tome"}],
            ["ms"],
            "rows must have the field 'ms', got one with ['method']: add it.",
        ),
        ([{"ms": 1}], ["ms"], "rows must have the field 'method', got one with ['ms']: add it."),
        (
            [row("tome"), row("tome", recall=None)],
            ["recall"],
            "rows['recall'] of method 'tome' must be a number in all rows or None in all, got "
            "[0.8, None]: change recall.",
        ),
        (
            ROWS,
            ["speed"],
            f"columns must be among {tuple(FIELDS)}, got 'speed': change columns.",
        ),
    ],
)
def test_table_errors(rows, columns, sentence):
    refuses(lambda: format_table(rows, columns), ValueError, sentence)


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:], ROWS[:1]], ids=["all", "no dense", "dense"])
def test_pareto_is_written(tmp_path, rows):
    path = tmp_path / "pareto.png"
    plot_pareto(rows, path)
    assert path.stat().st_size > 10_000
    assert png_size(path) == (1760, 736)


def test_pareto_takes_more_methods_than_colours_and_markers(tmp_path):
    path = tmp_path / "pareto.svg"
    plot_pareto([row(f"m{i}", accuracy=i / 60) for i in range(60)], path)
    assert path.stat().st_size > 10_000


def test_pareto_errors(tmp_path):
    rows = [row("tome", ms_ratio=None)]
    sentence = "rows['ms_ratio'] of method 'tome' must be a number, got None: change ms_ratio."
    refuses(lambda: plot_pareto(rows, tmp_path / "no.png"), ValueError, sentence)


@pytest.mark.parametrize("channels", [1, 3])
def test_tokens_are_written(tmp_path, channels):
    path, more = tmp_path / "tokens.png", tmp_path / "more.png"
    draw(path, images=images(channels=channels), titles=["after 3"], masks=images()[..., 0] > 0)
    draw(more, images=images(1), sources=[MERGED[None]] * 8)
    assert min(path.stat().st_size, more.stat().st_size) > 10_000
    assert png_size(more)[0] > png_size(path)[0]
    assert png_size(more)[1] < png_size(path)[1]


def test_jax_arrays_are_welcome(tmp_path):
    import jax.numpy as jnp

    draw(tmp_path / "a.png", images=jnp.asarray(images()), sources=[jnp.stack([MERGED] * 2)])


def test_labels_and_counts():
    labels = label_cells(MERGED, GRID, PREFIX)
    assert labels.tolist() == [[1, 1, ALONE], [GONE, ALONE, 1]]
    assert count_left(MERGED[None], PREFIX) == "3"
    assert count_left(np.stack([IDENTITY, MERGED]), PREFIX) == "3–6"


def test_a_patch_merged_into_the_prefix_is_merged_and_no_token_of_its_own():
    source = np.array([0, 0, 1, 2, 3, 4, 5])
    assert label_cells(source, GRID, PREFIX)[0].tolist() == [0, ALONE, ALONE]
    assert count_left(source[None], PREFIX) == "5"


def test_all_gone():
    source = np.array([0, *[-1] * 6])
    assert (label_cells(source, GRID, PREFIX) == GONE).all()
    assert (label_cells(source[1:] * 0 - 1, GRID, 0) == GONE).all()
    assert count_left(source[None], PREFIX) == "0"


def test_touching_groups_differ_and_a_group_keeps_its_colour():
    labels = np.array([[0, 0, 1, 1], [2, 2, 3, 3], [ALONE, ALONE, GONE, GONE]])
    nothing = np.full(labels.shape, -1)
    first = colour_groups(labels, nothing)
    assert len(set(first[:2].flat)) == 4 and (first[2] == -1).all()
    grown = np.where(labels == 0, 7, labels)
    grown[2, :2] = 2
    second = colour_groups(grown, first)
    assert np.array_equal(second[:2], first[:2]) and (second[2, :2] == first[1, 0]).all()


def test_more_groups_than_colours():
    labels = np.arange(64).reshape(8, 8)
    colours = colour_groups(labels, np.full((8, 8), -1))
    assert (colours >= 0).all()
    assert (colours[1:] != colours[:-1]).all() and (colours[:, 1:] != colours[:, :-1]).all()


def test_paint_shows_plain_merged_and_gone():
    before, after = paint_tokens(images(1)[0], [MERGED], grid=GRID, prefix=PREFIX)
    cells = np.abs(after - before).reshape(2, 24, 3, 24, 3)
    changed = cells.max((1, 3, 4)) > 0
    assert changed.tolist() == [[True, True, False], [True, False, True]]
    contrast = [np.ptp(x.reshape(2, 24, 3, 24, 3)[1, :, 0]) for x in (before, after)]
    assert contrast[1] < contrast[0] / 3
    assert after.min() >= 0 and after.max() <= 1


def test_identity_paints_the_input():
    before, after = paint_tokens(images(1)[0], [IDENTITY], grid=GRID, prefix=PREFIX)
    assert np.array_equal(before, after)


def test_mask_at_the_rim_is_outlined_on_all_sides():
    image, mask = np.zeros((8, 12, 1), np.float32), np.zeros((8, 12), bool)
    mask[:4, :4] = True
    (picture,) = paint_tokens(image, [], grid=GRID, prefix=PREFIX, mask=mask)
    white = (picture == 1).all(-1)
    assert white[0, :24].all() and white[:24, 0].all()
    assert white[23, :24].all() and white[:24, 23].all()
    assert not white[4:20, 4:20].any() and not white[24:].any() and not white[:, 24:].any()


def test_images_are_stretched_and_constant_ones_are_grey():
    assert (stretch(images(1)[0]).min(), stretch(images(1)[0]).max()) == (0, 1)
    assert (stretch(np.full((2, 2, 1), 7.0)) == 0.5).all()


@pytest.mark.parametrize(
    "changed, error, sentence",
    [
        (
            {"images": images()[..., 0]},
            ValueError,
            "images must be [M, H, W, C] with C of 1 or 3, got (2, 8, 12): change images.",
        ),
        (
            {"images": images(channels=2)},
            ValueError,
            "images must be [M, H, W, C] with C of 1 or 3, got (2, 8, 12, 2): change images.",
        ),
        (
            {"images": images() * np.nan},
            ValueError,
            "images must be finite, got NaN or infinity: change images.",
        ),
        (
            {"masks": np.zeros((2, 8, 8), bool)},
            ValueError,
            "masks must be [M, H, W] = (2, 8, 12), got (2, 8, 8): change masks.",
        ),
        (
            {"prefix": 0},
            ValueError,
            "sources[0] must be [M, prefix + rows * columns] = (2, 6), got (2, 7): change "
            "sources, grid or prefix.",
        ),
        (
            {"sources": [np.zeros((2, 7))]},
            TypeError,
            "sources[0] must hold integers, got float64: change sources.",
        ),
        (
            {"sources": [np.full((2, 7), -2)]},
            ValueError,
            "sources[0] must be at least -1, got -2: change sources.",
        ),
        (
            {"titles": ["a", "b"]},
            ValueError,
            "titles must hold one title per layer, 1, got 2: change titles.",
        ),
    ],
)
def test_token_errors(tmp_path, unchecked, changed, error, sentence):
    refuses(lambda: draw(tmp_path / "no.png", **changed), error, sentence)


def test_import_needs_no_matplotlib():
    code = "import sys, tokred.viz; print({'matplotlib'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sentence = "tokred.viz draws with matplotlib, which is not installed: pip install matplotlib."
    refuses(lambda: plot_pareto(ROWS, tmp_path / "no.png"), ImportError, sentence)


def test_a_frontier_has_a_line_per_method_and_a_point_for_one_budget(tmp_path):
    rows = [
        {"line": line, "budget": b, "seed": s, "macs_ratio": b, "accuracy": b + s / 10}
        for line, budgets in (("many", (0.4, 0.6)), ("one", (0.5,)))
        for b in budgets
        for s in (0, 1)
    ]
    plot_frontier(rows, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="rows are empty"):
        plot_frontier([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="'loss'"):
        plot_frontier(rows, tmp_path / "none.png", "loss")


def test_the_band_of_a_percentage_stays_within_0_and_100(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    low_and_high = [
        {"line": "one", "budget": b, "seed": s, "macs_ratio": b, "accuracy": float(s), "loss": s}
        for b in (0.4, 0.6)
        for s in (0, 1)
    ]
    for score, within in (("accuracy", True), ("loss", False)):
        plot_frontier(low_and_high, tmp_path / "none.png", score)
        (band,) = drawn[-1].axes[0].collections
        y = band.get_paths()[0].vertices[:, 1]
        assert (y.min() == 0 and y.max() == 100) == within
        assert (y.min() < 0 and y.max() > 1) != within
