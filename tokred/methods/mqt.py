"""Matryoshka Query Transformer (Hu et al. 2024): of many queries, any first m are enough.

Official code: gordonhu608/MQT-LLaVA (Apache-2.0). As there, keys are positions alone, so that how
much each query takes of each token does not depend on the image. Training in the soft twin draws a
length for each example; officially one for a whole batch, which several plans of static length do
(see `Objective`), and never odd ones.
"""

from tokred.methods import routing
from tokred.methods.registry import register
from tokred.methods.resample import connector, side_of
from tokred.nn.resampler_shape import ResamplerShape
from tokred.plan import Layout, Plan


@register(
    "mqt",
    family="nested",
    site="output",
    learned=True,
    twins="exact",
    paper="MQT 2024",
    golden=("core/mqt__resampler", "core/mqt__posembed"),
)
def mqt(
    layout: Layout,
    *,
    keep: float = 1.0,
    side: int | None = None,
    length: int | None = None,
    rule: str = "even",
    choices: tuple[int, ...] = (),
    heads: int | None = None,
    out: int | None = None,
    look: str = "positions",
    start: str = "drawn",
) -> Plan:
    """The first m of side x side learned queries, any m at inference.

    length: m, default keep * side^2. side: default that of the whole grid, officially 16.
    rule, choices: of lengths in training, see `nested.sample_length`; officially 'even'. look:
    'positions', or 'tokens' for keys that are tokens with positions, our own variant. out: width
    of the matrix behind, default the tokens' width. start: 'local' lets each query begin with the
    tokens around one place, see `ResamplerShape`.

    Raises:
      ValueError: an unknown look, or a length that is 0 or above side^2.
    """
    if look not in ("positions", "tokens"):
        raise ValueError(f"mqt: look={look!r} must be 'positions' or 'tokens'; change look.")
    side = side_of(layout, 1.0) if side is None else side
    only = look == "positions"
    shape = ResamplerShape(
        layout.width, heads or layout.heads, side**2, positions="only" if only else "keys",
        query="norm", key="norm" if only else "", value="norm" if only else "",
        entry="" if only else "norm", out="bare", out_width=out, start=start,
    )  # fmt: skip
    length = max(1, routing.share_of(side**2, keep)) if length is None else length
    return connector("mqt", layout, shape, length=length, rule=rule, choices=tuple(choices))
