"""What is minimised: cross entropy, what reductions add, and a penalty on the cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tokred import cost
from tokred.plan import Call, Plan

DENSE = Plan()
UNITS = ("ratio", "giga")


def cross_entropy(
    logits: Float[Array, "B C"], labels: Int[Array, " B"], *, smoothing: float = 0.0
) -> Float[Array, ""]:
    """Mean over the batch; smoothing: share of the target that is spread over all classes."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def macs_penalty(
    expected: Float[Array, ""] | float,
    dense: float,
    *,
    target: float,
    weight: float = 1.0,
    unit: str = "ratio",
) -> Float[Array, ""]:
    """weight * (cost - target)^2.

    expected, dense: MACs of one image. unit: 'ratio', target is a share of dense in (0, 1];
    'giga', target is in 10^9 MACs (DiffRate's own form).
    """
    _check_unit(unit, target)
    scale = dense if unit == "ratio" else 1e9
    return weight * jnp.square(jnp.asarray(expected) / scale - target)


def _check_unit(unit: str, target: float) -> None:
    if unit not in UNITS:
        raise ValueError(f"loss.unit={unit!r} must be one of {UNITS}; change it.")
    if not (target > 0 and (unit == "giga" or target <= 1)):
        raise ValueError(
            f"loss.target={target} must be positive, and at most 1 for unit='ratio'; change it."
        )


@dataclass(frozen=True)
class Objective:
    """The loss of one stage; static and hashable.

    plan: the plan to train under. macs_weight: of the penalty on expected MACs, 0 for none.
    target, unit: of the penalty, see `macs_penalty`. aux_weight: of `Report.losses`.
    """

    plan: Plan = DENSE
    label_smoothing: float = 0.0
    macs_weight: float = 0.0
    target: float = 1.0
    unit: str = "ratio"
    aux_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_unit(self.unit, self.target)

    def __call__(
        self, model: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """(loss, metrics of the batch: loss, accuracy, macs_ratio and every part of the loss)."""
        logits, report = model(batch["image"], plan=self.plan, call=Call(key=key, train=True))
        dense = cost.macs(model.config)
        expected = jnp.asarray(cost.expected_macs(model.config, self.plan, report), jnp.float32)
        labels, smoothing = batch["label"], self.label_smoothing
        parts = {"cross_entropy": cross_entropy(logits, labels, smoothing=smoothing)}
        parts |= {name: self.aux_weight * value for name, value in report.losses.items()}
        if self.macs_weight:
            parts["macs_penalty"] = macs_penalty(
                expected, dense, target=self.target, weight=self.macs_weight, unit=self.unit
            )
        loss = jnp.stack([*parts.values()]).sum()
        accuracy = (logits.argmax(-1) == labels).mean()
        return loss, {
            "loss": loss,
            "accuracy": accuracy,
            "macs_ratio": expected / dense,
            **(parts if len(parts) > 1 else {}),
        }
