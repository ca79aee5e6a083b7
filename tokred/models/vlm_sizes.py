"""Vision-language models by name."""

from collections.abc import Mapping
from typing import Any

from tokred.models.decoder import decoder_config
from tokred.models.sizes import make_config
from tokred.models.vit import vit_config
from tokred.models.vlm import VLMConfig

_SMALL = {"width": 96, "depth": 4, "heads": 3, "patch": (4, 4), "image_size": (32, 32)}
# name: (vision model, changes of it, decoder, changes of it, other fields). vlm_* are our own,
# named by their parameters; the last is LLaVA-1.5's layout.
SIZES: Mapping[str, tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "vlm_1m": ("vit_ti16", {**_SMALL, "channels": 1}, "lm_3m", {"width": 96, "depth": 3}, {}),
    "vlm_30m": ("vit_ti16", {}, "lm_30m", {}, {}),
    "vlm_120m": ("vit_s16", {}, "lm_100m", {}, {}),
    "llava15_7b": (
        "vit_l14", {"image_size": (336, 336)}, "llama2_7b", {"vocab": 32_064},
        {"feature_layer": 23, "image_id": 32_000},
    ),
}  # fmt: skip


def vlm_config(
    name: str,
    *,
    vision: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    **changes: Any,
) -> VLMConfig:
    """A size of `SIZES`. vision, decoder: fields of their configs; changes: of VLMConfig itself.

    Raises ValueError for an unknown size or field, with the nearest.
    """
    known: dict[str, dict[str, Any]] = {key: {} for key in SIZES}
    if name in SIZES:
        seen, seeing, read, reading, more = SIZES[name]
        known[name] = {
            "vision": vit_config(seen, **{"classes": 0, **seeing, **(vision or {})}),
            "decoder": decoder_config(read, **{"vocab": 260, **reading, **(decoder or {})}),
            **more,
        }
    return make_config(VLMConfig, known, name, changes)
