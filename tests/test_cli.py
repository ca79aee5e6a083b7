"""The command line."""

import json
import subprocess
import sys

import jax
import pytest

from tokred.__main__ import main
from tokred.methods import list_methods
from tokred.models.sizes import DECODERS

SMALL = ["--model", "vit_ti16", "--image-size", "64", "--batch", "1", "--rounds", "1"]
ROW = {
    "method", "macs", "macs_ratio", "ms", "ms_ratio", "ms_low", "ms_high", "compile_s",
    "compile_ratio", "temp_bytes", "rounds", "conversion", "attention",
}  # fmt: skip
DECODER_ROW = ROW | {"pass", "share", "cache_bytes", "used_bytes"}
DECODER = ["--model", "lm_tiny", "--tokens", "16", "--batch", "1", "--rounds", "1"]


def bench_json(capsys, *arguments: str) -> dict:
    assert main(["bench", *SMALL, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_bench_json(capsys):
    result = bench_json(capsys, "--methods", "topk,random", "--keep", "0.5")
    assert [row["method"] for row in result["rows"]] == ["dense", "topk", "random"]
    assert all(set(row) == ROW | {"tokens", "tokens_by_layer"} for row in result["rows"])
    dense, reduced, _ = result["rows"]
    assert dense["macs_ratio"] == dense["ms_ratio"] == dense["compile_ratio"] == 1.0
    assert reduced["macs_ratio"] == reduced["macs"] / dense["macs"] < 1
    assert all(row["ms_low"] <= row["ms"] <= row["ms_high"] for row in result["rows"])
    assert {"device", "jax", "dtype", "batch", "path"} <= set(result)


def test_bench_solves_for_macs(capsys):
    rows = bench_json(capsys, "--methods", "dense,topk", "--macs", "0.8")["rows"]
    assert rows[1]["macs_ratio"] <= 0.8


def test_bench_at_tile_edges(capsys):
    result = bench_json(capsys, "--methods", "topk", "--round-to", "4")
    assert result["round_to"] == 4
    assert all(n % 4 == 0 or n == 17 for n in result["rows"][1]["tokens_by_layer"])


def test_bench_in_bfloat16(capsys):
    result = bench_json(capsys, "--methods", "dense", "--dtype", "bfloat16")
    assert result["dtype"] == "bfloat16"


def test_bench_prints_a_table(capsys):
    assert main(["bench", *SMALL, "--methods", "dense"]) == 0
    meta, head, _, dense = capsys.readouterr().out.splitlines()
    assert "packed twin" in meta and head.startswith("method") and dense.startswith("dense")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(DECODERS, "lm_tiny", {"width": 16, "depth": 2, "heads": 2})


def test_bench_of_a_decoder(capsys, tiny):
    how = ["--train", "--remat", "--decode", "--steps", "2", "--keep", "0.5", "--json"]
    assert main(["bench", *DECODER, *how]) == 0
    result = json.loads(capsys.readouterr().out)
    passes = ["forward"] * 2 + ["train"] * 2 + ["decode"] * 2 + ["decode, skip"]
    assert [row["pass"] for row in result["rows"]] == passes
    assert all(set(row) == DECODER_ROW for row in result["rows"])
    assert result["share"] == 0.5 and "fused" in result["ratios"] and "causal" in result["path"]


def test_a_table_has_no_empty_columns(capsys, tiny):
    assert main(["bench", *DECODER, "--best-dense"]) == 0
    meta, head, _, *rows = capsys.readouterr().out.splitlines()
    assert "the faster of dense" in meta and "cache" not in head and len(rows) == 3


def test_methods_lists_all(capsys):
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert [row["method"] for row in rows] == [method.name for method in list_methods()]
    assert all(row["summary"] and row["golden"] >= 0 for row in rows)
    assert main(["methods"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1
    assert main(["methods", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 2 and all(line.startswith("| ") for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--methods", "tme"],
        ["bench", "--model", "vit_q16"],
        ["bench", "--image-size", "225"],
        ["bench", "--keep", "2"],
        ["bench", "--methods", "topk", "--macs", "0.01"],
        ["bench", "--tokens", "64"],
        ["bench", "--model", "lm_3m", "--image-size", "64"],
        ["bench", "--model", "lm_4m"],
        ["bench", "--model", "lm_3m", "--methods", "mod,tome"],
        ["bench", "--model", "lm_3m", "--tokens", "4096"],
        ["bench", "--model", "lm_3m", "--tokens", "16", "--methods", "pmod", "--rounds", "1"],
    ],
)
def test_a_wrong_value_is_one_sentence(capsys, arguments: list[str]):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("tokred bench: ")


@pytest.mark.parametrize(
    "arguments", [["bench", "--rounds", "0"], ["bench", "--kep", "1"], [], ["sing"]]
)
def test_a_wrong_argument_is_one_sentence(capsys, arguments: list[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and len(err.splitlines()) == 1


def test_the_module_runs():
    command = [sys.executable, "-m", "tokred", "methods", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["methods"]


def test_what_was_timed_is_written_under_its_full_name(capsys, tmp_path):
    how = ["--methods", "dense,topk", "--ahead", "2", "--out", str(tmp_path)]
    rows = bench_json(capsys, *how)["rows"]
    assert all(row["ms_pipelined"] > 0 for row in rows)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("bench-vit_ti16-float32-b1-cpu") and "-jax" in path.name
    assert json.loads(path.read_text())["rows"] == rows


def test_fewer_rounds_than_asked_for_are_told(capsys):
    small = [*SMALL[:-1], "5", "--methods", "dense", "--seconds", "0", "--json"]
    assert main(["bench", *small]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"][0]["rounds"] == 1
    assert result["untrusted"].startswith("1 of 5 rounds")


def test_a_batch_that_does_not_fit_is_halved_and_told(capsys, monkeypatch):
    batches = []

    def bench(config, methods, *, batch, **how):
        batches.append(batch)
        if batch > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return [{"method": "dense", "rounds": 10}]

    monkeypatch.setattr("tokred.cli.bench.bench", bench)
    assert main(["bench", "--model", "vit_ti16", "--batch", "8", "--json"]) == 0
    out, err = capsys.readouterr()
    assert batches == [8, 4, 2] and json.loads(out)["batch"] == 2
    assert err.splitlines() == [
        "out of memory; batch 4 is tried",
        "out of memory; batch 2 is tried",
    ]


def test_cost_counts_by_layer(capsys):
    how = ["--model", "vit_ti16", "--image-size", "64", "--methods", "topk", "--keep", "0.5"]
    assert main(["cost", *how, "--json"]) == 0
    dense, topk = json.loads(capsys.readouterr().out)["rows"]
    for row in (dense, topk):
        assert row["macs"] == sum(layer["macs"] for layer in row["layers"])
        assert row["compiled_macs"] == pytest.approx(row["macs"], rel=0.1)
        assert row["bytes"] > 4 * row["params"]
    assert topk["macs_ratio"] < 1 and topk["activations"] < dense["activations"]
    assert main(["cost", *how]) == 0
    assert "topk layer 0" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["lm_3m", "byt5_tiny", "vlm_1m"])
def test_cost_of_other_models(capsys, model: str):
    assert main(["cost", "--model", model, "--tokens", "128", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["compiled_macs"] == pytest.approx(row["macs"], rel=0.1)


def test_a_command_without_its_extra_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokred.train.sweep", None)
    assert main(["sweep", "configs/sweep/digits.py"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "install tokred[train,export]" in err
