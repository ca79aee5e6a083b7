"""Every property of every method: themed modules of `check_*(row)` functions, and one test."""

import pytest

THEMES = ("shapes", "invariance", "numerics", "gradients", "devices")

pytest.register_assert_rewrite(*(f"tests.conformance.{theme}" for theme in THEMES))
