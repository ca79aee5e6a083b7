"""What is measured: accuracy, and whether the relevant patches survived."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.ops import segment_sum
from tokred.plan import Layout
from tokred.report import Report


def relevance_recall(
    sources: Sequence[Int[Array, "B S"]], relevant: Bool[Array, "B S"]
) -> Float[Array, " B"]:
    """How much of the relevant originals the layers still see, in [0, 1], per image.

    sources: per layer, the token of each original at the input of attention, -1 = gone. An
    original's credit is the share of relevant ones among the originals in its token: 1 alone, 0
    gone, diluted where merged with background. Averaged over relevant originals, then over
    layers; an image without any counts 1, nothing could be lost.
    """
    marks = relevant.astype(jnp.float32)
    total = marks.sum(-1)
    kept = jnp.stack([_credit(source, marks) for source in sources]).mean(0)
    return jnp.where(total > 0, kept / jnp.maximum(total, 1.0), 1.0)


def _credit(source: Int[Array, "B S"], marks: Float[Array, "B S"]) -> Float[Array, " B"]:
    """Summed credit: a token with r relevant of m originals gives r * r / m."""
    s = source.shape[-1]
    target = jnp.where(source < 0, s, source)
    members = segment_sum(jnp.stack([marks, jnp.ones_like(marks)], -1), target, s, axis=1)
    return (members[..., 0] ** 2 / jnp.maximum(members[..., 1], 1.0)).sum(-1)


def touched_patches(mask: Bool[Array, "B Y X"], layout: Layout) -> Bool[Array, "B S"]:
    """Which originals' patches the mask touches; the prefix never counts."""
    (rows, columns), (b, h, w) = layout.grid, mask.shape
    cells = mask.reshape(b, rows, h // rows, columns, w // columns).any((2, 4))
    return jnp.pad(cells.reshape(b, -1), ((0, 0), (layout.prefix, 0)))


def batch_sums(
    logits: Float[Array, "B C"],
    sources: Sequence[Int[Array, "B S"]],
    batch: Mapping[str, Array],
    layout: Layout,
) -> dict[str, Float[Array, ""]]:
    """'count', 'correct' and, where the batch has a 'mask', 'recall', summed over valid rows."""
    valid = batch.get("valid", jnp.ones(len(logits), bool)).astype(jnp.float32)
    sums = {
        "count": valid.sum(),
        "correct": (valid * (logits.argmax(-1) == batch["label"])).sum(),
    }
    if "mask" in batch:
        recall = relevance_recall(sources, touched_patches(batch["mask"], layout))
        sums["recall"] = (valid * recall).sum()
    return sums


def told(report: Report) -> dict[str, Array]:
    """The mean over sites of what reductions tell of how many tokens they leave."""
    names = ("share", "overflow", "padding", "coefficient")
    found = {n: [aux[n] for aux in report.aux.values() if n in aux] for n in names}
    return {
        name: jnp.stack([jnp.mean(v.astype(jnp.float32)) for v in values]).mean()
        for name, values in found.items()
        if values
    }
