"""Counts, maps, sources and sizes: what the schedule promises is what happens."""

import dataclasses
import re
import sys

import jax
import numpy as np

from tests.conformance.setting import (
    easy,
    even,
    inputs_of,
    odd,
    plan_of,
    report_of,
    routes,
    run_of,
    valid_of,
)
from tests.methods_table import Options, Row
from tokred.methods import get_method
from tokred.plan import AROUND, LayerCount
from tokred.report import Report


def reports(row: Row) -> list[tuple[Report, np.ndarray, int]]:
    """(report, valid originals, prefix) of the easy plan, and of the hard one with padding."""
    config, small = even(row), odd(row).layout
    hard = run_of(row, config, plan_of(row, config, row.hard))
    report = hard(inputs_of(config), valid_of(config))[1]
    padded = np.asarray(valid_of(config))
    front = np.ones((len(padded), config.layout.prefix), bool)
    valid = np.concatenate([front, padded], 1)
    full = np.ones((len(valid), small.tokens), bool)
    easy_report = report_of(row, easy(row))[1]
    return [(easy_report, full, small.prefix), (report, valid, config.layout.prefix)]


def split(site: str) -> tuple[str, int, int]:
    """('around_mlp', 3, 3) of 'around_mlp_3'; ('around', 1, 2) of 'around_1_2', from and to;
    ('input', 0, 0) of 'input'."""
    kind, *layers = re.split(r"_(?=\d)", site)
    first, *_, last = [int(layer) for layer in layers * 2] or (0, 0)
    return kind, first, last


IN_LAYER = ("before", "around", "around_attention", "keys", "inside", "mid", "around_mlp", "after")


def when(site: str) -> tuple[int, ...]:
    """A key that sorts sites by when they act: what encloses several layers before those."""
    kind, first, last = split(site)
    if kind in ("input", "output"):
        return (-1 if kind == "input" else sys.maxsize,)
    return first, first - last, IN_LAYER.index(kind)


def check_row_is_true(row: Row) -> None:
    method = get_method(row.method)
    assert (method.learned, method.twins) == (row.learned, row.twins)
    assert ("key" in method.needs) == row.random


def check_plan_is_static(row: Row) -> None:
    plan = easy(row)
    assert hash(plan) == hash(easy(row)) and plan == easy(row)
    for _, reduction in plan.steps:
        assert dataclasses.is_dataclass(reduction)
        assert type(reduction).__dataclass_params__.frozen  # type: ignore[attr-defined]


def check_counts_as_promised(row: Row) -> None:
    for report, _, _ in reports(row):
        assert report.tokens.n == _end(report)
        for site, map_ in report.maps.items():
            kind, first, last = split(site)
            count = report.counts[first]._replace(out=report.counts[last].out)
            _fits(kind, map_.n, map_.sizes().shape[-1], count)
    assert report_of(row, easy(row))[1].tokens.n == row.left


def _fits(kind: str, n: int, k: int, count: LayerCount) -> None:
    """A map at a site of a layer with these counts."""
    if kind == "mid":
        assert (n, k) == (count.queries, count.mlp)
    elif kind == "after":
        assert (n, k) == (count.mlp, count.out)
    elif kind == "output":
        assert k <= n
    elif kind == "input":  # all of them enter the first layer, or what stands around it
        assert k in (count.queries, count.out)
    elif kind in AROUND:
        assert (n, k) == (count.out, count.mlp if kind == "around_mlp" else count.queries)
    else:
        assert k == count.queries


def check_edge_keep_one(row: Row) -> None:
    left, protected = _left(row, row.one)
    assert left == {protected + 1}


def check_edge_all_but_one(row: Row) -> None:
    left, _ = _left(row, row.but_one)
    assert left == {odd(row).layout.tokens - 1}


def _left(row: Row, options: Options) -> tuple[set[int], int]:
    """How many tokens are left at the end, or enter the layers that others skip, and how many of
    them are protected."""
    plan = plan_of(row, odd(row), options)
    logits, report = report_of(row, plan)
    assert np.isfinite(logits).all()
    if routes(plan):
        return {map_.k for map_ in report.maps.values()}, 0
    assert report.tokens.n == _end(report)
    return {report.tokens.n}, odd(row).layout.prefix


def _end(report: Report) -> int:
    """Tokens after the last layer, or after what stands behind it."""
    last = report.maps.get("output")
    return report.counts[-1].out if last is None else last.sizes().shape[-1]


def check_prefix_stays_in_place(row: Row) -> None:
    for report, _, prefix in reports(row):
        source = np.asarray(report.tokens.sources())
        np.testing.assert_array_equal(
            source[:, :prefix], np.broadcast_to(np.arange(prefix), (len(source), prefix))
        )
        assert (source[:, prefix:] >= prefix).sum() == (source[:, prefix:] >= 0).sum()


def check_sources_are_the_maps_composed(row: Row) -> None:
    """Maps around layers act inside them alone."""
    for report, valid, _ in reports(row):
        where = np.where(valid, np.arange(valid.shape[1])[None], -1)
        spans = [(len(report.counts), where)]  # that are open, and to which layer
        for site, map_ in sorted(report.maps.items(), key=lambda item: when(item[0])):
            kind, first, last = split(site)
            first = len(report.counts) if kind == "output" else first
            spans = [span for span in spans if span[0] >= first]
            where = spans[-1][1]
            step = np.take_along_axis(np.asarray(map_.source), np.maximum(where, 0), 1)
            moved = np.where(where >= 0, step, -1)
            if kind not in AROUND:
                spans[-1] = spans[-1][0], moved
            elif kind != "around_mlp" and map_.k:
                np.testing.assert_array_equal(report.sources[last], moved)
                spans.append((last, moved))
        np.testing.assert_array_equal(report.tokens.sources(), spans[0][1])


def check_sizes_count_originals(row: Row) -> None:
    for report, valid, _ in reports(row):
        here = np.asarray(report.tokens.sources()) >= 0
        sizes = np.asarray(report.tokens.sizes()).sum(-1)
        np.testing.assert_allclose(sizes, here.sum(-1), rtol=1e-5)
        if row.merges:
            np.testing.assert_array_equal(here, valid)


def check_restored_rows_are_exact(row: Row) -> None:
    for report, _, _ in reports(row):
        for map_ in report.maps.values():
            x = jax.random.normal(jax.random.key(0), (*map_.batch, map_.n, 3))
            if not map_.k:
                continue
            back, source = np.asarray(map_.restore(map_.apply(x))), np.asarray(map_.source)
            members = np.take_along_axis(np.asarray(map_.sizes()), np.maximum(source, 0), 1)
            alone = (source >= 0) & (members == 1)
            assert alone.any()
            np.testing.assert_array_equal(back[alone], np.asarray(x)[alone])
            assert (back[source < 0] == 0).all()
