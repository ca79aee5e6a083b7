"""Selection: scores or features to a TokenMap. Counts are Python ints.

All functions protect the first `prefix` tokens, which stay in front in their order, take `valid`,
and stop the gradient: it flows through what a map moves, never through the choice.
"""

from tokred.select.cluster import (
    cluster_by_density,
    cluster_medoids,
    cluster_softly,
    density_peaks,
    farthest_points,
    nearest_centre,
    nearest_of,
    spread_back,
    squared_distances,
)
from tokred.select.group import grid_cells, merge_into, pool_cells
from tokred.select.keep import (
    keep_above,
    keep_representatives,
    keep_static,
    keep_top_k,
    keep_where,
    rank_tokens,
    rank_within,
)
from tokred.select.match import (
    alternate,
    match_bipartite,
    match_cells,
    match_kth,
    match_random,
    match_sets,
    merge_to_nearest,
    nearest_kept,
)
from tokred.select.sample import as_shares, keep_quantiles, nearest_quantiles
from tokred.select.soft import beside_prefix, share_out, soften

__all__ = [
    "alternate",
    "as_shares",
    "beside_prefix",
    "cluster_by_density",
    "cluster_medoids",
    "cluster_softly",
    "density_peaks",
    "farthest_points",
    "grid_cells",
    "keep_above",
    "keep_quantiles",
    "keep_representatives",
    "keep_static",
    "keep_top_k",
    "keep_where",
    "match_bipartite",
    "match_cells",
    "match_kth",
    "match_random",
    "match_sets",
    "merge_into",
    "merge_to_nearest",
    "nearest_centre",
    "nearest_kept",
    "nearest_of",
    "nearest_quantiles",
    "pool_cells",
    "rank_tokens",
    "rank_within",
    "share_out",
    "soften",
    "spread_back",
    "squared_distances",
]
