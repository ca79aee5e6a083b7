"""Oryx's dynamic compressor (Liu et al. 2024): one module for 1x, 4x and 16x, by the kind of data.

Official code: Oryx-mllm/Oryx (MIT). At 1x every region is one token, and out = 2x, as there.
"""

from tokred.methods.registry import register
from tokred.methods.resample import connector, window_of
from tokred.nn.resampler_shape import ResamplerShape
from tokred.plan import Layout, Plan

WINDOWS = {"image": 1, "video": 2, "video_long": 4}


@register(
    "oryx",
    family="connector",
    site="output",
    learned=True,
    trains="packed",
    paper="Oryx 2024",
    golden=("core/oryx__compressor", "connectors/oryx"),
)
def oryx(layout: Layout, *, keep: float = 0.25, data: str | None = None, inner: int = 256) -> Plan:
    """The mean of each window plus what it finds in the window's own tokens, by one head.

    data: 'image', 'video' or 'video_long' (windows of 1, 2, 4), default the smallest window that
    leaves at most keep. inner: channels of queries and keys. The same weights serve every window.
    """
    if data is not None and data not in WINDOWS:
        raise ValueError(f"oryx: data={data!r} must be one of {tuple(WINDOWS)}; change data.")
    window = window_of("oryx", layout, keep) if data is None else WINDOWS[data]
    shape = ResamplerShape(
        layout.width, 1, queries="average", region="window", window=window, form="residual",
        attention=(("projections", "pairs"), ("inner", inner)),
    )  # fmt: skip
    return connector("oryx", layout, shape)
