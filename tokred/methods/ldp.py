"""LDPv2 (MobileVLM V2, Chu et al. 2024): a perceptron, an adaptive mean, a depthwise convolution.

Official code: Meituan-AutoML/MobileVLM, with 12 x 12 of 24 x 24 tokens; it sees square
grids only, ours any. LangDC projects its frames by the same module.
"""

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from tokred.methods.connecting import RegionConnector, cells_for
from tokred.methods.registry import register
from tokred.nn.chain import chain_macs
from tokred.nn.locality import MLP, LocalProjector
from tokred.plan import Layout, Plan, Site


@dataclass(frozen=True, kw_only=True)
class LDP(RegionConnector):
    """See `LocalProjector`; to its convolution, a cell without a valid token is zeros."""

    method: ClassVar[str] = "ldp"

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> LocalProjector:
        return LocalProjector(width, self.grid, self.cells, out=self.out_width(width), rngs=rngs)

    def macs(self, n: int, layout: Layout) -> int:
        out, places = self.out_width(layout.width), n - layout.prefix
        return places * chain_macs(MLP, layout.width, out) + self.left * (places + 9) * out


@register(
    "ldp",
    family="connector",
    site="output",
    learned=True,
    trains="packed",
    paper="MobileVLM V2 2024",
)
def ldp(
    layout: Layout, *, keep: float = 0.25, tokens: int | None = None, out: int | None = None
) -> Plan:
    """Behind the last layer, a perceptron, the mean of a coarser grid, a depthwise convolution.

    keep: the largest square within that share of the tokens. tokens: its square number, instead.
    out: width behind.

    Raises:
      ValueError: tokens that are no square number, or of a grid that is no square.
    """
    cells = cells_for("ldp", layout.grid, keep, tokens)
    return Plan(((Site("output"), LDP(grid=layout.grid, cells=cells, out=out)),), name="ldp")
