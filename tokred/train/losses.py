"""What is minimised: cross entropy, what reductions add, a penalty on the cost, distillation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tokred import cost
from tokred.plan import Plan
from tokred.report import Call, Report
from tokred.train.distill import match_features, match_logits
from tokred.train.mixing import Mixing
from tokred.train.state import Arrays, Skeleton

DENSE = Plan()
NO_MIXING = Mixing()
MIX = 104_729  # folded into a step's key for the draws of mixing
UNITS = ("ratio", "giga")


def smooth_targets(
    labels: Int[Array, " B"], classes: int, *, smoothing: float = 0.0
) -> Float[Array, "B C"]:
    """One-hot rows; smoothing: share of each that is spread over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def cross_entropy(logits: Float[Array, "B C"], targets: Float[Array, "B C"]) -> Float[Array, ""]:
    """Mean over the batch."""
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
class Teacher:
    """A model to learn from; static and hashable, its arrays are handed to each step.

    logits, features: weights of the two losses, see `distill`; temperature: of the logits.
    """

    skeleton: Skeleton
    logits: float = 0.5
    features: float = 0.0
    temperature: float = 1.0

    def losses(
        self, images: Array, logits: Array, report: Report, frozen: Mapping[str, Arrays]
    ) -> dict[str, Float[Array, ""]]:
        """Distillation losses by name; frozen: {'params', 'rest'} of the teacher."""
        model = self.skeleton.merge(frozen["params"], frozen["rest"])
        theirs, seen = model(images, call=Call())
        parts = {}
        if self.logits:
            match = match_logits(logits, theirs, temperature=self.temperature)
            parts["distill_logits"] = self.logits * match
        if self.features:
            parts["distill_features"] = self.features * match_features(report.tokens, seen.tokens.x)
        return parts


@dataclass(frozen=True)
class Objective:
    """The loss of one stage; static and hashable.

    plan: the plan to train under. macs_weight: of the penalty on expected MACs, 0 for none.
    target, unit: of the penalty, see `macs_penalty`. aux_weight: of `Report.losses`. mixing: of
    images and targets. teacher: to distil from. remat: see `Call`.
    """

    plan: Plan = DENSE
    label_smoothing: float = 0.0
    macs_weight: float = 0.0
    target: float = 1.0
    unit: str = "ratio"
    aux_weight: float = 1.0
    mixing: Mixing = NO_MIXING
    teacher: Teacher | None = None
    remat: int = 0

    def __post_init__(self) -> None:
        _check_unit(self.unit, self.target)

    def __call__(
        self,
        model: Any,
        batch: Mapping[str, Array],
        key: PRNGKeyArray,
        controllers: Mapping[str, Any],
        frozen: Mapping[str, Arrays],
    ) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict[str, Any]]]:
        """(loss, (metrics of the batch, controllers after it)).

        Metrics: loss, accuracy (on the labels before mixing), macs_ratio, every part of the loss.
        """
        classes = model.config.classes
        targets = smooth_targets(batch["label"], classes, smoothing=self.label_smoothing)
        images, targets = self.mixing(jax.random.fold_in(key, MIX), batch["image"], targets)
        call = Call(states=controllers, key=key, train=True, remat=self.remat)
        logits, report = model(images, plan=self.plan, call=call)
        dense = float(cost.macs(model.config))  # more than an int32 holds
        expected = jnp.asarray(cost.expected_macs(model.config, self.plan, report), jnp.float32)
        parts = {"cross_entropy": cross_entropy(logits, targets)}
        parts |= {name: self.aux_weight * value for name, value in report.losses.items()}
        if self.macs_weight:
            parts["macs_penalty"] = macs_penalty(
                expected, dense, target=self.target, weight=self.macs_weight, unit=self.unit
            )
        if self.teacher is not None:
            parts |= self.teacher.losses(images, logits, report, frozen)
        loss = jnp.stack([*parts.values()]).sum()
        metrics = {
            "loss": loss,
            "accuracy": (logits.argmax(-1) == batch["label"]).mean(),
            "macs_ratio": expected / dense,
            **(parts if len(parts) > 1 else {}),
        }
        return loss, (metrics, {**controllers, **report.states})
