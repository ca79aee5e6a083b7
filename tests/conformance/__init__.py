"""Every property of every method: themed modules of `check_*(row)` functions, and one test."""

import pytest

COMMON = ("shapes", "invariance", "alone", "numerics", "gradients", "devices")
TEXT = (*COMMON, "sequences", "decoding")
IMAGES = (*COMMON, "images")
THEMES = {
    "vit": IMAGES,
    "vit_mean": IMAGES,
    "vit_grid": IMAGES,
    "vit_square": IMAGES,
    "decoder": TEXT,
    "experts": TEXT,
    "pairs": COMMON,
    "cache": ("caches",),
}

pytest.register_assert_rewrite(
    *(f"tests.conformance.{theme}" for themes in THEMES.values() for theme in themes)
)
