"""What shapes a resampler: which of the published connectors it is."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tokred.nn.chain import chain_macs, grown
from tokred.nn.cross_attention import PROJECTIONS, SOFTMAX
from tokred.nn.regions import check_window

QUERIES = ("learned", "average", "bilinear", "conv", "given")
REGIONS = ("global", "window", "given", "matrix")
POSITIONS = ("none", "keys", "both", "only")
FORMS = ("plain", "residual", "pre", "post")
MASKS = ("none", "causal")
STARTS = ("drawn", "local")


@dataclass(frozen=True)
class ResamplerShape:
    """All that shapes a `Resampler`; static. D is `width`, M the tokens of an image.

    queries: 'learned' a table of `count` · 'average', 'bilinear' or 'conv' the grid pooled by
    `window` (bilinear as torch does without antialias; conv is depthwise) · 'given' by the caller
    (a global view, a memory). count: K of learned ones. conv: kernel and stride of 'conv', default
    the window; they must give a query for every window.
    region, what a query looks at: 'global' all tokens · 'window' its own window x window cells
    · 'given' keys [*B K P C] by the caller (crop groups) · 'matrix' `bins` bins of its own cell of
    a sqrt(K) x sqrt(K) partition, averaged with weights that only the grid decides (RoI).
    positions, sincos of a sqrt(K) x sqrt(K) grid, resized to the image's: 'keys', 'both', or
    'only': keys are positions alone, and the queries have them before their chain. Values never
    have them.
    source: chain of the tokens that queries are pooled of · query, key, value: chains in front of
    attention · entry: chain of the tokens before key and value · out: chain behind · text: chain
    of a text [*B T] that is added to the tokens that queries are pooled of, or to the queries
    themselves where they are not pooled; None for none. See `Chain`.
    form: 'plain' y = attention · 'residual' q + attention · 'pre' and 'post', `depth` blocks, see
    `PreBlock` and `PostBlock`; block: their options. looks_every: which 'post' blocks look at the
    image. mask: 'causal', a query sees only those before it (and its results do not change when
    later ones are cut off). attention: options of `CrossAttention`. out_width: None for D.
    start: 'drawn' · 'local', for one plain look at positions alone: each query begins with the mean
    of the tokens around one place, the first m of them at places that cover the grid, and what
    values pass through begins as the identity, so that a connector that is put into a trained model
    begins close to what was there.
    """

    width: int
    heads: int = 1
    count: int = 64
    queries: str = "learned"
    region: str = "global"
    window: int = 1
    conv: tuple[int, int] | None = None
    bins: tuple[int, int] = (2, 2)
    positions: str = "none"
    source: str = ""
    query: str = ""
    entry: str = ""
    key: str = ""
    value: str = ""
    out: str = ""
    out_width: int | None = None
    text: str | None = None
    text_width: int = 0
    form: str = "plain"
    depth: int = 1
    hidden: int = 0
    block: tuple[tuple[str, Any], ...] = ()
    looks_every: int = 1
    mask: str = "none"
    attention: tuple[tuple[str, Any], ...] = ()
    eps: float = 1e-6
    start: str = "drawn"

    def __post_init__(self) -> None:
        one_of = {
            "queries": QUERIES,
            "region": REGIONS,
            "positions": POSITIONS,
            "form": FORMS,
            "mask": MASKS,
            "start": STARTS,
        }
        how = dict(self.attention)
        for field, known in one_of.items():
            _one_of(field, getattr(self, field), known)
        _one_of("projections", how.get("projections", "all"), PROJECTIONS)
        _one_of("softmax", how.get("softmax", "keys"), SOFTMAX)
        for field in ("count", "window", "depth", "heads", "width"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"Resampler: {field}={getattr(self, field)} must be at least 1; raise {field}."
                )
        square = math.isqrt(self.count) ** 2 == self.count
        if self.queries == "learned" and self.positions != "none" and not square:
            raise ValueError(
                f"Resampler: count={self.count} queries have positions on a square grid; use "
                f"{math.isqrt(self.count) ** 2} or positions='none'."
            )

        looks = (self.queries, self.region, self.positions, self.form, self.attention)
        fits = looks == ("learned", "global", "only", "plain", ()) and self.count > 1
        if self.start == "local" and not fits:
            raise ValueError(
                "Resampler: start='local' is for several learned queries that look once, at the "
                "positions of all tokens; use start='drawn'."
            )

    @property
    def pooled(self) -> bool:
        """Whether queries come from the grid."""
        return self.queries in ("average", "bilinear", "conv")

    @property
    def kernel_and_stride(self) -> tuple[int, int]:
        """Of the convolution that pools queries."""
        return self.conv or (self.window, self.window)

    def queries_of(self, grid: tuple[int, int]) -> int:
        """K for an image. Raises ValueError where the window does not divide the grid."""
        if not self.pooled:
            return self.count
        check_window(grid, self.window)
        kernel, stride = self.kernel_and_stride
        cells = tuple((n - kernel) // stride + 1 for n in grid)
        if self.queries == "conv" and cells != (grid[0] // self.window, grid[1] // self.window):
            raise ValueError(
                f"Resampler: conv={self.conv} gives {cells} queries on the grid {grid}, not one "
                f"for every window={self.window}; change one of the two."
            )
        return grid[0] * grid[1] // self.window**2

    def macs(self, width: int, grid: tuple[int, int], queries: int, keys: int) -> int:
        """Multiply-accumulates of one image; width, keys: channels of its tokens and of those that
        queries look at."""
        d, tokens, how = self.width, grid[0] * grid[1], dict(self.attention)
        entered = grown(self.entry, keys, d)
        start = grown(self.source, width, d) if self.pooled else d
        asked = grown(self.query, start, d)
        seen = grown(self.key, entered, d)
        seen_by_each = {"global": tokens, "window": self.window**2}
        pairs = queries * seen_by_each.get(self.region, math.prod(self.bins))
        keyed = pairs if self.region == "matrix" else tokens
        inner = how.get("inner") or asked
        projected = {"none": 0, "pairs": 1}.get(how.get("projections", "all"), 2)
        one = projected * (queries * asked + keyed * seen) * inner + 2 * pairs * inner
        chains = tokens * (
            chain_macs(self.entry, keys, entered)
            + chain_macs(self.key, entered, seen)
            + chain_macs(self.value, entered, seen)
        )
        if self.pooled:
            chains += tokens * chain_macs(self.source, width, start)
            kernel, _ = self.kernel_and_stride
            pooled = {"conv": queries * kernel**2, "bilinear": tokens * queries}
            chains += pooled.get(self.queries, 0) * start
        chains += queries * chain_macs(self.query, start, asked)
        chains += queries * chain_macs(self.out, asked, self.out_width or asked)
        return chains + self._blocks_macs(one, asked, queries)

    def _blocks_macs(self, attention: int, width: int, queries: int) -> int:
        """Of all blocks, given one attention to the image's tokens."""
        if self.form in ("plain", "residual"):
            return attention
        hidden, block = self.hidden or 4 * width, dict(self.block)
        own = 4 * queries * width**2 + 2 * queries**2 * width
        if self.form == "post":
            looks = -(-self.depth // self.looks_every)
            return looks * attention + self.depth * (own + 2 * queries * width * hidden)
        feed = 3 if block.get("feed") == "gated" else 2
        among = 2 * queries * width**2 + 2 * queries**2 * width if block.get("with_queries") else 0
        return self.depth * (attention + among + feed * queries * width * hidden)

    def replace(self, **changes: Any) -> "ResamplerShape":
        return dataclasses.replace(self, **changes)


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Resampler: {field}={value!r} must be one of {known}; change {field}.")
