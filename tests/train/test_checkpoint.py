"""What a checkpoint holds, which ones stay, and what it says when it does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred.nn.skeleton import Weights
from tokred.train import checkpoint
from tokred.train.checkpoint import METRIC, Checkpoints, check_same
from tokred.train.mesh import make_mesh, place_by_rules, with_places
from tokred.train.optimizer import make_optimizer
from tokred.train.state import init_state

SHAPES = {
    "blocks/0/mlp/fc1/kernel": (16, 8),
    "blocks/0/mlp/fc1/bias": (8,),
    "head/kernel": (16, 4),
    "reductions/mid_1/prune": (3,),
}
ABOUT = {"config": {"seed": 0}}


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_state(**parts):
    """A state after some steps, with something in every part."""
    params = {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    tx = make_optimizer(steps=10, lr=0.1, warmup=0.0, schedule="constant")
    state = init_state(
        Weights(params, {"count": jnp.uint32(7)}),
        tx,
        [name for name in params if "head" not in name],
        key=jax.random.key(3),
        controllers={"before 1": {"rate": numbers(2), "seen": jnp.int32(5)}},
        ema=True,
    )
    return {**state, "step": jnp.int32(6), **parts}


def save(path, state, step=6, **options):
    with Checkpoints(path, **options) as checkpoints:
        checkpoints.save(step, state, data={"place": {"next_index": step}}, about=ABOUT)
    return path


def restore(path, target):
    with Checkpoints(path, create=False) as checkpoints:
        return checkpoints.state(target)


def plain(state):
    return {**state, "key": jax.random.key_data(state["key"])}


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(plain(one)), jax.tree.leaves(plain(other)), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A workdir with the checkpoint of `make_state()`; nobody writes there."""
    return save(tmp_path_factory.mktemp("stored"), make_state())


@pytest.mark.parametrize(
    "policy, left",
    [
        ({}, [35]),
        ({"latest": 2}, [30, 35]),
        ({"latest": 1, "periodic": 10}, [10, 20, 30, 35]),
        ({"latest": 1, "best": 2}, [5, 15, 35]),
        ({"latest": 2, "periodic": 10, "best": 1}, [10, 15, 20, 30, 35]),
    ],
)
def test_which_checkpoints_stay(tmp_path, policy, left):
    accuracy = {5: 0.5, 10: 0.1, 15: 0.9, 20: 0.2, 25: 0.3, 30: 0.0, 35: 0.4}
    state = make_state()
    with Checkpoints(tmp_path, **policy) as checkpoints:
        for step, value in accuracy.items():
            metrics = {METRIC: value} if "best" in policy else None
            checkpoints.save(step, state, data={}, about=ABOUT, metrics=metrics)
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.steps == left
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == left


def test_a_policy_that_keeps_nothing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.checkpoint: needs latest >= 1"):
        Checkpoints(tmp_path, latest=0)


def test_every_part_comes_back_bit_for_bit(stored):
    state = make_state()
    back = restore(stored, jax.eval_shape(make_state))
    assert_same_bits(back, state)
    assert back["key"].dtype == state["key"].dtype
    np.testing.assert_array_equal(
        jax.random.normal(back["key"], (4,)), jax.random.normal(state["key"], (4,))
    )


def test_the_model_alone_is_what_training_gave(stored):
    state = make_state()
    target = jax.eval_shape(lambda: Weights(state["params"], state["rest"]))
    with Checkpoints(stored, create=False) as checkpoints:
        found = checkpoints.model(target)
    assert_same_bits(
        {"found": found, "key": state["key"]},
        {
            "found": Weights({**state["params"], **state["ema"]}, state["rest"]),
            "key": state["key"],
        },
    )


def test_an_existing_step_is_not_written_again(tmp_path):
    save(tmp_path, make_state())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    save(tmp_path, make_state(params={n: x + 1 for n, x in make_state()["params"].items()}))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


MESHES = {"8": ((8,), ("data",)), "4x2": ((4, 2), ("data", "fsdp")), "1": ((1,), ("data",))}


