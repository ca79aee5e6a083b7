"""DocCompressor (mPLUG-DocOwl2, Hu et al. 2024): a page's low view collects what its crops show.

Official code: X-PLUG/mPLUG-DocOwl, the compressor with the released weights. Left out: the keys and
values for each modality in its language model, and the token that ends each page.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array

from tokred.methods.registry import register
from tokred.methods.resample import heads_of
from tokred.nn.regions import group_crops
from tokred.nn.resampler import Resampler
from tokred.nn.resampler_shape import ResamplerShape
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.tokens import Tokens


def doc_shape(width: int, heads: int, depth: int) -> ResamplerShape:
    """Blocks that add to normalised queries, with a gated perceptron of the released width."""
    return ResamplerShape(
        width, heads, queries="given", region="given", form="pre", depth=depth, out="linear",
        hidden=256 * -(-int(8 * width / 3) // 256),
        block=(("feed", "gated"), ("residual", "normed")),
    )  # fmt: skip


@dataclass(frozen=True)
class DocCompressor(Reduction):
    """Tokens [*B I M D] of I = 1 + R C images, the whole page first and then its `crops`, R rows of
    C, become those [*B 1 M D] of one: each token of the whole page has looked at the R C tokens of
    the crops that lie where it does.

    crops: (R, C), static. Tokens are whole grids, without any that are invalid.
    Gradient: to the tokens and the module.
    """

    crops: tuple[int, int]
    grid: tuple[int, int]
    heads: int
    depth: int

    @property
    def joins(self) -> int:
        return 1 + self.crops[0] * self.crops[1]

    def counts(self, n: int, prefix: int) -> int:
        return n

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> Resampler:
        return Resampler(doc_shape(width, self.heads, self.depth), width, rngs=rngs)

    def macs(self, n: int, layout: Layout) -> int:
        shape = doc_shape(layout.width, self.heads, self.depth)
        seen = n * self.crops[0] * self.crops[1]  # each by one token alone
        one = 2 * (n + seen) * layout.width**2 + 2 * seen * layout.width
        feed = 3 * n * layout.width * shape.hidden
        return self.depth * (one + feed) + n * layout.width**2

    def __call__(
        self,
        tokens: Tokens,
        evidence: Mapping[str, Array],
        state: Any = None,
        *,
        module: Any = None,
        **how: Any,
    ) -> tuple[Tokens, Any, Any, dict[str, Any]]:
        r, c = self.crops
        if tokens.x.ndim < 4 or tokens.x.shape[-3] != self.joins:
            raise ValueError(
                f"doccompressor: expected the {self.joins} images of a page and its {r}x{c} crops "
                f"[*B I M D], got {tokens.x.shape}; give it at Site('output', part='connector')."
            )
        if tokens.n != self.grid[0] * self.grid[1] or tokens.valid is not None:
            raise ValueError(
                f"doccompressor: expected all tokens of {self.grid[0]}x{self.grid[1]} grids, got "
                f"{tokens.n}; let no token leave before it."
            )
        whole = lambda a: None if a is None else a[..., :1, :, :]  # noqa: E731
        crops = tokens.x[..., 1:, :, :]
        crops = crops.reshape(*crops.shape[:-3], 1, r, c, *self.grid, crops.shape[-1])
        queries = whole(tokens.x)
        ran = require_module(self, module)(
            queries, grid=self.grid, queries=queries, keys=group_crops(crops)
        )
        place = None if tokens.position is None else tokens.positions()
        return Tokens(ran.y, position=whole(place)), None, state, {}


@register(
    "doccompressor",
    family="connector",
    site="output",
    learned=True,
    trains="packed",
    needs=("crops",),
    paper="DocOwl2 2024",
    golden=("connectors/doccompressor",),
)
def doccompressor(
    layout: Layout,
    *,
    keep: float = 0.2,
    crops: tuple[int, int] | None = None,
    heads: int | None = None,
    depth: int = 2,
) -> Plan:
    """The tokens of a page's whole view look at the crops' tokens in the same place.

    crops: (rows, columns), default one row of so many that at most `keep` of all tokens stay; the
    images of an example are then 1 + rows * columns. For the connector of a `VLM`: the plan lies in
    the part 'connector'. heads: default width / 128. depth: not known of the released model.
    """
    if crops is None:
        crops = (1, max(1, int(1 / keep) - 1))
    reduction = DocCompressor(
        (crops[0], crops[1]), layout.grid, heads_of(layout.width, heads), depth
    )
    return Plan(((Site("output", part="connector"), reduction),), name="doccompressor")
