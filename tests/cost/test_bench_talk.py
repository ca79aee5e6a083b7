"""Fewer visual tokens beside all of them."""

import pytest

from tokred.__main__ import main
from tokred.cost.bench_talk import bench_talk
from tokred.models import vlm_config

CONFIG = vlm_config(
    "vlm_1m",
    vision={"width": 16, "depth": 1, "heads": 2, "image_size": (16, 16)},
    decoder={"width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "hidden": 32},
)


def test_rows_count_tokens_and_macs():
    rows = bench_talk(CONFIG, ["dense", "mqt", "pooling"], lengths=(1, 4), tokens=8, rounds=1)
    assert [(row["method"], row["tokens"]) for row in rows] == [
        ("dense", 17 - 1), ("mqt 1", 1), ("mqt 4", 4), ("pooling 1", 1), ("pooling 4", 4),
    ]  # fmt: skip
    ratios = {row["method"]: row["macs_ratio"] for row in rows}
    assert ratios["dense"] == 1 and ratios["mqt 1"] < ratios["mqt 4"] < 1
    assert all(row["ms"] > 0 and row["pass"] == "prefill" for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vlm_1m", "--keep", "0.5"], "--keep is not for 'vlm_1m'"),
        (["--model", "lm_3m", "--lengths", "1"], "--lengths is not for 'lm_3m'"),
        (["--model", "vlm_2m"], "model 'vlm_2m' is unknown"),
    ],
)
def test_options_of_other_models_are_refused(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
