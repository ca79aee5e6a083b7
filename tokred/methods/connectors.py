"""Published connectors that are configurations of one `Resampler`, at the vision model's output.

Each is the part that reduces tokens; the projection into the language model follows it.
"""

from collections.abc import Callable
from typing import Any

from tokred.methods.registry import register
from tokred.methods.resample import connector, count_of, heads_of, levels_of, side_of, window_of
from tokred.nn.resampler_shape import ResamplerShape
from tokred.plan import Layout, Plan

MLP = "linear gelu linear"
LEVELS = (0.5, 2 / 3, 22 / 24, 23 / 24)  # 12, 16, 22, 23 of CLIP-L's 24
BARE = (("projections", "bare"),)


def _register(name: str, paper: str, *golden: str, **about: Any) -> Callable[..., Any]:
    return register(
        name, family="connector", site="output", learned=True, trains="packed", paper=paper,
        golden=golden, **about,
    )  # fmt: skip


def _count(layout: Layout, keep: float, count: int | None) -> int:
    return count_of(layout, keep) if count is None else count


def _bert(
    width: int, heads: int, count: int, depth: int, every: int, causal: bool
) -> ResamplerShape:
    mask = "causal" if causal else "none"
    return ResamplerShape(
        width, heads, count, query="norm", form="post", depth=depth, looks_every=every, mask=mask,
        eps=1e-12,
    )  # fmt: skip


