"""What is minimised and measured of a vision-language model: the answers to questions on images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.data.grid_questions import evidence_patches
from tokred.plan import Layout
from tokred.report import Call, Report
from tokred.train.losses import Batch, Parts
from tokred.train.metrics import relevance_recall, told
from tokred.train.text import TokenObjective, count_targets

HALVES = ("top", "bottom")


class Talk(NamedTuple):
    """What a vision-language model reads of a batch."""

    ids: Int[Array, "B N"]
    images: Float[Array, "B I Y X C"]
    valid: Bool[Array, "B N"]
    image_valid: Bool[Array, "B I"]
    question: Bool[Array, "B N"]


@dataclass(frozen=True)
class TalkObjective(TokenObjective):
    """Answers, see `data.conversations`. kinds: names of what a batch's 'kind' numbers, if it has
    one."""

    kinds: tuple[str, ...] = ()

    fields: ClassVar[tuple[str, ...]] = (
        "input", "image", "target", "weight", "input_valid", "image_valid", "question",
    )  # fmt: skip
    checked: ClassVar[tuple[str, ...]] = ("image",)

    def inputs(self, batch: Batch) -> Talk:
        names = ("input", "image", "input_valid", "image_valid", "question")
        return Talk(*(batch[name] for name in names))

    def run(self, model: Any, inputs: Talk, call: Call) -> tuple[Array, Report]:
        return model(
            inputs.ids,
            inputs.images,
            plan=self.plan,
            call=call,
            valid=inputs.valid,
            image_valid=inputs.image_valid,
            question=inputs.question,
        )

    def sums(self, logits: Array, report: Report, batch: Batch, layout: Layout) -> Parts:
        """What `count_targets` gives, and over examples: 'examples', those whose whole answer is
        'exact', both for every group of `_groups`, and 'recall' where evidence is known."""
        sums, right, rows = count_targets(logits, batch)
        whole = (right | (batch["weight"] == 0)).all(-1) & rows
        sums |= {"examples": rows.sum() * 1.0, "exact": whole.sum() * 1.0}
        for name, group in self._groups(batch).items():
            mine = group & rows
            sums |= {f"asked_{name}": mine.sum() * 1.0, f"exact_{name}": (mine & whole).sum() * 1.0}
        if "evidence" in batch:
            sums["recall"] = (_recall(report, batch["evidence"], layout) * rows).sum()
        return sums | {name: sums["count"] * value for name, value in told(report).items()}

    def scores(self, share: Mapping[str, float]) -> dict[str, float | None]:
        """accuracy: of tokens of answers · exact: of whole answers, also by kind and by where
        in the image the evidence lies · loss: nats per token · recall: of the evidence, what
        reaches the decoder."""
        per_example = lambda name: share[name] / share["examples"] if name in share else None  # noqa: E731
        groups = {
            f"exact_{name}": share[f"exact_{name}"] / share[f"asked_{name}"]
            for name in (*self.kinds, *HALVES)
            if share.get(f"asked_{name}")
        }
        return {
            "accuracy": share["correct"],
            "loss": share["loss"],
            "exact": per_example("exact"),
            "recall": per_example("recall"),
            **groups,
        }

    def _groups(self, batch: Batch) -> dict[str, Bool[Array, " B"]]:
        """Examples by kind of question, and those whose evidence lies in one half of the image
        alone: what reads the image's end better than its beginning is biased (FEATHER 2024)."""
        groups = {}
        if "kind" in batch:
            groups = {name: batch["kind"] == number for number, name in enumerate(self.kinds)}
        if "evidence" in batch:
            halves = jnp.array_split(batch["evidence"].any(1), 2, axis=1)
            upper, lower = (half.any((1, 2)) for half in halves)
            groups |= dict(zip(HALVES, (upper & ~lower, lower & ~upper), strict=True))
        return groups


def _recall(
    report: Report, evidence: Bool[Array, "B I rows cols"], layout: Layout
) -> Float[Array, " B"]:
    """How much of the patches with evidence the vision model lets out, see `relevance_recall`."""
    patches = evidence_patches(evidence, layout.grid)
    patches = jnp.pad(patches.reshape(-1, patches.shape[-1]), ((0, 0), (layout.prefix, 0)))
    source = report.parts["vision"].tokens.sources()
    found = relevance_recall([source], patches).reshape(evidence.shape[:2])
    shown = evidence.any((-2, -1))
    return (found * shown).sum(-1) / jnp.maximum(shown.sum(-1), 1)
