"""The same curve on any mesh, and the same state from any checkpoint."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tokred.train.config import load_config
from tokred.train.inputs import make_inputs
from tokred.train.log import RunLog
from tokred.train.loop import Around, run_stage
from tokred.train.setup import make_setup

STEPS = 50
MESHES = {
    "1": (1, (1,), ("data",)),
    "8": (8, (8,), ("data",)),
    "4x2": (8, (4, 2), ("data", "fsdp")),
    "2x2x2": (8, (2, 2, 2), ("data", "fsdp", "tensor")),
}


class Lines(RunLog):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__(Path(), write=False)
        self.losses = []

    def write(self, stage, step, numbers, **times):
        self.losses.append(numbers["loss"])


def curve(request, mesh, *more, recipe="digits_dense.py", steps=STEPS):
    """Losses of the first steps of a recipe."""
    count, shape, axes = MESHES[mesh]
    overrides = [f"train.steps={steps}", "rates.steps=0", "data.threads=0", *more]
    config = load_config(str(request.config.rootpath / "configs" / recipe), overrides)
    config.mesh.update({"shape": shape, "axes": axes})
    setup = make_setup(config, jax.devices()[:count])
    inputs, log = make_inputs(config, setup.model, setup.mesh), Lines()
    run_stage(
        setup.stages[0],
        setup.skeleton,
        setup.start(0, setup.init()),
        inputs.train_batches(0),
        mesh=setup.mesh,
        around=Around(log=log, every=1, progress=False),
    )
    return np.array(log.losses)


@pytest.fixture(scope="module")
def alone(request):
    return curve(request, "1")


@pytest.mark.parametrize(
    "mesh", ["4x2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("8", "2x2x2"))]
)
def test_the_curve_does_not_depend_on_the_devices(request, alone, mesh):
    losses = curve(request, mesh)
    assert alone[-1] < alone[0] - 0.2
    np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("uncached")
def test_nor_on_the_parts_of_the_batch(request, alone):
    losses = curve(request, "8", "optimizer.accumulate=2")
    np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_nor_does_that_of_lengths_that_take_turns(request):
    """The same length is drawn everywhere, whatever the mesh."""
    how = {"recipe": "grid_mqt.py:smoke", "steps": 4}
    one, all_ = (curve(request, mesh, "train.each=(1, 8)", **how) for mesh in ("1", "2x2x2"))
    np.testing.assert_allclose(one, all_, rtol=0, atol=1e-5)


def test_weights_are_born_in_parts(request):
    config = load_config(str(request.config.rootpath / "configs/digits_dense.py"))
    config.mesh.update({"shape": (2, 4), "axes": ("data", "fsdp")})
    setup = make_setup(config)
    state = setup.start(0, setup.init())
    name = "blocks/0/mlp/fc1/kernel"
    moments = state["opt"][1][0].mu
    for kernel in (state["params"][name], moments[name]):
        assert {s.data.shape for s in kernel.addressable_shards} == {(16, 128)}
