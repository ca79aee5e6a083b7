"""Key-value caches: their slots, and what entries are worth, cost and weigh."""

from tokred.cache.attended import (
    expect_queries,
    group_heads,
    pool_scores,
    query_statistics,
    score_by_expectation,
    score_by_last,
    score_by_received,
    score_by_window,
)
from tokred.cache.budgets import fold_middle, keep_pooled, pyramid_budgets
from tokred.cache.eviction import Eviction
from tokred.cache.heads import HeadScores, choose_heads, score_heads
from tokred.cache.pool import append_to_pool, join_pools, pool_heads, take_heads
from tokred.cache.quantise import (
    Quantised,
    Scaled,
    channel_scale,
    dequantise_rows,
    join_heads,
    pack,
    quantise,
    quantise_rows,
    quantise_scaled,
    unpack,
)
from tokred.cache.reduction import PLAIN, CacheReduction, Look, cache_reduction
from tokred.cache.scores import (
    score_by_key_difference,
    score_by_key_norm,
    score_by_lag,
    score_by_leverage,
    score_by_place,
)
from tokred.cache.slots import (
    Extent,
    KVCache,
    LayerCache,
    Memory,
    hold,
    make_cache,
    make_layer_cache,
)

__all__ = [
    "PLAIN",
    "CacheReduction",
    "Eviction",
    "Extent",
    "HeadScores",
    "KVCache",
    "LayerCache",
    "Look",
    "Memory",
    "Quantised",
    "Scaled",
    "append_to_pool",
    "cache_reduction",
    "channel_scale",
    "choose_heads",
    "dequantise_rows",
    "expect_queries",
    "fold_middle",
    "group_heads",
    "hold",
    "join_heads",
    "join_pools",
    "keep_pooled",
    "make_cache",
    "make_layer_cache",
    "pack",
    "pool_heads",
    "pool_scores",
    "pyramid_budgets",
    "quantise",
    "quantise_rows",
    "quantise_scaled",
    "query_statistics",
    "score_by_expectation",
    "score_by_key_difference",
    "score_by_key_norm",
    "score_by_lag",
    "score_by_last",
    "score_by_leverage",
    "score_by_place",
    "score_by_received",
    "score_by_window",
    "score_heads",
    "take_heads",
    "unpack",
]
