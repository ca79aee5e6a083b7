"""What is minimised and measured of an encoder-decoder: the next token of the target."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from tokred.plan import Layout
from tokred.report import Call, Report
from tokred.train.losses import Batch, Parts
from tokred.train.metrics import told
from tokred.train.text import TokenObjective, count_targets


class Pairs(NamedTuple):
    """What an encoder-decoder reads of a batch; valid, of the source, may be None."""

    ids: Int[Array, "B N"]
    valid: Any
    target: Int[Array, "B M"]


@dataclass(frozen=True)
class Seq2SeqObjective(TokenObjective):
    """Pairs of a source and a target, see `data.pairs`.

    padded: sources may end in padding; static, so that what is not needed costs nothing.
    """

    padded: bool = True

    fields: ClassVar[tuple[str, ...]] = (
        "input", "input_valid", "decoder_input", "target", "weight",
    )  # fmt: skip

    def inputs(self, batch: Batch) -> Pairs:
        valid = batch["input_valid"] if self.padded else None
        return Pairs(batch["input"], valid, batch["decoder_input"])

    def run(self, model: Any, inputs: Pairs, call: Call) -> tuple[Array, Report]:
        return model(inputs.ids, inputs.target, plan=self.plan, call=call, valid=inputs.valid)

    def sums(self, logits: Array, report: Report, batch: Batch, layout: Layout) -> Parts:
        sums, right, rows = count_targets(logits, batch)
        whole = (right | (batch["weight"] == 0)).all(-1) & rows
        sums["exact"] = sums["count"] * whole.sum() / jnp.maximum(rows.sum(), 1)
        read = told(report.parts[""]).items()
        return sums | {name: sums["count"] * value for name, value in read}

    def scores(self, share: Mapping[str, float]) -> dict[str, float | None]:
        """loss in nats per token; exact: share of targets that are right as a whole; deletion_rate,
        overflow (tokens of an example that found no slot) and padding (share of slots without a
        token), of reductions that tell; means over batches."""
        kept = share.get("share")
        return {
            "accuracy": share["correct"],
            "loss": share["loss"],
            "exact": share["exact"],
            "deletion_rate": None if kept is None else 1 - kept,
            "overflow": share.get("overflow"),
            "padding": share.get("padding"),
        }
