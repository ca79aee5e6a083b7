"""What holds of images alone."""

import jax.numpy as jnp
import numpy as np

from tests.conformance.models import BATCH
from tests.conformance.setting import even, inputs_of, plan_of, run_of, valid_of
from tests.methods_table import Row


def check_invalid_patches_are_not_seen(row: Row) -> None:
    config = even(row)
    run = run_of(row, config, plan_of(row, config, row.hard))
    valid, images = valid_of(config), inputs_of(config)
    pixels = valid.reshape(BATCH, *config.grid).repeat(4, 1).repeat(4, 2)[..., None]
    other = jnp.where(pixels, images, 100 * inputs_of(config, seed=6))
    np.testing.assert_array_equal(run(other, valid)[0], run(images, valid)[0])
