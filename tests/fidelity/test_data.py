"""Photographs and prose of this machine."""

import numpy as np
import pytest

from tokred.fidelity import data


def test_prose_is_english_of_docstrings():
    text = data.prose("random")
    assert "Random variable generators." in text and "import" not in text.split("\n")[0]
    with pytest.raises(ValueError, match="'randon' is no module with source"):
        data.prose("randon")


def test_every_module_has_enough():
    assert all(len(data.prose(module)) > 5000 for module in data.MODULES)


def test_paragraphs_are_long_and_different():
    found = data.paragraphs(160)
    assert len(found) > 100 and len(set(found)) == len(found)
    assert min(map(len, found)) >= 160 and not any("\n" in line or ">>>" in line for line in found)


def test_photographs_are_square_and_in_range():
    pytest.importorskip("skimage", reason="photographs come with scikit-image")
    found = data.photographs(32, 3)
    assert list(found) == ["china", "flower", "astronaut"]
    for image in found.values():
        assert image.shape == (32, 32, 3) and image.dtype == np.float32
        assert 0 <= image.min() < image.max() <= 1
    with pytest.raises(ValueError, match="count=9 must lie in"):
        data.photographs(32, 9)


def test_images_are_normalised_by_channel():
    white = data.normalised(np.ones((1, 1, 3), np.float32))[0, 0]
    np.testing.assert_allclose(white, [2.2489, 2.4286, 2.64], atol=1e-3)
