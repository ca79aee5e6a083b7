"""Meshes, rules over paths, and sentences for those that do not fit."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tokred.methods import make_plan
from tokred.models.decoder import Decoder, DecoderConfig
from tokred.nn.skeleton import split_model
from tokred.train.mesh import (
    AXES,
    batch_sharding,
    check_batch,
    make_mesh,
    place_by_rules,
    round_up,
    shard_of,
    to_mesh,
)

TREE = {
    "params": {
        "blocks/0/attn/query/kernel": jnp.zeros((16, 16)),
        "blocks/0/attn/out/kernel": jnp.zeros((16, 16)),
        "blocks/0/mlp/fc1/bias": jnp.zeros(32),
        "norm/scale": jnp.zeros(16),
    },
    "opt": ({"mu": {"blocks/0/attn/query/kernel": jnp.zeros((16, 16))}, "count": jnp.zeros(())},),
}


def specs(shape, axes, **more):
    places = place_by_rules(TREE, make_mesh(shape, axes), **more)
    return jax.tree.map(lambda place: place.spec, places)


def test_axes_that_the_mesh_lacks_are_left_out():
    found = specs((8,), ("data",))
    assert set(jax.tree.leaves(jax.tree.map(lambda s: any(s), found))) == {False}
    found = specs((2, 4), ("data", "fsdp"))["params"]
    assert found["blocks/0/attn/query/kernel"] == PartitionSpec("fsdp", None)
    assert found["blocks/0/attn/out/kernel"] == PartitionSpec(None, "fsdp")


def test_fsdp_and_tensor_meet_in_one_kernel_and_its_moments():
    found = specs((2, 2, 2), ("data", "fsdp", "tensor"))
    both = PartitionSpec("fsdp", "tensor")
    assert found["params"]["blocks/0/attn/query/kernel"] == both
    assert found["opt"][0]["mu"]["blocks/0/attn/query/kernel"] == both
    assert found["params"]["blocks/0/mlp/fc1/bias"] == PartitionSpec("tensor")
    assert found["params"]["norm/scale"] == found["opt"][0]["count"] == PartitionSpec()


def test_own_rules_come_first():
    rules = ((r"norm/scale$", ("fsdp",)), (r".", ()))
    assert specs((8,), ("fsdp",), rules=rules)["params"]["norm/scale"] == PartitionSpec("fsdp")


def test_arrays_without_a_rule_are_reported():
    mesh = make_mesh((8,), ("data",))
    with pytest.warns(UserWarning, match=r"fits 1 arrays such as 'router/weight'.*mesh\.rules"):
        places = place_by_rules({"router/weight": jnp.zeros(3), "step": jnp.zeros(())}, mesh)
    assert places["router/weight"].is_fully_replicated


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("tie", [True, False])
def test_every_array_of_a_decoder_has_its_rule(experts, tie):
    config = DecoderConfig(
        vocab=64, width=32, heads=4, depth=2, qkv_bias=True, qk_norm=True, post_norm=True,
        tie=tie, experts=experts,
    )  # fmt: skip
    plan = make_plan("mod", config.layout, gate="predictor")
    model = nnx.eval_shape(lambda: Decoder(config, plan=plan, rngs=nnx.Rngs(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        places = place_by_rules(split_model(model)[1].params, make_mesh((2, 2, 2), AXES))
    mlp = "blocks/0/mlp/up" if experts else "blocks/0/mlp/up/kernel"
    assert places[mlp].spec == PartitionSpec(*[None] * bool(experts), "fsdp", "tensor")
    # Were words split by 'fsdp' in their width, so would be activations, and not by example.
    assert places["embed/embedding"].spec == PartitionSpec("tensor")


@pytest.mark.parametrize(
    ("shape", "axes", "sentence"),
    [
        ((4,), ("data",), r"needs 4 devices, there are 8"),
        ((3, -1), ("data", "fsdp"), r"needs 6 devices"),
        ((2, 4), ("data",), r"one size each"),
        ((8,), ("model",), r"must be different names of"),
        ((2, 4), ("data", "data"), r"different names"),
        ((-1, -1), ("data", "fsdp"), r"config\.mesh\.shape"),
    ],
)
def test_meshes_that_do_not_fit_are_named(shape, axes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_mesh(shape, axes)


def test_one_size_may_be_what_is_left():
    assert dict(make_mesh((-1, 2), ("data", "tensor")).shape) == {"data": 4, "tensor": 2}


def test_an_indivisible_axis_names_the_leaf():
    mesh = make_mesh((8,), ("fsdp",))
    tree = {"blocks/3/mlp/fc1/kernel": jnp.zeros((12, 32))}
    with pytest.raises(ValueError, match=r"12 of 'blocks/3/mlp/fc1/kernel'.*fsdp=8"):
        place_by_rules(tree, mesh)
    with pytest.raises(ValueError, match=r"names 2 axes, 'a/bias' has shape \(12,\)"):
        place_by_rules({"a/bias": jnp.zeros(12)}, mesh, ((r"bias$", ("fsdp", "tensor")),))


def test_batches_that_do_not_divide_are_named():
    mesh = make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    check_batch(mesh, 8, accumulate=2)
    with pytest.raises(ValueError, match=r"batch=6 must be a multiple of 4.*'tensor': 2"):
        check_batch(mesh, 6)
    with pytest.raises(ValueError, match=r"multiple of 8.*accumulate=2"):
        check_batch(mesh, 12, accumulate=2)
    assert [round_up(mesh, n) for n in (1, 4, 5)] == [4, 4, 8]


def test_one_process_reads_all_rows_and_spreads_them():
    mesh = make_mesh((4, 2), ("data", "tensor"))
    assert shard_of(mesh) == (0, 1)
    rows = np.arange(8.0).reshape(8, 1)
    placed = to_mesh({"image": rows}, mesh)["image"]
    assert placed.sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1)}
    np.testing.assert_array_equal(placed, rows)