@_register("perceiver", "Flamingo 2022", "connectors/perceiver")
def perceiver(
    layout: Layout,
    *,
    keep: float = 0.25,
    count: int | None = None,
    depth: int = 6,
    heads: int | None = None,
    head_dim: int | None = None,
    qk_norm: bool = False,
) -> Plan:
    """Learned latents look at the tokens and at each other, through pre-norm blocks.

    count: of latents, default keep * tokens. head_dim: default width / heads. As in Idefics
    (transformers `IdeficsPerceiverResampler`): ReLU perceptrons of 4 width, no biases.
    """
    heads = heads or layout.heads
    attention = (("inner", heads * (head_dim or layout.width // heads)), ("qk_norm", qk_norm))
    shape = ResamplerShape(
        layout.width, heads, _count(layout, keep, count), form="pre", depth=depth, out="norm",
        block=(("with_queries", True),), attention=BARE + attention, eps=1e-5,
    )  # fmt: skip
    return connector("perceiver", layout, shape)


@_register("qformer", "BLIP-2 2023", "connectors/qformer")
def qformer(
    layout: Layout,
    *,
    keep: float = 0.25,
    count: int | None = None,
    depth: int = 12,
    every: int = 2,
    width: int | None = None,
    heads: int | None = None,
    causal: bool = False,
) -> Plan:
    """Learned queries in a BERT that looks at the tokens in every second layer.

    count: of queries, default keep * tokens. every: of how many layers the first looks. width:
    of the queries, default that of the tokens. causal: each query sees those before it alone
    (SEED). The path of queries without a text; Salesforce LAVIS, transformers `Blip2QFormerModel`.
    """
    queries = _count(layout, keep, count)
    shape = _bert(width or layout.width, heads or layout.heads, queries, depth, every, causal)
    return connector("qformer", layout, shape)


@_register("seed", "SEED 2023", "connectors/seed_causal_mask", twins="exact")
def seed(
    layout: Layout, *, keep: float = 0.25, count: int | None = None, length: int | None = None
) -> Plan:
    """A Q-Former whose queries see those before them alone, so that any prefix stands by itself.

    length: how many of the queries are used. AILab-CVC/SEED (its quantiser is no part of this).
    """
    shape = _bert(layout.width, layout.heads, _count(layout, keep, count), 12, 2, True)
    return connector("seed", layout, shape, length=length)


@_register("tokenpacker", "TokenPacker 2024", "connectors/tokenpacker")
def tokenpacker(
    layout: Layout,
    *,
    keep: float = 0.25,
    window: int | None = None,
    levels: tuple[int, ...] | None = None,
    heads: int | None = None,
    out: int | None = None,
) -> Plan:
    """Each cell of a bilinearly reduced grid looks at its window of several layers' features.

    window: side, default the smallest that leaves at most keep. levels: layers, default the shares
    of the depth that 12, 16, 22 and 23 are of 24. heads: default width / 128. out: width of the
    perceptron behind, which is the whole projection into a language model. CircleRadon/TokenPacker.
    """
    levels = levels_of(layout, LEVELS) if levels is None else levels
    shape = ResamplerShape(
        layout.width, heads_of(layout.width, heads), queries="bilinear", region="window",
        window=window or window_of("tokenpacker", layout, keep), query="bare norm",
        key=f"{MLP} norm", value=f"{MLP} norm", out=MLP, out_width=out,
    )  # fmt: skip
    return connector("tokenpacker", layout, shape, levels)


@_register("quecc", "QueCC 2024", "connectors/quecc", needs=("text",))
def quecc(
    layout: Layout,
    *,
    keep: float = 0.0625,
    window: int | None = None,
    levels: tuple[int, ...] | None = None,
    heads: int = 8,
    text_width: int | None = None,
    conditioned: bool = True,
    conv: tuple[int, int] | None = None,
) -> Plan:
    """Cells of the grid, pooled by a convolution and told the question, look at their windows.

    The question is one vector, given as 'text': officially the last hidden state that the language
    model itself reads of it, without a gradient. text_width: its channels, default the model's
    width. conditioned=False: nothing is told, for comparison. conv: kernel and stride of the
    convolution, default the window. Other options as in tokenpacker.
    locuslab/llava-token-compression.
    """
    levels = levels_of(layout, LEVELS) if levels is None else levels
    shape = ResamplerShape(
        layout.width, heads, queries="conv", region="window",
        window=window or window_of("quecc", layout, keep), source=f"{MLP} norm", key=f"{MLP} norm",
        value=f"{MLP} norm", text="linear norm" if conditioned else None,
        text_width=text_width or layout.width, conv=conv,
    )  # fmt: skip
    return connector("quecc", layout, shape, levels)


@_register("llava_mini", "LLaVA-Mini 2025", "connectors/llavamini_query", "connectors/sincos2d")
def llava_mini(
    layout: Layout, *, keep: float = 0.01, side: int | None = None, heads: int = 8
) -> Plan:
    """side x side learned queries with sincos positions look at all tokens, once.

    The compression alone, without the layers that let the text read all tokens beforehand. With
    side=1, as published, positions say nothing: the table has one constant row. ictnlp/LLaVA-Mini.
    """
    shape = ResamplerShape(
        layout.width, heads, (side or side_of(layout, keep)) ** 2, positions="both", query="norm",
        entry="norm", eps=1e-5,
    )  # fmt: skip
    return connector("llava_mini", layout, shape)


@_register("llava_uhd", "LLaVA-UHD 2024", "connectors/uhd_resampler", "connectors/uhd_slicing")
def llava_uhd(
    layout: Layout,
    *,
    keep: float = 0.25,
    side: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    regions: bool = False,
) -> Plan:
    """Learned queries look at a slice of any shape, whose keys have positions.

    side: of the square of queries. width: of attention, default the tokens'. heads: default
    width / 128. regions: every query looks at its own part of the slice alone, in bins whose shape
    follows the slice's (the "spatially constrained" form; no official numbers were checked).
    thunlp/LLaVA-UHD.
    """
    width = width or layout.width
    entry = "norm" if width == layout.width else "bare norm"
    shape = ResamplerShape(
        width, heads_of(width, heads), (side or side_of(layout, keep)) ** 2, entry=entry,
        query="norm", out="norm bare", positions="none" if regions else "keys",
        region="matrix" if regions else "global", bins=uhd_bins(layout.grid),
    )  # fmt: skip
    return connector("llava_uhd", layout, shape)


def uhd_bins(grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the bins whose ratio is nearest to the slice's."""
    known = ((2, 4), (2, 3), (3, 4), (3, 3), (4, 2), (3, 2), (4, 3))
    return min(known, key=lambda bins: abs(bins[1] / bins[0] - grid[1] / grid[0]))


@_register("slime", "SliME 2024", "connectors/slime_resampler")
def slime(
    layout: Layout,
    *,
    keep: float = 0.25,
    side: int | None = None,
    heads: int | None = None,
    out: int | None = None,
) -> Plan:
    """Learned queries and keys have sincos positions; one look, then a norm.

    side: of the square of queries. out: width of a linear layer behind, None for none. The
    compression of local crops; for the router behind it see slime_router. yfzhang114/SliME.
    """
    chain = "norm" if out is None else "norm linear"
    shape = ResamplerShape(
        layout.width, heads_of(layout.width, heads), (side or side_of(layout, keep)) ** 2,
        positions="both", query="norm", entry="norm", out=chain, out_width=out,
    )  # fmt: skip
    return connector("slime", layout, shape)


@_register("vtg_slots", "VTG-LLM 2024", "connectors/vtg_slots")
def vtg_slots(layout: Layout, *, keep: float = 0.25, count: int | None = None) -> Plan:
    """Learned slots take the mean of the tokens by plain dot products, without any projection.

    gyxxyg/VTG-LLM, whose softmax is over tokens.
    """
    shape = ResamplerShape(
        layout.width, 1, _count(layout, keep, count),
        attention=(("projections", "none"), ("scale", 1.0)),
    )  # fmt: skip
    return connector("vtg_slots", layout, shape)
