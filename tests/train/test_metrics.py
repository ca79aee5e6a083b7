"""Relevance recall on an example made by hand, and sums over valid rows."""

import jax
import jax.numpy as jnp
import numpy as np

from tokred.plan import Layout
from tokred.train.metrics import batch_sums, relevance_recall, touched_patches

LAYOUT = Layout(depth=1, tokens=5, prefix=1, grid=(2, 2), class_token=True, width=8, heads=1)
RELEVANT = jnp.array([[False, True, True, False, False]])


def test_recall_counts_alone_merged_diluted_and_gone():
    alone = jnp.array([[0, 1, 2, 3, 4]])
    together = jnp.array([[0, 1, 1, 2, 3]])  # relevant with relevant: full credit
    diluted = jnp.array([[0, 1, 2, 2, 2]])  # 1, and a third for the second
    gone = jnp.array([[0, -1, 1, -1, -1]])
    recall = jax.jit(relevance_recall)
    for source, expected in ((alone, 1), (together, 1), (diluted, 2 / 3), (gone, 0.5)):
        np.testing.assert_allclose(recall([source], RELEVANT), [expected], rtol=1e-6)
    np.testing.assert_allclose(recall([alone, gone], RELEVANT), [0.75], rtol=1e-6)


def test_an_image_without_relevant_patches_loses_nothing():
    gone = jnp.array([[0, -1, -1, -1, -1]])
    np.testing.assert_array_equal(relevance_recall([gone], jnp.zeros((1, 5), bool)), [1.0])


def test_a_mask_touches_patches_and_never_the_prefix():
    mask = jnp.zeros((1, 4, 4), bool).at[0, 1, 1].set(True).at[0, 2, 3].set(True)
    expected = [[False, True, False, False, True]]
    np.testing.assert_array_equal(touched_patches(mask, LAYOUT), expected)


def test_sums_leave_out_rows_that_only_fill_up():
    logits = jnp.eye(3)
    batch = {"label": jnp.array([0, 0, 2]), "valid": jnp.array([True, True, False])}
    sums = batch_sums(logits, [jnp.zeros((3, 5), jnp.int32)], batch, LAYOUT)
    assert (float(sums["count"]), float(sums["correct"])) == (2.0, 1.0)
    assert "recall" not in sums
