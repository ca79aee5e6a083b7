"""What must not matter: other examples, padding, compilation, scanning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.conformance.setting import (
    BATCH,
    DENSE,
    EVEN,
    ODD,
    easy,
    easy_report,
    first_reduction,
    images_of,
    layout_of,
    plan_of,
    reduce_tokens,
    run_of,
    tokens_of,
    valid_of,
)
from tests.methods_table import Row


def check_nothing_removed_is_identity(row: Row) -> None:
    """Bit for bit."""
    logits, report = easy_report(plan_of(row, ODD, row.nothing))
    assert not report.maps
    np.testing.assert_array_equal(logits, easy_report(DENSE)[0])


def check_one_compile_for_two_batches(row: Row) -> None:
    run = run_of(ODD, easy(row))
    run(images_of(ODD))
    run(images_of(ODD, seed=5))
    assert run.traces == 1


def check_permuted_batch_permutes_result(row: Row) -> None:
    order = np.random.default_rng(0).permutation(BATCH)
    logits, report = easy_report(easy(row))
    again, permuted = run_of(ODD, easy(row))(images_of(ODD)[order])
    np.testing.assert_allclose(again, logits[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(permuted.tokens.sources(), report.tokens.sources()[order])


def check_jit_is_no_jit(row: Row) -> None:
    reduction = first_reduction(row, layout_of((4, 4)))
    tokens = tokens_of(17, 1)
    plain, plain_map = reduce_tokens(reduction, tokens)
    jitted, map_ = jax.jit(lambda t: reduce_tokens(reduction, t))(tokens)
    np.testing.assert_array_equal(plain_map.source, map_.source)
    np.testing.assert_allclose(plain.x, jitted.x, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(jitted.x[:, :1], tokens.x[:, :1])


def check_padding_changes_nothing(row: Row) -> None:
    """17 tokens and 8 padded rows against the 17 tokens alone, then with prefix 3."""
    for prefix in (1, 3):
        n = 16 + prefix
        short, short_map = reduce_tokens(
            first_reduction(row, layout_of((4, 4), prefix)), tokens_of(n, prefix)
        )
        padded = first_reduction(row, layout_of((6, 4), prefix))
        out, map_ = reduce_tokens(padded, tokens_of(n, prefix, padded=8))
        for i in range(2):
            alive = np.asarray(out.valid[i])
            np.testing.assert_allclose(out.x[i][alive], short.x[i], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(out.sizes()[i][alive], short.sizes()[i], rtol=1e-5)
        gone = np.asarray(map_.source[:, :n]) < 0
        np.testing.assert_array_equal(gone, np.asarray(short_map.source) < 0)
        assert (np.asarray(out.sources())[:, n:] == -1).all()


def check_invalid_patches_are_not_seen(row: Row) -> None:
    run = run_of(EVEN, plan_of(row, EVEN, row.hard))
    valid, images = valid_of(EVEN), images_of(EVEN)
    pixels = valid.reshape(BATCH, *EVEN.grid).repeat(4, 1).repeat(4, 2)[..., None]
    other = jnp.where(pixels, images, 100 * images_of(EVEN, seed=6))
    np.testing.assert_array_equal(run(other, valid)[0], run(images, valid)[0])


def check_nothing_valid_is_finite(row: Row) -> None:
    run = run_of(EVEN, plan_of(row, EVEN, row.hard))
    logits, report = run(images_of(EVEN), jnp.zeros_like(valid_of(EVEN)))
    assert np.isfinite(logits).all() and np.isfinite(report.tokens.x).all()


def check_scan_on_is_scan_off(row: Row) -> None:
    plan = plan_of(row, EVEN, row.hard)
    scanned = run_of(dataclasses.replace(EVEN, scan=True), plan)
    args = images_of(EVEN), valid_of(EVEN)
    np.testing.assert_allclose(
        scanned(*args)[0], run_of(EVEN, plan)(*args)[0], rtol=1e-4, atol=1e-5
    )
