"""The table of operations runs at a small size."""

import itertools
import json

import jax
import numpy as np

from benchmarks.ops import candidates, main


def test_every_operation_is_timed_beside_a_block(capsys):
    main(["--batch", "1", "--tokens", "9", "--width", "64", "--rounds", "1", "--json"])
    told = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in told["rows"]}
    assert rows["block"]["share"] == 1.0 and told["tokens"] == 9
    assert {"top-k: sort", "gather half: take", "put half back: where", "rows alone"} <= set(rows)
    assert all(row["ms_low"] <= row["ms"] <= row["ms_high"] for row in rows.values())


def test_what_is_compared_does_the_same():
    calls = candidates(2, 9, 64)
    forms = (
        ("top-k: ", ("sort", "top_k")),
        ("gather half: ", ("take", "one_hot")),
        ("put half back: ", ("scatter", "where")),
        ("merge to half: ", ("scatter", "one_hot")),
        ("half in place: ", ("two sorts", "threshold")),
        ("gather's gradient: ", ("scatter-add", "put", "gather")),
    )
    for what, names in forms:
        found = [jax.tree.leaves(calls[what + name]()) for name in names]
        for one, other in itertools.pairwise(found):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)
    tokens, rows = (
        calls[f"state of half: {form}"]() for form in ("field by field", "in one array")
    )
    np.testing.assert_array_equal(tokens.x, rows[0])
    np.testing.assert_array_equal(tokens.size, rows[2][..., 0])
