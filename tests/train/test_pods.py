"""What the TPU compiler said of the pods, and of small models if it is installed."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from tokred.models.decoder import DecoderConfig
from tokred.models.vit import ViTConfig
from tokred.nn.skeleton import Weights
from tokred.train import pod_tasks, pods
from tokred.train.collectives import (
    count_activation_gathers,
    count_collectives,
    find_collectives,
)

KEPT = Path(__file__).parents[2] / "docs" / "pods.json"
FEW = pod_tasks.Pod("v5e:2x4", 16)
SPLIT = {"few": {"data": 2, "fsdp": 2, "tensor": 2}}
IMAGES = pod_tasks.Task(
    "vit",
    "train",
    ViTConfig(
        image_size=(128, 128), patch=(16, 16), width=256, depth=4, heads=4, dtype=jnp.bfloat16
    ),
    batch=512,
    plans=pod_tasks.VIT.plans,
    meshes={"few": {"data": 4, "fsdp": 2}},
)
WORDS = DecoderConfig(
    vocab=512, width=256, depth=2, heads=4, kv_heads=2, context=128, dtype=jnp.bfloat16
)
TEXT = pod_tasks.Task("lm", "train", WORDS, 32, pod_tasks.LM.plans, SPLIT, remat=(2,))
TOKEN = pod_tasks.Task(
    "lm", "decode", WORDS, 32, pod_tasks.DECODING.plans, {"few": {"data": 4, "tensor": 2}}
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


def test_every_task_is_kept_and_fits(rows: list[pods.Row]):
    kept = [tuple(row[field] for field in pods.KEY) for row in rows]
    wanted = [(pod, task.model, task.step, plan) for pod, task, plan in pods.choose("*")]
    assert kept == sorted(wanted)
    for row in rows:
        assert row["fits"] and row["chips"] == {"v5e-8": 8, "v5e-16": 16}.get(row["pod"], 256)
        pod, model, step = (row[field] for field in pods.KEY[:3])
        (task,) = (
            t for t in pod_tasks.TASKS if (t.model, t.step) == (model, step) and pod in t.meshes
        )
        assert (row["batch"], row["remat"]) == (task.batch, task.remat[0])
        assert row["mesh"] == task.meshes[row["pod"]]


def of(rows: list[pods.Row], pod: str, task: pod_tasks.Task) -> dict[str, pods.Row]:
    where = (pod, task.model, task.step)
    return {row["plan"]: row for row in rows if (row["pod"], row["model"], row["step"]) == where}


@pytest.mark.parametrize("pod", pod_tasks.VIT.meshes)
def test_on_a_pod_reductions_talk_as_the_dense_model_does(rows: list[pods.Row], pod: str):
    talk = of(rows, pod, pod_tasks.VIT)
    for row in talk.values():
        assert set(row["collectives"]) == set(talk["dense"]["collectives"])
        assert row["activation_gathers"] == 0
    assert set(talk["dense"]["collectives"]) == {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.parametrize("task", [pod_tasks.LM, pod_tasks.DECODING], ids=lambda task: task.step)
def test_on_a_pod_routing_adds_no_collective(rows: list[pods.Row], task: pod_tasks.Task):
    routed, dense = (of(rows, "v5e-256", task)[plan] for plan in ("mod", "dense"))
    assert routed["collectives"] == dense["collectives"]
    assert routed["activation_gathers"] == dense["activation_gathers"]


def test_the_rate_of_deletion_adds_no_collective_of_its_own(rows: list[pods.Row]):
    """The compiler sums it with the loss."""
    learned, dense = (of(rows, "v5e-16", pod_tasks.PAIRS)[plan] for plan in ("mrt5", "dense"))
    assert learned["collectives"] == dense["collectives"]
    buckets = of(rows, "v5e-16", pod_tasks.BUCKETS)["mrt5"]
    assert buckets["collectives"] == {"all-reduce": 1}  # which bucket


def test_applied_reductions_do_not_talk(rows: list[pods.Row]):
    """But for the eigenvectors of tokencut, which this compiler does not split among chips, and for
    zipcache, whose rows are rewritten together."""
    for task in (pod_tasks.APPLYING, pod_tasks.CACHED):
        talking = {
            name for name, row in of(rows, "v5e-8", task).items() if row["collectives"]
        }  # fmt: skip
        assert talking <= {"tokencut", "zipcache"}


def test_a_fifth_of_a_cache_takes_less_memory(rows: list[pods.Row]):
    held = {name: row["arguments_mib"] for name, row in of(rows, "v5e-8", pod_tasks.CACHED).items()}
    whole = held.pop("dense")
    assert held.pop("quest") > whole  # bounds of pages, beside all entries
    assert max(held.values()) < 0.65 * whole  # weights included


def test_reductions_count_less_and_hold_less(rows: list[pods.Row]):
    for pod in pod_tasks.VIT.meshes:
        row = of(rows, pod, pod_tasks.VIT)
        for plan in ("evit", "tome"):
            assert row[plan]["gflops"] < 0.75 * row["dense"]["gflops"]
            assert row[plan]["temp_mib"] < row["dense"]["temp_mib"]
    row = of(rows, "v5e-256", pod_tasks.LM)
    assert row["mod"]["gflops"] < 0.75 * row["dense"]["gflops"]


def test_collectives_are_counted_once():
    counts = count_collectives(HLO)
    assert counts == {"all-gather": 2, "all-reduce": 1, "reduce-scatter": 1}
    shapes = {found.shapes for found in find_collectives(HLO)}
    assert shapes == {((8, 6),), ((6,),), ((), (6,))}


def test_a_gather_of_no_weight_is_found():
    kernel, bias = jnp.zeros((2, 24)), jnp.zeros(6)
    assert count_activation_gathers(HLO, Weights({"kernel": kernel, "bias": bias}, {})) == 0
    assert count_activation_gathers(HLO, Weights({"kernel": kernel}, {})) == 1
    double = Weights({"kernel": kernel, "wide": jnp.zeros(12)}, {})
    assert count_activation_gathers(HLO, double, parts=2) == 0


def test_rows_replace_their_elders(tmp_path: Path):
    path = tmp_path / "new" / "pods.json"
    for pod, plan, value in (("b", "x", 1), ("a", "y", 2), ("b", "x", 3)):
        row = {"pod": pod, "model": "m", "step": "train", "plan": plan, "value": value}
        pods.write_row(path, row)
    assert [row["value"] for row in json.loads(path.read_text())] == [2, 3]


def test_a_glob_that_fits_nothing_is_told_what_there_is():
    chosen = [name for _, _, name in pods.choose("v5e-256/vit_b16/*")]
    assert chosen == list(pod_tasks.VIT.plans)
    with pytest.raises(ValueError, match=r"--only='v9' fits none of v5e-256/vit_b16/train/dense"):
        pods.choose("v9")


def test_without_the_compiler_one_sentence_names_the_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="libtpu, is not installed; run `make tpu`"):
        pods.main(["--out=never.json"])


def compiled(task: pod_tasks.Task) -> dict[str, pods.Row]:
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed; run `make tpu`")
    pods.leave_devices_alone()
    rows = {name: pods.compile_row("few", task, name, FEW) for name in task.plans}
    assert all(row["fits"] for row in rows.values())
    return rows


@pytest.mark.tpu_compile
def test_the_tpu_compiler_adds_no_kind_of_collective():
    rows = compiled(IMAGES)
    for row in rows.values():
        assert row["activation_gathers"] == 0
        assert set(row["collectives"]) == set(rows["dense"]["collectives"])


@pytest.mark.tpu_compile
@pytest.mark.parametrize("task", [TEXT, TOKEN], ids=lambda task: task.step)
def test_for_the_tpu_compiler_routing_adds_no_collective(task: pod_tasks.Task):
    rows = compiled(task)
    assert rows["mod"]["activation_gathers"] == rows["dense"]["activation_gathers"]
    assert set(rows["mod"]["collectives"]) == set(rows["dense"]["collectives"])
