"""The table of operations runs at a small size."""

import json

from benchmarks.ops import main


def test_every_operation_is_timed_beside_a_block(capsys):
    main(["--batch", "1", "--tokens", "9", "--width", "64", "--rounds", "1", "--json"])
    told = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in told["rows"]}
    assert rows["block"]["share"] == 1.0 and told["tokens"] == 9
    assert {"top-k: sort", "gather half: take", "put half back: where", "rows alone"} <= set(rows)
    assert all(row["ms_low"] <= row["ms"] <= row["ms_high"] for row in rows.values())
