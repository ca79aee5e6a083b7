"""Zero-TPrune (Wang, Dedhia and Jha 2024): pruning by the graph of attention, without training.

There is no official code. The paper gives the stages I', S, I and the constants; it leaves open
the scale of the scores' variance (here: at a mean of 1, since at a sum of 1 the published range
would let no head pass), which layers prune and how many (there: a random search), whether keys are
averaged over heads (here they are) and whether the graph holds the class token (here it does).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Keep, TokenMap, compose
from tokred.methods.registry import register
from tokred.ops import gather
from tokred.plan import Ask, Layout, Plan, Reduction, Site
from tokred.schedule import linear
from tokred.score import cosine, rms_of_telling_heads, score_by_pagerank
from tokred.select import keep_representatives, keep_top_k, match_sets, rank_tokens
from tokred.select.rows import leading_row
from tokred.tokens import Tokens

PROBS, KEYS = Ask("probs"), Ask("keys")
SPLITS = ("less", "more", "alternate")


@dataclass(frozen=True)
class ZeroTPrune(Reduction):
    """Prunes `similar` tokens for being like another one, then all but the `k` most important.

    Importance is weighted PageRank over the attention of each head, joined over the heads whose
    variance lies in [low, high]. It splits the tokens in two: the similar ones leave the 'less'
    important half, the 'more' important one, or every second rank ('alternate'), compared with the
    other half by the keys' cosine. Between attention and MLP this is what it is between layers: an
    MLP looks at no other token.
    """

    k: int
    similar: int = 0
    iterations: int = 8
    low: float = 0.01
    high: float = 0.7
    split: str = "less"
    asks: ClassVar[tuple[Ask, ...]] = (PROBS, KEYS)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(
                f"zero_tprune: split={self.split!r} must be one of {SPLITS}; change split."
            )

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.k

    def macs(self, n: int, layout: Layout) -> int:
        pairs = ((n - layout.prefix) // 2) ** 2
        walk = self.iterations * layout.heads * n * n
        return walk + pairs * (layout.width // layout.heads)

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> TokenMap:
        prefix, valid = tokens.prefix, tokens.valid
        ranks = score_by_pagerank(evidence[PROBS.name], self.iterations, valid)
        importance = rms_of_telling_heads(ranks, self.low, self.high, valid)
        unlike = self.unlike(evidence[KEYS.name], importance, prefix, valid)
        left = unlike.apply(importance)
        return compose(unlike, keep_top_k(left, self.k, prefix=prefix, valid=unlike.valid))

    def unlike(
        self,
        metric: Float[Array, "*B N E"],
        importance: Float[Array, "*B N"],
        prefix: int,
        valid: Bool[Array, "*B N"] | None,
    ) -> Keep:
        """All but the `similar` tokens of one half that are most like one of the other."""
        n, axis = metric.shape[-2], metric.ndim - 2
        order = rank_tokens(importance, prefix=prefix, valid=valid).index[..., prefix:]
        count = n - prefix if valid is None else valid[..., prefix:].sum(-1, keepdims=True)
        a, b = self.halves(order, count)
        rows = [gather(metric, half, axis=axis) for half in (a, b)]
        r = min(self.similar, (n - prefix) // 2, n - prefix - self.k)
        how = {"front": range(prefix), "valid": valid}
        return keep_representatives(match_sets(cosine(*rows), a, b, r, n, **how))

    def halves(
        self, order: Int[Array, "*B P"], count: int | Int[Array, "*B 1"]
    ) -> tuple[Int[Array, "*B A"], Int[Array, "*B C"]]:
        """(tokens that may leave, the others), of `count` present ones in front of `order`."""
        if self.split == "alternate":
            return order[..., 1::2], order[..., ::2]
        n = order.shape[-1]
        upper, lower = (leading_row(jnp.arange(k), order.ndim) for k in (n - n // 2, n // 2))
        half = (count + 1) // 2
        # Absent tokens, the last ranks, fill up both halves.
        above = upper + jnp.where(upper < half, 0, count - half)
        below = lower + jnp.where(lower < count - half, half, n - n // 2)
        more, less = (gather(order, rank, axis=order.ndim - 1) for rank in (above, below))
        return (less, more) if self.split == "less" else (more, less)


def walk_lengths(depth: int) -> tuple[int, ...]:
    """Iterations by layer: many in the first quarter, where attention is spread, one in the last.
    The paper gives 30 to 50, 5 to 10 and 1."""
    return tuple(40 if i < depth / 4 else 1 if i >= 3 * depth / 4 else 8 for i in range(depth))


@register("zero_tprune", family="prune", site="mid", paper="Zero-TPrune 2024")
def zero_tprune(
    layout: Layout,
    *,
    keep: float = 0.35,
    layers: Sequence[int] | None = None,
    similar: float = 0.5,
    split: str = "less",
) -> Plan:
    """Tokens leave that resemble more important ones, then those least important in the graph.

    keep: what is left after the last layer, in equal steps; 0.35 saves a third of DeiT-S. layers:
    where, every second one by default. similar: the share that leaves by similarity.
    split: see `ZeroTPrune`.
    """
    if not 0 <= similar <= 1:
        raise ValueError(f"zero_tprune: similar={similar} must lie in [0, 1]; change similar.")
    layers = range(1, layout.depth - 1, 2) if layers is None else layers
    steps, n, walks = [], layout.patches, walk_lengths(layout.depth)
    for layer, k in zip(layers, map(layout.rounded, linear(n, keep, layers)), strict=True):
        walk = walks[layer] if layer < layout.depth else 1
        prune = ZeroTPrune(k, int(similar * (n - k)), walk, split=split)
        steps += [(Site("mid", layer), prune)] * (k < n)
        n = k
    return Plan(tuple(steps), name="zero_tprune")
