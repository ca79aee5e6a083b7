"""Pictures of routing over a text."""

import numpy as np
import pytest

from tokred.viz import routing_html, routing_text, write_routing

PIECES = list("a<b\n")
ROUTED = {
    "around_3": np.array([[True, False, False, True]]),
    "around_1": np.array([[True, True, False, False]]),
}


def test_html_shades_each_token_by_the_layers_it_entered():
    page = routing_html([PIECES], ROUTED)
    assert 'rgba(31, 119, 180, 1.00)" title="layers 1, 3">a</span>' in page
    assert 'rgba(31, 119, 180, 0.50)" title="layers 1">&lt;</span>' in page
    assert 'rgba(31, 119, 180, 0.00)" title="layers ">b</span>' in page
    assert "(1, 3)" in page


def test_spans_are_named_by_their_ends():
    page = routing_html([PIECES], {"around_2_4": ROUTED["around_1"]})
    assert "(2-4)" in page and 'title="layers 2-4"' in page


def test_text_marks_every_token_below_its_line():
    one = {site: table[0] for site, table in ROUTED.items()}
    assert routing_text(PIECES, one, width=3) == "a<b\n#5.\n·\n5"


def test_written_files(tmp_path):
    page, picture = write_routing([PIECES], ROUTED, tmp_path)
    assert page.read_text().startswith("<!doctype html>")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_where_nothing_was_routed(tmp_path):
    assert write_routing([PIECES], {}, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_site_without_layer_is_an_error():
    with pytest.raises(ValueError, match="names no layer"):
        routing_html([PIECES], {"input": ROUTED["around_1"]})
