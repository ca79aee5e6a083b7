"""Multi-criteria Token Fusion with one-step-ahead attention (Lee, Choi and Kim 2024).

Official code: mlvlab/MCTF (MIT), which is followed. There, the first rows of the even half are
protected, so that of a class and a distillation token only the first is; here the whole prefix is.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokred.maps import Assign, TokenMap
from tokred.methods.registry import register
from tokred.plan import ATTENTION, Ask, Layout, Plan, Reduction, Site
from tokred.schedule import linear
from tokred.score import cosine, score_by_received
from tokred.select import alternate, match_sets
from tokred.tokens import Tokens, move

PROBS, RECEIVED, STORED = Ask("probs"), Ask("column_mean"), Ask("column_mean", layer=-1)
POOLINGS = ("attention", "size", "max", "mean")
LEAST = 1e-20  # attention received: a token that nobody sees keeps finite scores and weights


@dataclass(frozen=True)
class MCTF(Reduction):
    """Fuses the `r` pairs of tokens that are most alike, least attended to and smallest, before a
    layer; half of them from even to odd positions, then half back.

    r: a number, or below 1 a share of the tokens behind the prefix; half of those at most, and
    none of the last `least`, prefix included. ahead: 1 the layer's attention of the tokens before
    their fusion is fused, too, and used in it (their queries and keys are not projected again) · 2
    it only tells what to fuse, exact and dearer · 0 the attention of the layer before does.
    pooling: features take the mean weighted by 'attention' times size, or by 'size', the plain
    'mean', or the 'max'. tau_sim, tau_info, tau_size: temperatures of similarity, attention and
    size; 0 leaves that criterion out. proportional: later attention adds log(size).
    Gradient: to features and fused attention, not to weights.
    """

    r: float = 16
    ahead: int = 1
    both_ways: bool = True
    pooling: str = "attention"
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    proportional: bool = True
    least: int = 10

    def __post_init__(self) -> None:
        if self.ahead not in (0, 1, 2) or self.pooling not in POOLINGS:
            raise ValueError(
                f"mctf: ahead={self.ahead} must be 0, 1 or 2 and pooling={self.pooling!r} one of "
                f"{POOLINGS}; change them."
            )

    @property
    def asks(self) -> tuple[Ask, ...]:  # type: ignore[override]
        if self.ahead == 1:
            return (PROBS,)
        needed = self.tau_info > 0 or self.pooling == "attention"
        return ((RECEIVED if self.ahead else STORED),) * needed

    def counts(self, n: int, prefix: int) -> int:
        r = self.r if n - self.r >= self.least else max(n - self.least, 0)
        r = int(r * (n - prefix)) if r < 1 else int(r)
        return n - min(r, (n - prefix) // 2)

    def macs(self, n: int, layout: Layout) -> int:
        """Less what the layer leaves out: its queries, keys and logits."""
        k, (a, b) = self.counts(n, layout.prefix), alternate(n, layout.prefix)
        saved = k * layout.width * (2 * layout.width + k) if self.ahead == 1 else 0
        return len(a) * len(b) * layout.width - saved

    def received(self, tokens: Tokens, evidence: Mapping[str, Array]) -> Array | None:
        """Attention that every token receives, if that counts."""
        if self.ahead == 1:
            return score_by_received(evidence[PROBS.name], tokens.valid)
        return evidence[self.asks[0].name] if self.asks else None

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        n, prefix = tokens.n, tokens.prefix
        r, (a, b) = n - self.counts(n, prefix), alternate(n, prefix)
        scores = self.scores(tokens, self.received(tokens, evidence), a, b)
        back = r - r // 2 if self.both_ways else 0
        how: dict[str, Any] = {"back": back, "ordered": prefix > 0, "valid": tokens.valid}
        return match_sets(scores, a, b, r - back, n, front=range(prefix), **how)

    def scores(
        self, tokens: Tokens, received: Array | None, a: Any, b: Any
    ) -> Float[Array, "*B A C"]:
        """How much each of the tokens `a` should fuse with each of the tokens `b`."""
        scores = jnp.ones((), jnp.float32)
        if self.tau_sim:
            x = jax.lax.stop_gradient(tokens.x)
            similar = cosine(x[..., a, :], x[..., b, :])
            scores = jnp.clip((similar + 1) / 2, 0.0) ** (1 / self.tau_sim)
        if self.tau_info and received is not None:
            scores = scores * _small(received, tokens.valid, a, b) ** (1 / self.tau_info)
        if self.tau_size:
            scores = scores * _small(tokens.sizes(), tokens.valid, a, b) ** (1 / self.tau_size)
        return jnp.broadcast_to(scores, (*tokens.batch, len(a), len(b)))

    def move(self, tokens: Tokens, map_: TokenMap, evidence: Mapping[str, Array]) -> Tokens:
        how, weight = self.pooled(tokens, map_, evidence)
        moved = move(tokens, map_, how=how, weight=weight)
        if self.ahead == 1:
            probs = map_.lift().lift().apply(evidence[PROBS.name], "sum", axis=-1)
            over = None if weight is None else weight[..., None, :]
            probs = map_.lift().apply(probs, how, weight=over, axis=-2)
            extra = {**moved.extra, ATTENTION: jnp.swapaxes(probs, -3, -2)}
            moved = moved.replace(extra=extra)
        return moved.replace(proportional=tokens.proportional or self.proportional)

    def pooled(
        self, tokens: Tokens, map_: TokenMap, evidence: Mapping[str, Array]
    ) -> tuple[str, Float[Array, "*B N"] | None]:
        """How features and rows of attention become one: (rule, weight)."""
        if self.pooling in ("mean", "max"):
            return self.pooling, None
        weight, received = tokens.sizes(), self.received(tokens, evidence)
        if self.pooling == "attention" and received is not None:
            weight = weight * jnp.maximum(received, LEAST)
        weight = jax.lax.stop_gradient(weight)
        total = map_.restore(map_.apply(weight, "sum"))
        # Shares first: that of a token alone is 1, and leaves it as it is, bit for bit.
        return "weighted_sum", weight / jnp.where(total == 0, 1.0, total)


def _small(
    amount: Float[Array, "*B N"], valid: Array | None, a: Any, b: Any
) -> Float[Array, "*B A C"]:
    """Of every pair: the product of how near both are to the smallest valid amount, as ratios."""
    amount = jnp.maximum(jax.lax.stop_gradient(amount), LEAST)
    alive = amount if valid is None else jnp.where(valid, amount, jnp.inf)
    ratio = alive.min(-1, keepdims=True) / amount
    ratio = jnp.minimum(ratio, 1.0)  # of absent tokens
    return ratio[..., a][..., :, None] * ratio[..., b][..., None, :]


@register(
    "mctf",
    family="merge",
    site="before",
    golden=("vit/mctf", "vit/mctf_block"),
    paper="MCTF 2024",
)
def mctf(
    layout: Layout,
    *,
    keep: float = 0.1,
    r: float | None = None,
    layers: Sequence[int] | None = None,
    ahead: int = 1,
    both_ways: bool = True,
    pooling: str = "attention",
    tau_sim: float = 1.0,
    tau_info: float = 20.0,
    tau_size: float = 40.0,
    proportional: bool = True,
    least: int = 10,
) -> Plan:
    """Alike, unattended and small tokens fuse, and their attention with them, one step ahead.

    keep: what is left after the last layer, in equal steps. r: instead, as in the official code, a
    number or a share per layer (16; or 0.35 at layers 3, 6, 9), which leaves `least` tokens.
    layers: before which tokens fuse, all but the first by default. Others: see `MCTF`.
    """
    layers = range(1, layout.depth) if layers is None else layers
    how = (ahead, both_ways, pooling, tau_sim, tau_info, tau_size, proportional)
    left = (layout.patches, *map(layout.rounded, linear(layout.patches, keep, layers)))
    removed = [(a - b, 0) for a, b in itertools.pairwise(left)]
    each = removed if r is None else [(r, least)] * len(layers)
    steps = zip(layers, each, strict=True)
    return Plan(
        tuple((Site("before", i), MCTF(r, *how, least)) for i, (r, least) in steps if r),
        name="mctf",
    )
