"""Counts, maps, sources and sizes: what the schedule promises is what happens."""

import dataclasses

import jax
import numpy as np

from tests.conformance.setting import (
    EVEN,
    ODD,
    easy,
    easy_report,
    images_of,
    plan_of,
    run_of,
    valid_of,
)
from tests.methods_table import Row
from tokred.methods import get_method
from tokred.report import Report


def reports(row: Row) -> list[tuple[Report, np.ndarray, int]]:
    """(report, valid originals, prefix) of the easy plan, and of the hard one with padding."""
    hard = run_of(EVEN, plan_of(row, EVEN, row.hard))(images_of(EVEN), valid_of(EVEN))[1]
    front = np.ones((len(valid_of(EVEN)), 3), bool)
    valid = np.concatenate([front, np.asarray(valid_of(EVEN))], 1)
    return [(easy_report(easy(row))[1], np.ones((len(valid), 16), bool), 1), (hard, valid, 3)]


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
        assert report.tokens.n == report.counts[-1].out
        for site, map_ in report.maps.items():
            k = map_.sizes().shape[-1]
            kind, _, layer = site.rpartition("_")
            if kind == "mid":
                assert (map_.n, k) == (
                    report.counts[int(layer)].queries,
                    report.counts[int(layer)].mlp,
                )
            else:
                assert k == report.counts[int(layer) if kind else 0].queries
    assert easy_report(easy(row))[1].tokens.n == row.left


def check_edge_keep_one(row: Row) -> None:
    _leaves(row, row.one, 2)


def check_edge_all_but_one(row: Row) -> None:
    _leaves(row, row.but_one, 15)


def _leaves(row: Row, options, count: int) -> None:
    logits, report = run_of(ODD, plan_of(row, ODD, options))(images_of(ODD))
    assert report.tokens.n == report.counts[-1].out == count
    assert np.isfinite(logits).all()


def check_prefix_stays_in_place(row: Row) -> None:
    for report, _, prefix in reports(row):
        source = np.asarray(report.tokens.sources())
        np.testing.assert_array_equal(source[:, :prefix], [range(prefix)] * len(source))
        assert (source[:, prefix:] >= prefix).sum() == (source[:, prefix:] >= 0).sum()


def check_sources_are_the_maps_composed(row: Row) -> None:
    for report, valid, _ in reports(row):
        where = np.where(valid, np.arange(valid.shape[1])[None], -1)
        for map_ in report.maps.values():
            step = np.take_along_axis(np.asarray(map_.source), np.maximum(where, 0), 1)
            where = np.where(where >= 0, step, -1)
        np.testing.assert_array_equal(report.tokens.sources(), where)


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
            back, source = np.asarray(map_.restore(map_.apply(x))), np.asarray(map_.source)
            members = np.take_along_axis(np.asarray(map_.sizes()), np.maximum(source, 0), 1)
            alone = (source >= 0) & (members == 1)
            assert alone.any()
            np.testing.assert_array_equal(back[alone], np.asarray(x)[alone])
            assert (back[source < 0] == 0).all()