def on_mesh(name):
    shape, axes = MESHES[name]
    return make_mesh(shape, axes, devices=jax.devices()[: int(np.prod(shape))])


@pytest.mark.filterwarnings("ignore:no sharding rule fits")
def test_a_state_goes_from_mesh_to_mesh(tmp_path):
    state = make_state()
    for name in ("8", "4x2", "1", "8"):
        mesh = on_mesh(name)
        state = jax.device_put(state, place_by_rules(state, mesh))
        kernel = state["params"]["head/kernel"]
        assert kernel.addressable_shards[0].data.shape == (8 if name == "4x2" else 16, 4)
        save(tmp_path / name, state)
        for other in MESHES:
            target = with_places(jax.eval_shape(make_state), on_mesh(other))
            back = restore(tmp_path / name, target)
            assert_same_bits(back, make_state())
            jax.tree.map(assert_same_place, back, target)


def assert_same_place(array, like):
    assert array.sharding.is_equivalent_to(like.sharding, array.ndim)


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def shapes_with(part, leaves):
    """Shapes of `make_state()` with leaves of a part replaced, left out (None), or all left out."""
    shapes = jax.eval_shape(make_state)
    changed = {**shapes[part], **leaves} if leaves else {}
    return {**shapes, part: {name: leaf for name, leaf in changed.items() if leaf is not None}}


@pytest.mark.parametrize(
    "part, leaves, words",
    [
        (
            "params",
            {"head/bias": shaped(4)},
            r"'head/bias' should be float32\[4\], in the checkpoint it is absent; look at "
            r"model\.classes",
        ),
        (
            "params",
            {"reductions/mid_1/prune": None},
            r"'reductions/mid_1/prune' should be absent, in the checkpoint it is float32\[3\]; "
            r"look at train\.method",
        ),
        (
            "params",
            {"blocks/0/mlp/fc1/kernel": shaped(16, 12)},
            r"fc1/kernel' should be float32\[16, 12\], in the checkpoint it is float32\[16, 8\]; "
            r"look at model\.mlp_ratio",
        ),
        (
            "params",
            {"head/kernel": shaped(16, 4, dtype=jnp.bfloat16)},
            r"'head/kernel' should be bfloat16\[16, 4\], in the checkpoint it is float32\[16, 4\]",
        ),
        ("ema", {}, r"'ema/blocks/0/mlp/fc1/bias' should be absent.*look at optimizer\.ema"),
        (
            "controllers",
            {},
            r"'controllers/before 1/rate' should be absent, .*look at train\.method",
        ),
        ("opt", {}, r"'opt/1/0/count' should be absent, .*look at optimizer"),
    ],
)
def test_what_does_not_fit_is_named_with_its_field(stored, part, leaves, words):
    with pytest.raises(ValueError, match=words):
        restore(stored, shapes_with(part, leaves))


def test_the_model_says_so_too(stored):
    target = Weights({"head/kernel": numbers(16, 5)}, {})
    with Checkpoints(stored, create=False) as checkpoints, pytest.raises(ValueError, match="look"):
        checkpoints.model(target)


def test_same_parts_pass():
    parts = {"params": {"cls": numbers(3)}, "ema": {}}
    check_same(parts, {"params": {"cls": jax.ShapeDtypeStruct((3,), jnp.float32)}, "ema": None})


@pytest.mark.parametrize("other", [1, 99])
def test_another_format_is_named(tmp_path, monkeypatch, other):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", other)
        save(tmp_path, make_state())
    words = rf"format {other}, this tokred reads format {checkpoint.FORMAT};"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=words):
        checkpoints.about()


def test_the_place_and_the_description_come_back(stored):
    with Checkpoints(stored, create=False) as checkpoints:
        assert checkpoints.latest == 6
        assert checkpoints.data() == {"place": {"next_index": 6}}
        assert checkpoints.about() == {"format": checkpoint.FORMAT, **ABOUT}


def test_reading_creates_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="is empty"):
        Checkpoints(tmp_path, create=False)
    assert not list(tmp_path.iterdir())
