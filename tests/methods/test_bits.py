"""How many bits a share of sixteen buys."""

from typing import Any

import pytest

from tokred.cache.quantise import bits_within, mixed_bits
from tokred.methods import make_plan
from tokred.models import DecoderConfig

LAYOUT = DecoderConfig(vocab=13, width=16, depth=2, heads=4, hidden=24, context=32).layout


def reduction(name: str, **options: Any) -> Any:
    return make_plan(name, LAYOUT, **options).steps[0][1]


def test_the_most_bits_within_a_share():
    assert [bits_within(keep) for keep in (1.0, 0.5, 0.49, 0.25, 0.2, 0.125)] == [8, 8, 4, 4, 2, 2]
    with pytest.raises(ValueError, match="less than 2"):
        bits_within(0.12)
    assert reduction("kivi", keep=0.3).bits == 4 and reduction("kivi").bits == 2


@pytest.mark.parametrize("keep", [0.13, 0.2, 0.25, 0.3, 0.45])
def test_a_mean_entry_has_the_share(keep: float):
    high, low, share = mixed_bits(keep)
    assert 0 < share < 1 and high == 2 * low
    assert share * high + (1 - share) * low == pytest.approx(16 * keep, abs=0.03)


def test_a_fifth_is_the_published_mix():
    assert mixed_bits(0.2) == (4, 2, pytest.approx(0.6))
    mix = reduction("zipcache", keep=0.2)
    assert (mix.high, mix.low) == (4, 2) and mix.salient == pytest.approx(0.6)
    for keep in (0.1, 0.5):
        with pytest.raises(ValueError, match="between 2 and 8 bits"):
            reduction("zipcache", keep=keep)
