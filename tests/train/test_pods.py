"""What the TPU compiler said of the pods, and of a small model if it is installed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from tokred.models.vit import ViTConfig
from tokred.train import pods
from tokred.train.state import Weights

KEPT = Path(__file__).parents[2] / "docs" / "pods.json"
SMALL = ViTConfig(
    image_size=(128, 128), patch=(16, 16), width=256, depth=4, heads=4, dtype=jnp.bfloat16
)
HLO = """
%all-reduce-scatter.1 (a: bf16[8,6]) -> bf16[4,6] {
  ROOT %all-reduce.1 = bf16[8,6]{1,0:T(8,128)(2,1)} all-reduce(%a), channel_id=1, to_apply=%add
}
%fused_computation.1 (b: bf16[4,6]) -> bf16[8,6] {
  %all-gather.1 = bf16[8,6]{1,0} all-gather(%b), channel_id=7, dimensions={0}
}
%async_collective_fusion.2 (b: bf16[4,6]) -> bf16[8,6] {
  ROOT %all-gather.2 = bf16[8,6]{1,0} all-gather(%b), channel_id=7, dimensions={0}
}
ENTRY %main (c: f32[]) -> f32[] {
  %all-gather-start.3 = (f32[3]{0}, f32[6]{0}) all-gather-start(%d), channel_id=8, dimensions={0}
  %all-gather-done.3 = f32[6]{0} all-gather-done(%all-gather-start.3)
  %all-reduce.2 = (f32[], /*index=1*/f32[6]{0}) all-reduce(%e, %f), channel_id=9, to_apply=%add
}
"""


@pytest.fixture(scope="module")
def rows() -> list[pods.Row]:
    return json.loads(KEPT.read_text())


def test_every_pod_and_plan_is_kept_and_fits(rows: list[pods.Row]):
    kept = [(row["pod"], row["plan"]) for row in rows]
    assert kept == sorted((pod.name, plan) for pod in pods.PODS for plan in pods.PLANS)
    assert all(row["fits"] and row["chips"] == 256 for row in rows)
    assert {(row["batch"], row["remat"]) for row in rows} == {(4096, 0)}


@pytest.mark.parametrize("pod", [pod.name for pod in pods.PODS])
def test_on_a_pod_reductions_talk_as_the_dense_model_does(rows: list[pods.Row], pod: str):
    talk = {row["plan"]: row for row in rows if row["pod"] == pod}
    for row in talk.values():
        assert set(row["collectives"]) == set(talk["dense"]["collectives"])
        assert row["activation_gathers"] == 0
    assert set(talk["dense"]["collectives"]) == {"all-gather", "all-reduce", "reduce-scatter"}


def test_reductions_count_less_and_hold_less(rows: list[pods.Row]):
    for pod in pods.PODS:
        row = {row["plan"]: row for row in rows if row["pod"] == pod.name}
        for plan in ("evit", "tome"):
            assert row[plan]["gflops"] < 0.75 * row["dense"]["gflops"]
            assert row[plan]["temp_mib"] < row["dense"]["temp_mib"]


def test_collectives_are_counted_once():
    counts = pods.count_collectives(HLO)
    assert counts == {"all-gather": 2, "all-reduce": 1, "reduce-scatter": 1}
    shapes = {found.shapes for found in pods.find_collectives(HLO)}
    assert shapes == {((8, 6),), ((6,),), ((), (6,))}


def test_a_gather_of_no_weight_is_found():
    kernel, bias = jnp.zeros((2, 24)), jnp.zeros(6)
    assert pods.count_activation_gathers(HLO, Weights({"kernel": kernel, "bias": bias}, {})) == 0
    assert pods.count_activation_gathers(HLO, Weights({"kernel": kernel}, {})) == 1


def test_rows_replace_their_elders(tmp_path: Path):
    path = tmp_path / "new" / "pods.json"
    for pod, plan, value in (("b", "x", 1), ("a", "y", 2), ("b", "x", 3)):
        pods.write_row(path, {"pod": pod, "plan": plan, "value": value})
    assert [row["value"] for row in json.loads(path.read_text())] == [2, 3]


def test_a_glob_that_fits_nothing_is_told_what_there_is():
    assert [name for _, name in pods.choose("v5e-256/*")] == list(pods.PLANS)
    with pytest.raises(ValueError, match=r"--only='v9' fits none of v5e-256/dense.*change"):
        pods.choose("v9")


def test_without_the_compiler_one_sentence_names_the_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="libtpu, is not installed; run `make tpu`"):
        pods.main(["--out=never.json"])


@pytest.mark.tpu_compile
def test_the_tpu_compiler_adds_no_kind_of_collective():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed; run `make tpu`")
    pods.leave_devices_alone()
    pod = pods.Pod("v5e-8", "v5e:2x4", (4, 2), 16)
    rows: dict[str, Any] = {
        name: pods.compile_row(pod, name, SMALL, batch=512) for name in pods.PLANS
    }
    for row in rows.values():
        assert row["fits"] and row["activation_gathers"] == 0
        assert set(row["collectives"]) == set(rows["dense"]["collectives"])
