"""What must not matter: other examples, compilation, scanning, padding that is all there is."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tests.conformance.setting import (
    DENSE,
    easy,
    even,
    inputs_of,
    odd,
    plan_of,
    report_of,
    run_of,
    valid_of,
)
from tests.methods_table import Row


def check_nothing_removed_is_identity(row: Row) -> None:
    """Bit for bit."""
    logits, report = report_of(row, plan_of(row, odd(row), row.nothing))
    assert not report.maps
    np.testing.assert_array_equal(logits, report_of(row, DENSE)[0])


def check_one_compile_for_two_batches(row: Row) -> None:
    run = run_of(row, odd(row), easy(row))
    before = run.traces  # of other checks
    run(inputs_of(odd(row)))
    run(inputs_of(odd(row), seed=5))
    assert run.traces <= before + 1


def check_permuted_batch_permutes_result(row: Row) -> None:
    order = np.array([4, 1, 6, 7, 0, 5, 2, 3])  # to places where prompts are as long
    logits, report = report_of(row, easy(row))
    again, permuted = run_of(row, odd(row), easy(row))(inputs_of(odd(row))[order])
    np.testing.assert_allclose(again, logits[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(permuted.tokens.sources(), report.tokens.sources()[order])
    for site, map_ in permuted.maps.items():
        np.testing.assert_array_equal(map_.source, report.maps[site].source[order])


def check_nothing_valid_is_finite(row: Row) -> None:
    config = even(row)
    run = run_of(row, config, plan_of(row, config, row.hard))
    logits, report = run(inputs_of(config), jnp.zeros_like(valid_of(config)))
    assert np.isfinite(logits).all() and np.isfinite(report.tokens.x).all()


def check_scan_on_is_scan_off(row: Row) -> None:
    config = even(row)
    plan = plan_of(row, config, row.hard)
    scanned = run_of(row, dataclasses.replace(config, scan=True), plan)
    args = inputs_of(config), valid_of(config)
    plain = run_of(row, config, plan)
    np.testing.assert_allclose(scanned(*args)[0], plain(*args)[0], rtol=1e-4, atol=1e-5)
