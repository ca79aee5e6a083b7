"""A model that marks what photographs show: its heatmaps and its tokens under reductions."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from tokred.cost import macs
from tokred.fidelity.agreement import correlation, cosine, overlap
from tokred.fidelity.choose import Candidate, at_macs, candidates, choose_methods
from tokred.fidelity.times import side_by_side
from tokred.models import DenseViT
from tokred.plan import Plan
from tokred.report import Call

Row = dict[str, Any]
BASELINES = ("random", "uniform", "pooling")
FIELDS = (
    "correlation", "iou", "cosine", "encoder_ratio", "macs_ratio", "ms", "ms_low", "ms_high",
    "ms_ratio",
)  # fmt: skip
THRESHOLD = 0.5  # of a heatmap, where IoU is counted


def compare_heatmaps(
    model: DenseViT,
    images: Float[np.ndarray, "B Y X C"],
    methods: Sequence[str],
    budgets: Sequence[float],
    *,
    rounds: int = 5,
) -> list[Row]:
    """One row per method and budget, the dense model first.

    images: as the model takes them. budgets: shares of the encoder's MACs; what stands behind it
    runs on the whole grid in any case, so that `macs_ratio`, of the whole model, is higher.
    Row: method, budget, why (it is out of reach, the rest is None then), correlation and iou (at
    `THRESHOLD`) of heatmaps with the dense ones, cosine of patch tokens once they are back in
    place, encoder_ratio, macs_ratio, ms (of one image), ms_low, ms_high, ms_ratio.

    Raises:
      ValueError: methods or budgets that do not fit.
    """
    config = model.config
    names = choose_methods(model, methods, BASELINES)
    found = candidates(lambda name, b: at_macs(config.vision, name, b), names, budgets)
    measured = side_by_side(model, found, see, images, _agree, rounds)
    return [_row(config, c) | measured.get(c, {}) for c in found]


def see(
    model: DenseViT, images: Array, *, plan: Plan, call: Call
) -> tuple[Float[Array, "B Y X"], Float[Array, "B H W D"]]:
    """Heatmaps in [0, 1], and the features of every patch."""
    grid, _ = model.features(images, plan=plan, call=call)
    return jax.nn.sigmoid(model.logits(grid)[..., 0]), grid


def _agree(seen: tuple[np.ndarray, ...], dense: tuple[np.ndarray, ...]) -> Row:
    return {
        "correlation": correlation(seen[0], dense[0]),
        "iou": overlap(seen[0], dense[0], THRESHOLD),
        "cosine": cosine(seen[1], dense[1]),
    }


def _row(config: Any, found: Candidate) -> Row:
    row = {**found.about, **dict.fromkeys(FIELDS)}
    plan = found.plan
    if plan is None:
        return row
    share = lambda part: macs(part, plan) / macs(part)  # noqa: E731
    return row | {"encoder_ratio": share(config.vision), "macs_ratio": share(config)}
