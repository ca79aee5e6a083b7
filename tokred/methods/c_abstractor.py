"""C-Abstractor (Honeybee, Cha et al. 2023): convolutions around an adaptive mean keep what is near
near.

Official code: khanrc/honeybee (Apache-2.0; its weights CC-BY-NC). It sees square grids only and
pools a square number of tokens; ours any grid. Defaults there: 1024 channels, depth 3, readout of
two layers, 144 tokens. Blocks without any (depth=0) are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array

from tokred.maps import Mix
from tokred.methods.connecting import RegionConnector, cells_for, region_map
from tokred.methods.registry import register
from tokred.nn.chain import chain_macs
from tokred.nn.locality import ConvAbstractor, block_macs, readout_of
from tokred.plan import Layout, Plan, Site
from tokred.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class CAbstractor(RegionConnector):
    """See `ConvAbstractor`; convolutions see zeros where a token is invalid.

    eos: learned tokens at the end, which no token became. channels: of the blocks, None for the
    width. depth: blocks before the mean, and as many after it.
    """

    method: ClassVar[str] = "c_abstractor"
    depth: int = 3
    mlp_depth: int = 2
    channels: int | None = None
    eos: int = 0
    prenorm: bool = False

    def __post_init__(self) -> None:
        for field in ("depth", "mlp_depth"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"c_abstractor: {field}={getattr(self, field)} must be at least 1; raise it."
                )

    @property
    def left(self) -> int:
        return super().left + self.eos

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> ConvAbstractor:
        return ConvAbstractor(
            width,
            self.grid,
            self.cells,
            channels=self.channels or width,
            out=self.out_width(width),
            depth=self.depth,
            mlp_depth=self.mlp_depth,
            eos=self.eos,
            prenorm=self.prenorm,
            rngs=rngs,
        )

    def macs(self, n: int, layout: Layout) -> int:
        width, places, cells = layout.width, n - layout.prefix, self.left - self.eos
        c = self.channels or width
        stage = lambda n, width: (  # noqa: E731
            block_macs(n, width, c) + (self.depth - 1) * block_macs(n, c, c)
        )
        readout = chain_macs(readout_of(self.mlp_depth), c, self.out_width(width))
        return stage(places, width) + stage(cells, c) + cells * (places * c + readout)

    def map_of(self, tokens: Tokens) -> Mix:
        return region_map(tokens, self.matrix, self.eos)

    def __call__(
        self, tokens: Tokens, evidence: Mapping[str, Array], state: Any = None, **call: Any
    ) -> tuple[Tokens, Any, Any, dict[str, Array]]:
        tokens, map_, state, aux = super().__call__(tokens, evidence, state, **call)
        if self.eos and tokens.position is not None:  # nowhere, as a prefix is
            nowhere = tokens.position.at[..., -self.eos :, :].set(-1)
            tokens = tokens.replace(position=nowhere)
        return tokens, map_, state, aux


@register(
    "c_abstractor",
    family="connector",
    site="output",
    learned=True,
    trains="packed",
    golden=("connectors/cabstractor",),
    paper="Honeybee 2023",
)
def c_abstractor(
    layout: Layout,
    *,
    keep: float = 0.25,
    tokens: int | None = None,
    depth: int = 3,
    mlp_depth: int = 2,
    channels: int | None = None,
    eos: int = 0,
    prenorm: bool = False,
    out: int | None = None,
) -> Plan:
    """Behind the last layer, convolutions, an adaptive mean, convolutions and a perceptron.

    keep: the largest square within that share of the tokens (without `eos`). tokens: its square
    number, instead. Other options: see `CAbstractor`. out: width behind.

    Raises:
      ValueError: tokens that are no square number, or of a grid that is no square.
    """
    cells = cells_for("c_abstractor", layout.grid, keep, tokens)
    size = {"depth": depth, "mlp_depth": mlp_depth, "channels": channels, "out": out}
    reduction = CAbstractor(grid=layout.grid, cells=cells, eos=eos, prenorm=prenorm, **size)
    return Plan(((Site("output"), reduction),), name="c_abstractor")
