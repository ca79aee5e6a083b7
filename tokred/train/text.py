"""What is minimised and measured on text: the next token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tokred.plan import Layout
from tokred.report import Call, Report
from tokred.train.losses import Batch, Objective, Parts


class Sequences(NamedTuple):
    """What a decoder reads of a batch: position -1 is padding, document may be None."""

    ids: Int[Array, "B N"]
    valid: Any
    position: Int[Array, "B N"]
    document: Any


def next_token_loss(
    logits: Float[Array, "B N V"], target: Int[Array, "B N"]
) -> Float[Array, "B N"]:
    """Cross entropy of every token in nats. Gradient: to logits."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, target)


@dataclass(frozen=True)
class TokenObjective(Objective):
    """What models that write tokens share: 'target' and 'weight' [B M], the mean over weighted
    targets. Inputs hold the `ids` that are read."""

    def prepare(
        self, model: Any, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Any, tuple[Array, Array]]:
        return self.inputs(batch), (batch["target"], batch["weight"])

    def fit(self, logits: Array, targets: tuple[Array, Array]) -> Float[Array, ""]:
        target, weight = targets
        loss = next_token_loss(logits, target) * weight
        return loss.sum() / jnp.maximum(weight.sum(), 1.0)

    def tokens(self, inputs: Any) -> int:
        return inputs.ids.shape[1]


def count_targets(logits: Float[Array, "B M V"], batch: Batch) -> tuple[Parts, Array, Array]:
    """(sums 'count', 'correct' and 'loss' over weighted targets, which are right [B M], valid rows
    [B])."""
    rows = batch.get("valid", jnp.ones(len(logits), bool))
    weight, right = batch["weight"] * rows[:, None], logits.argmax(-1) == batch["target"]
    sums = {
        "count": weight.sum(),
        "correct": (weight * right).sum(),
        "loss": (weight * next_token_loss(logits, batch["target"])).sum(),
    }
    return sums, right, rows


@dataclass(frozen=True)
class TextObjective(TokenObjective):
    """Next tokens: 'input', 'target', 'weight', 'position', 'document' [B N], see `data.packing`.

    padded: rows may end in padding; documents: rows may hold several documents. Static, so that
    what is not needed costs nothing. Reductions find the position as extra 'generated'.
    """

    padded: bool = False
    documents: bool = True

    fields: ClassVar[tuple[str, ...]] = ("input", "target", "weight", "position", "document")

    def inputs(self, batch: Batch) -> Sequences:
        position = batch["position"]
        valid = position >= 0 if self.padded else None
        document = batch["document"] if self.documents else None
        return Sequences(batch["input"], valid, position, document)

    def run(self, model: Any, inputs: Sequences, call: Call) -> tuple[Array, Report]:
        return model(
            inputs.ids,
            plan=self.plan,
            call=call,
            valid=inputs.valid,
            position=inputs.position,
            document=inputs.document,
            ordered=True,  # as `data.packing` lays documents
            extra={"generated": inputs.position},
        )

    def sums(self, logits: Array, report: Report, batch: Batch, layout: Layout) -> Parts:
        sums, _, _ = count_targets(logits, batch)
        agree = [aux["agreement"] for aux in report.aux.values() if "agreement" in aux]
        return sums | ({"agreement": sums["count"] * jnp.stack(agree).mean()} if agree else {})

    def scores(self, share: Mapping[str, float]) -> dict[str, float | None]:
        """loss in nats per token; agreement: of gates with the choice they were trained on."""
        agreement = share.get("agreement")
        return {"accuracy": share["correct"], "loss": share["loss"], "agreement": agreement}


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """From nats per token."""
    return loss / math.log(2) / bytes_per_token
