"""What is minimised: cross entropy, what reductions add, a penalty on the cost, distillation."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokred import cost
from tokred.nn.skeleton import Arrays, Skeleton
from tokred.plan import Layout, Plan
from tokred.report import Call, Report
from tokred.train.distill import match_features, match_logits
from tokred.train.metrics import batch_sums, told
from tokred.train.mixing import Mixing
from tokred.train.varied import Varied

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


Parts = dict[str, Float[Array, ""]]
Batch = Mapping[str, Array]


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
        self, objective: "Objective", inputs: Any, logits: Array, report: Report, frozen: Any
    ) -> Parts:
        """Distillation losses by name; frozen: {'params', 'rest'} of the teacher."""
        model = self.skeleton.merge(frozen["params"], frozen["rest"])
        theirs, seen = dataclasses.replace(objective, plan=DENSE).run(model, inputs, Call())
        parts = {}
        if self.logits:
            match = match_logits(logits, theirs, temperature=self.temperature)
            parts["distill_logits"] = self.logits * match
        if self.features:
            parts["distill_features"] = self.features * match_features(report.tokens, seen.tokens.x)
        return parts


@dataclass(frozen=True)
class Objective:
    """The loss of one stage; static and hashable. A kind of task defines what stands below it.

    plan: the plan to train under. macs_weight: of the penalty on expected MACs, 0 for none.
    target, unit: of the penalty, see `macs_penalty`. aux_weight: of `Report.losses`. teacher: to
    learn from beside the labels. remat: how many layers compute their activations again. varied:
    plans that take turns in training instead of `plan`.
    """

    plan: Plan = DENSE
    macs_weight: float = 0.0
    target: float = 1.0
    unit: str = "ratio"
    aux_weight: float = 1.0
    teacher: Teacher | None = None
    remat: int = 0
    varied: Varied | None = None

    fields: ClassVar[tuple[str, ...]] = ()  # of a batch, that go to the device
    checked: ClassVar[tuple[str, ...]] = ()  # of those, floats that must be finite

    def __post_init__(self) -> None:
        _check_unit(self.unit, self.target)

    def prepare(self, model: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Any, Any]:
        """(inputs of the model, targets); key: of draws."""
        raise NotImplementedError

    def inputs(self, batch: Batch) -> Any:
        """The inputs of the model without any draw."""
        raise NotImplementedError

    def run(self, model: Any, inputs: Any, call: Call) -> tuple[Array, Report]:
        """The model on its inputs, under the plan."""
        raise NotImplementedError

    def fit(self, logits: Array, targets: Any) -> Float[Array, ""]:
        """The loss on the targets."""
        raise NotImplementedError

    def sums(self, logits: Array, report: Report, batch: Batch, layout: Layout) -> Parts:
        """What evaluation counts over a batch: 'count', 'correct' and more, sums over valid ones;
        `scores` makes them results."""
        raise NotImplementedError

    def scores(self, share: Mapping[str, float]) -> dict[str, float | None]:
        """Results from the sums over their count."""
        raise NotImplementedError

    def tokens(self, inputs: Any) -> int | None:
        """How many tokens an example has, where the model's config does not say."""
        return None

    def finite(self, batch: Batch) -> Bool[Array, ""]:
        """Whether what was fed is finite."""
        return jnp.stack([jnp.isfinite(batch[f]).all() for f in self.checked] or [True]).all()

    def __call__(
        self,
        model: Any,
        batch: Batch,
        key: PRNGKeyArray,
        controllers: Mapping[str, Any],
        frozen: Mapping[str, Arrays],
    ) -> tuple[Float[Array, ""], tuple[Parts, dict[str, Any]]]:
        """(loss, (metrics of the batch, controllers after it)) under `plan`.

        Metrics: loss, accuracy (on the labels before mixing), macs_ratio, every part of the loss,
        what reductions tell of their counts.
        """
        inputs, targets = self.prepare(model, batch, jax.random.fold_in(key, MIX))
        call = Call(states=controllers, key=key, train=True, remat=self.remat)
        logits, report = self.run(model, inputs, call)
        tokens = self.tokens(inputs)
        dense = float(cost.macs(model.config, tokens=tokens))  # more than an int32 holds
        expected = cost.expected_macs(model.config, self.plan, report, tokens=tokens)
        expected = jnp.asarray(expected, jnp.float32)
        parts = {"cross_entropy": self.fit(logits, targets)}
        parts |= {name: self.aux_weight * value for name, value in report.losses.items()}
        if self.macs_weight:
            parts["macs_penalty"] = macs_penalty(
                expected, dense, target=self.target, weight=self.macs_weight, unit=self.unit
            )
        if self.teacher is not None:
            parts |= self.teacher.losses(self, inputs, logits, report, frozen)
        loss = jnp.stack([*parts.values()]).sum()
        seen = self.sums(logits, report, batch, model.config.layout)
        metrics = {
            "loss": loss,
            "accuracy": seen["correct"] / jnp.maximum(seen["count"], 1e-6),
            "macs_ratio": expected / dense,
            **(parts if len(parts) > 1 else {}),
            **told(report),
        }
        return loss, (metrics, {**controllers, **report.states})


@dataclass(frozen=True)
class ImageObjective(Objective):
    """Classes of images: 'image' [B Y X C] and 'label' [B].

    label_smoothing, mixing: of the targets, see `smooth_targets` and `Mixing`.
    """

    label_smoothing: float = 0.0
    mixing: Mixing = NO_MIXING

    fields: ClassVar[tuple[str, ...]] = ("image", "label")
    checked: ClassVar[tuple[str, ...]] = ("image",)

    def prepare(self, model: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Array, Array]:
        classes = model.config.classes
        targets = smooth_targets(batch["label"], classes, smoothing=self.label_smoothing)
        return self.mixing(key, batch["image"], targets)

    def inputs(self, batch: Batch) -> Array:
        return batch["image"]

    def run(self, model: Any, inputs: Array, call: Call) -> tuple[Array, Report]:
        return model(inputs, plan=self.plan, call=call)

    def fit(self, logits: Array, targets: Array) -> Float[Array, ""]:
        return cross_entropy(logits, targets)

    def sums(self, logits: Array, report: Report, batch: Batch, layout: Layout) -> Parts:
        return batch_sums(logits, report.sources, batch, layout)

    def scores(self, share: Mapping[str, float]) -> dict[str, float | None]:
        return {"accuracy": share["correct"], "recall": share.get("recall")}
