"""Adapters of span corruption, the objective of byte-level encoder-decoders: MrT5."""

from typing import Any

import numpy as np

from tests.golden_adapters.case import Adapter, Case
from tokred.data.pairs import shift_right
from tokred.data.span_corruption import draw_mask, replace_spans, span_lengths
from tokred.data.tokenizers import END


def span_corruption(case: Case) -> dict[str, Any]:
    """The masks are drawn anew from the stored seed, and must be the stored ones."""
    s, ids = case.settings, case.inputs["raw_ids"]
    how = {"density": s["noise_density"], "mean_span": s["mean_span"]}
    raw, targets = span_lengths(s["input_length"], *how.values())
    rng = np.random.default_rng(s["np_seed"])
    masks = np.stack([draw_mask(ids.shape[1], **how, rng=rng) for _ in ids])
    if not np.array_equal(masks, case.inputs["noise_mask"]):
        raise ValueError("masks drawn from np_seed must be noise_mask")
    rows = lambda masks: np.stack(  # noqa: E731
        [
            np.append(replace_spans(row, mask, first_sentinel=s["first_sentinel"]), END)
            for row, mask in zip(ids, masks, strict=True)
        ]
    )
    labels = rows(~masks)
    return {
        "input_ids": rows(masks),
        "labels": labels,
        "decoder_input_ids": shift_right(labels),
        "tokens_length": raw,
        "targets_length": targets,
    }


def lengths(case: Case) -> dict[str, Any]:
    table = case.inputs["table"].tolist()
    rows = [span_lengths(int(n), density, span) for n, density, span in table]
    return {"tokens_targets": np.array(rows)}


SPANS = {
    "mrt5__span_corruption": Adapter(span_corruption, jit=False),
    "mrt5__span_lengths": Adapter(lengths, jit=False),
}
