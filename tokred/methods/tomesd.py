"""ToMe for Stable Diffusion (Bolya and Hoffman 2023, arXiv 2303.17604): a part of every layer runs
on merged tokens, and its update goes back to all of them, so that nothing is lost for good.

Official code: dbolya/tomesd (MIT), where the normalised tokens are merged around self-attention
alone, with `merge_crossattn` and `merge_mlp` around all three by one match; here tokens are merged
in front of the norm. Officially the token that stays of each cell is drawn, for a whole batch; here
with `random`. Attention is plain, whatever the sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

from tokred.maps import Assign
from tokred.methods.connecting import Grid, require_grid, windows_left
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.select import match_cells
from tokred.site import AROUND
from tokred.tokens import Tokens


@dataclass(frozen=True)
class ToMeSD(Reduction):
    """Around a layer or one of its branches: `r` tokens of the `grid` behind the prefix merge.

    Means weigh by size, as elsewhere; where no token has merged before, plainly, as officially.
    stride, random: see `match_cells`. Static: all. Gradient: through means and updates.
    """

    grid: Grid
    r: int
    stride: int = 2
    random: bool = False

    def counts(self, n: int, prefix: int) -> int:
        require_grid("tomesd", self.grid, n, prefix)
        cells = windows_left(self.grid, self.stride)
        return n - (min(self.r, n - prefix - cells) if cells else 0)

    def macs(self, n: int, layout: Layout) -> int:
        cells = windows_left(self.grid, self.stride)
        return cells * (n - layout.prefix - cells) * layout.width

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        if self.random and key is None:
            raise ValueError("method 'tomesd': draws need a key; pass call=Call(key=...).")
        draws = jax.random.uniform(key, (tokens.n - tokens.prefix,)) if self.random else None
        how = {"draws": draws, "prefix": tokens.prefix, "valid": tokens.valid}
        return match_cells(tokens.x, self.r, self.grid, (self.stride, self.stride), **how)


@register(
    "tomesd",
    family="merge",
    site="around",
    golden=("gen/tomesd",),
    paper="ToMe for Stable Diffusion 2023",
)
def tomesd(
    layout: Layout,
    *,
    keep: float = 0.5,
    stride: int = 2,
    layers: Sequence[int] | None = None,
    site: str = "around",
    random: bool = False,
) -> Plan:
    """Every layer runs on merged tokens, and its update goes back to each of them.

    keep: the share of tokens that a layer runs on; at least one of each stride x stride cell stays.
    layers: default all; officially those of the highest resolution. site: 'around', or
    'around_attention' as officially, or 'around_mlp'. random: which token of a cell stays is drawn.

    Raises:
      ValueError: a site that is not around something, a stride below 2, or keep below what cells
        leave.
    """
    if site not in AROUND:
        raise ValueError(f"tomesd: site={site!r} must be one of {AROUND}; change site.")
    if stride < 2:
        raise ValueError(f"tomesd: stride={stride} leaves no token to merge; make it 2 or more.")
    n = layout.patches
    r = n - max(1, layout.rounded(round(keep * n)))
    reduction = ToMeSD(layout.grid, r, stride, random)
    left = reduction.counts(layout.tokens, layout.prefix) - layout.prefix
    if left > n - r:
        raise ValueError(
            f"tomesd: keep={keep:g} is below {left / n:.3f}, one token of each cell of stride="
            f"{stride} in a grid of {layout.grid}; raise keep or stride."
        )
    chosen = range(layout.depth) if layers is None else layers
    steps = tuple((Site(site, i), reduction) for i in chosen) if r else ()
    return Plan(steps, name="tomesd")
