"""What stands around the steps: guards, transfers, compilations, traces, saving and stopping."""

import jax
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.models.vit import ViT, ViTConfig
from tokred.nn.skeleton import split_model
from tokred.train.clock import Clock, Tracer
from tokred.train.guards import NotFiniteError
from tokred.train.log import RunLog
from tokred.train.loop import Around, Stage, run_stage
from tokred.train.losses import ImageObjective
from tokred.train.mesh import make_mesh, place_by_rules
from tokred.train.processes import Preempted

CONFIG = ViTConfig(
    image_size=(8, 8), patch=(2, 2), channels=1, width=16, depth=2, heads=2, classes=4
)
SOFT = make_plan("diffrate", CONFIG.layout).with_twin("soft")
OPTIMIZER = {"lr": 1e-3, "warmup": 0.0}


class Rows:
    """Endless batches; `broken` ones hold a NaN, and from `short` on they have fewer rows."""

    def __init__(self, broken=(), short=None):
        self.drawn, self.broken, self.short = 0, broken, short

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        rows = 16 if self.short is None or self.drawn < self.short else 8
        image = np.random.default_rng(self.drawn).normal(size=(rows, 8, 8, 1)).astype(np.float32)
        if self.drawn in self.broken:
            image[0] = np.nan
        label = np.arange(rows, dtype=np.int32) % 4
        return {"image": image, "label": label, "id": 100 * self.drawn + label}

    def get_state(self):
        return {"next_index": self.drawn}

    def set_state(self, state):
        self.drawn = state["next_index"]


def run(rows, *, steps=8, plan=SOFT, mesh=((8,), ("data",)), **around):
    stage = Stage("train", ImageObjective(plan), steps, "", OPTIMIZER)
    skeleton, weights = split_model(ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0)))
    mesh = make_mesh(*mesh)
    state = stage.init(weights, jax.random.key(0))
    state = jax.device_put(state, place_by_rules(state, mesh))
    around.setdefault("progress", False)
    return run_stage(stage, skeleton, state, rows, mesh=mesh, around=Around(**around))


class Saves(list):
    """Remembers (step, place) of what is saved."""

    def __call__(self, state, place):
        assert int(jax.device_get(state["fault"])) == 0
        assert all(np.isfinite(jax.device_get(v)).all() for v in state["params"].values())
        self.append((int(jax.device_get(state["step"])), place["next_index"]))


def test_a_broken_batch_ends_the_run_at_the_last_good_state():
    saves = Saves()
    with pytest.raises(NotFiniteError) as error:
        run(Rows(broken={6}), every=4, save=saves, save_every=4)
    sentence = str(error.value)
    for words in ("the images", "at step 6", "steps 5 to 8", "[600, 601, 602, 603", "after step 5"):
        assert words in sentence, sentence
    assert saves == [(4, 4), (5, 5)]


def test_nothing_sound_is_said_and_not_saved():
    saves = Saves()
    with pytest.raises(NotFiniteError, match="no step was sound"):
        run(Rows(broken={1}), every=1, save=saves)
    assert saves == []


def test_saving_and_stopping_come_at_their_steps():
    saves, asked = Saves(), []

    def stop(step):
        asked.append(step)
        return step == 5

    with pytest.raises(Preempted) as stopped:
        run(Rows(), save=saves, save_every=2, stop=stop)
    assert stopped.value.step == 5
    assert saves == [(2, 2), (4, 4), (5, 5)] and asked == [1, 2, 3, 4, 5]


def test_nothing_is_compiled_after_the_first_step():
    clock = Clock()
    run(Rows(), steps=6, every=2, clock=clock)
    summary = clock.summary()
    assert summary["steps"] == 5 and summary["compilations"] == 0


def test_another_shape_is_counted_and_said():
    with pytest.warns(UserWarning, match="compiled 1 times after its first step"):
        run(Rows(short=4), steps=5)


@pytest.mark.usefixtures("unchecked")
def test_the_inner_loop_moves_nothing_unasked(monkeypatch):
    monkeypatch.setattr("tokred.train.loop.to_mesh", lambda batch, mesh: batch)
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        run(Rows(), steps=2)


@pytest.mark.parametrize(
    "mesh", [((4, 2), ("data", "fsdp")), ((2, 2, 2), ("data", "fsdp", "tensor"))]
)
def test_any_mesh_runs_the_loop(mesh):
    state = run(Rows(), steps=2, mesh=mesh)
    kernel = state["params"]["blocks/0/attn/query/kernel"]
    assert kernel.sharding.spec[0] == "fsdp"


def test_a_trace_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tokred.train.clock.TRACED", range(1, 3))
    run(Rows(), steps=4, trace=Tracer(tmp_path))
    [path] = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    trace = jax.profiler.ProfileData.from_file(str(path))
    lines = [line for plane in trace.planes for line in plane.lines]
    assert any(event.name for line in lines for event in line.events)


def test_the_log_gets_what_the_seed_decides(tmp_path):
    for name in ("a", "b"):
        with RunLog(tmp_path / name, tensorboard=False) as log:
            run(Rows(), steps=4, every=2, log=log)
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("a", "b"))
    assert a == b and a.count(b"\n") == 2
