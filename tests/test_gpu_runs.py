"""The runs of a GPU: they are commands that exist, and nothing is kept where there is none."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from tokred.__main__ import make_parser
from tokred.methods import get_method

ROWS = [
    {"method": "dense", "macs_ratio": 1.0, "ms": 2.0, "ms_ratio": 1.0, "conversion": None},
    {"method": "tome", "macs_ratio": 0.65, "ms": 1.5, "ms_ratio": 0.75, "conversion": 0.71},
]


@pytest.mark.parametrize("name", gpu.runs())
def test_every_run_is_a_command(name: str):
    for how in (gpu.runs()[name], gpu.small(name, gpu.runs()[name])):
        args = make_parser().parse_args(["bench", *how])
        methods = args.methods.split(",")
        assert methods[0] == "dense" and all(get_method(method) for method in methods)


def fake(monkeypatch: pytest.MonkeyPatch, platform: str) -> list[list[str]]:
    """No process starts; what was asked for."""
    asked: list[list[str]] = []

    def run(command: list[str], **how: Any) -> Any:
        asked.append(command)
        told = {"rows": ROWS, "device": platform, "jax": "0", "batch": 1}
        return subprocess.CompletedProcess(command, int("vit_l" in str(command)), json.dumps(told))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "find_platform", lambda: platform)
    return asked


def test_a_gpu_keeps_what_it_ran_and_does_not_repeat_it(tmp_path: Path, monkeypatch, capsys):
    asked = fake(monkeypatch, "gpu")
    only = [f"--out={tmp_path}", "--only=vit_[bl]*"]
    assert gpu.main(only) == 1  # one model failed, the other is kept
    kept = sorted(path.stem for path in tmp_path.glob("*.json"))
    assert kept == ["vit_b16_224_b1", "vit_b16_224_b256", "vit_b16_224_b32"]
    assert "vit_l16_384_b1: failed with exit code 1" in capsys.readouterr().err
    assert len(asked) == 6 and "--dtype=bfloat16" in asked[0]
    gpu.main(only)
    assert len(asked) == 9


def test_without_a_gpu_nothing_is_kept(tmp_path: Path, monkeypatch, capsys):
    asked = fake(monkeypatch, "cpu")
    assert gpu.main([f"--out={tmp_path / 'none'}"]) == 0
    assert len(asked) == 3  # a ViT, a decoder in training, a decoder that writes
    assert set(gpu.SMALL["vit"]) < set(asked[0]) and not (tmp_path / "none").exists()
    assert "The table of GPUs is missing" in capsys.readouterr().out
    assert gpu.main([f"--out={tmp_path}", "--only=zz"]) == 2
