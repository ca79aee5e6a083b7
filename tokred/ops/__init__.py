"""The hardware layer: every operation has `implementation=` and a plain reference.

None picks the measured best for the platform; a name that a platform cannot run raises.
"""

from tokred.ops.attention import (
    attention,
    attention_column_mean,
    attention_probs,
    attention_rows,
    cached_attention,
    cached_probs,
    position_mask,
    softmax,
    weighted_values,
)
from tokred.ops.dispatch import Choice, prefer, watch_choices
from tokred.ops.gather import gather, put
from tokred.ops.segment import segment_max, segment_sum
from tokred.ops.topk import top_k

__all__ = [
    "Choice",
    "attention",
    "attention_column_mean",
    "attention_probs",
    "attention_rows",
    "cached_attention",
    "cached_probs",
    "gather",
    "position_mask",
    "prefer",
    "put",
    "segment_max",
    "segment_sum",
    "softmax",
    "top_k",
    "watch_choices",
    "weighted_values",
]
