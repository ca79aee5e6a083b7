"""Every property of every method: themed modules of `check_*(row)` functions, and one test."""

import pytest

COMMON = ("shapes", "invariance", "alone", "numerics", "gradients", "devices")
TEXT = (*COMMON, "sequences", "decoding")
THEMES = {"vit": (*COMMON, "images"), "decoder": TEXT, "experts": TEXT}

pytest.register_assert_rewrite(
    *(f"tests.conformance.{theme}" for themes in THEMES.values() for theme in themes)
)
