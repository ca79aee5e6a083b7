"""Kernels without a bias per key get it in channels; what they cannot take is told."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from tokred.ops import attention, kernels, position_mask, watch_choices
from tokred.ops.attention import KERNELS
from tokred.ops.carry import carry_bias
from tokred.ops.kernels import Asked, blocked, cudnn, fastest, refusal, splash, xla
from tokred.ops.spread import uneven

B, N, M, H, G, E = 2, 5, 7, 4, 2, 12
ORDER = jnp.arange(7.0)[None, :, None]


def inputs(dtype=jnp.float32, n=N, m=M):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, n, H, E), (B, m, G, E), (B, m, G, E))
    q, k, v = (jax.random.normal(key, s, dtype) for key, s in zip(keys[:3], shapes, strict=True))
    bias = jnp.tile(jnp.log1p(jnp.arange(1.0, m + 1)), (B, 1))
    return q, k, v, bias


def a_mesh(shape, axes):
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, axes, (AxisType.Auto,) * len(shape), devices=devices)


def as_xla(check=None):
    """XLA's attention where cuDNN's would run, with a look at what it gets."""

    def run(asked: Asked):
        if check is not None:
            check(asked)
        return xla(asked)

    return functools.partial(cudnn, fused=run)


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-3)])
def test_products_of_longer_heads_hold_the_bias(dtype, error):
    q, k, _, bias = inputs(dtype)
    a, b = carry_bias(q, k, bias, scale=0.3)
    assert a.shape[-1] == b.shape[-1] == 16
    logits = lambda q, k: jnp.einsum(  # noqa: E731
        "bnhe,bmhe->bhnm", q, jnp.repeat(k, 2, 2), preferred_element_type=jnp.float32
    )
    wanted = 0.3 * logits(q, k) + bias[:, None, None]
    np.testing.assert_allclose(0.3 * logits(a, b), wanted, rtol=0, atol=error)


def test_a_second_channel_halves_what_the_first_misses():
    q, k, v, bias = (x.astype(jnp.bfloat16) for x in inputs(m=64))
    full = [x.astype(jnp.float32) for x in (q, k, v)]
    exact = xla(Asked(full[0], full[1], full[2], 0.3, bias + 3.0))
    carried = as_xla()(Asked(q, k, v, 0.3, bias + 3.0))
    assert carried.dtype == jnp.bfloat16
    np.testing.assert_allclose(carried.astype(jnp.float32), exact, atol=1e-2)


@pytest.mark.parametrize("what", ["nothing", "bias", "mask", "pair_bias", "all"])
@pytest.mark.parametrize("kernel", ["blocked", "cudnn", "splash"])
def test_what_kernels_are_given_is_what_was_asked(kernel, what):
    q, k, v, bias = inputs()
    order = jnp.broadcast_to(ORDER, (B, M, 1))
    mask = position_mask(order[:, 2:7], order)
    pairs = jax.random.normal(jax.random.key(9), (B, H, N, M))
    asked = Asked(
        q, k, v, 0.3,
        bias if what in ("bias", "all") else None,
        pairs if what in ("pair_bias", "all") else None,
        mask if what in ("mask", "all") else None,
    )  # fmt: skip
    if kernel == "splash":
        if what not in ("nothing", "bias"):
            assert "no mask or bias" in refusal("splash", asked)
            return
        found = splash(asked, interpret=True)
    elif kernel == "blocked":
        found = blocked(asked)
    else:

        def even(asked: Asked):
            assert asked.bias is None
            if asked.pair_bias is not None or asked.mask is not None:
                assert asked.q.shape[1] % 2 == asked.k.shape[1] % 2 == 0
            else:
                assert asked.q.shape[-1] % 8 == 0

        found = as_xla(even)(asked)
    np.testing.assert_allclose(found, xla(asked), atol=2e-5)


@pytest.mark.parametrize("what", ["nothing", "bias", "mask", "segments"])
@pytest.mark.parametrize("kernel", ["xla", "blocked", "cudnn", "splash", "reference"])
def test_no_key_behind_a_query_is_seen(kernel, what):
    """As with a mask that says so for every pair."""
    q, k, v, bias = inputs(n=M)
    order = jnp.broadcast_to(ORDER, (B, M, 1))
    mask = jnp.arange(M) != 2
    mask = jnp.broadcast_to(mask, (B, M, M)) if what == "mask" else None
    if (kernel, what) == ("splash", "mask"):
        pytest.skip("it takes no mask by pairs")
    documents = jnp.array([[0, 0, 0, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 0]])
    asked = Asked(q, k, v, 0.3, bias if what == "bias" else None, None, mask, causal=True)
    seen = position_mask(order, order) if mask is None else position_mask(order, order) & mask
    if what == "segments":
        asked = asked._replace(segments=documents)
        seen &= documents[:, :, None] == documents[:, None]
    run = {"xla": xla, "cudnn": as_xla(), "splash": functools.partial(splash, interpret=True)}
    run |= {name: KERNELS[name] for name in ("blocked", "reference")}
    wanted = xla(asked._replace(mask=seen, causal=False, segments=None))
    np.testing.assert_allclose(run[kernel](asked), wanted, atol=2e-5)


@pytest.mark.parametrize("what", ["nothing", "bias", "pair_bias", "mask", "all"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lead", [(), (2,), (2, 1)])
def test_blocks_of_queries_are_attention(monkeypatch, what, causal, lead):
    """The last block is smaller; gradients too."""
    monkeypatch.setattr(kernels, "ROWS", 3)
    monkeypatch.setattr(kernels, "PARTS", 100)
    keys = jax.random.split(jax.random.key(1), 6)
    shapes = ((*lead, M, H, E), (*lead, M, G, E), (*lead, M, G, E), (*lead, M), (*lead, H, M, M))
    q, k, v, bias, pairs = (jax.random.normal(*x) for x in zip(keys[:5], shapes, strict=True))
    mask = jax.random.bernoulli(keys[5], 0.5, (*lead, M, M)).at[..., 0].set(True)
    given = {"bias": bias, "pair_bias": pairs, "mask": mask}
    given = {name: x for name, x in given.items() if what in (name, "all")}
    floats = {name: x for name, x in given.items() if name != "mask"}

    def loss(run, q, k, v, floats):
        asked = Asked(q, k, v, 0.3, causal=causal)._replace(**given)._replace(**floats)
        y = run(asked)
        return jnp.sin(y).sum(), y

    def both(run):
        return jax.jit(jax.value_and_grad(functools.partial(loss, run), (0, 1, 2, 3), True))

    found, wanted = (both(run)(q, k, v, floats) for run in (blocked, KERNELS["reference"]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, wanted)


def test_blocks_of_causal_queries_leave_out_the_keys_behind_them():
    """Half of the products but for the diagonal (9/16), and no more than `PARTS` blocks."""

    def flops(n, causal):
        x = jax.ShapeDtypeStruct((1, n, 1, 64), jnp.float32)
        run = jax.jit(lambda q, k, v: blocked(Asked(q, k, v, 0.1, causal=causal)))
        return dict(run.lower(x, x, x).compile().cost_analysis() or {})["flops"]

    assert flops(2048, True) / flops(2048, False) < 0.62
    assert flops(8192, True) / flops(8192, False) < 0.6


@pytest.mark.parametrize("how", [{}, {"policy": jnp.ones((B, M))}, {"cap": 5.0}, {"sink": True}])
@pytest.mark.parametrize("segments", [None, jnp.array([[0, 0, 0, 1, 1, 2, 2]] * B)])
def test_causal_attention_is_attention_with_a_mask(how, segments):
    q, k, v, bias = inputs(n=M)
    order = jnp.broadcast_to(ORDER, (B, M, 1))
    if segments is not None:
        order = jnp.stack([order[..., 0], segments.astype(jnp.float32)], -1)
    seen = attention(q, k, v, bias=bias, causal=True, segments=segments, **how)
    wanted = attention(q, k, v, bias=bias, mask=position_mask(order, order), **how)
    np.testing.assert_allclose(seen, wanted, atol=1e-5)


def test_gradients_pass_through_channels():
    q, k, v, bias = inputs()

    def loss(run, q, k, v, bias):
        return jnp.sin(run(Asked(q, k, v, 0.3, bias))).sum()

    every = (0, 1, 2, 3)
    wanted = jax.grad(functools.partial(loss, xla), every)(q, k, v, bias)
    found = jax.grad(functools.partial(loss, as_xla()), every)(q, k, v, bias)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_keys_that_are_not_valid_stay_unseen_in_channels():
    q, k, v, bias = inputs(jnp.bfloat16)
    hidden = bias.at[:, 4:].set(-1e30)
    seen = as_xla()(Asked(q, k, v, 0.3, hidden))
    fewer = as_xla()(Asked(q, k[:, :4], v[:, :4], 0.3, bias[:, :4]))
    np.testing.assert_allclose(seen.astype(float), fewer.astype(float), atol=1e-2)


def test_the_fastest_kernel_of_a_platform_that_takes_it():
    full, half = (Asked(*inputs(t)[:3], 0.3, inputs(t)[3]) for t in (jnp.float32, jnp.bfloat16))
    wide = half._replace(q=jnp.zeros((B, N, H, 128), jnp.bfloat16))
    assert "more" in refusal("splash", half)  # the tests' precision
    with jax.default_matmul_precision("default"):
        assert fastest(half, "tpu", 1) == "xla"  # short
        half = half._replace(k=jnp.zeros((B, kernels.LONG, G, E), jnp.bfloat16))
        assert [fastest(half, "tpu", n) for n in (1, 8)] == ["splash", "xla"]
        with jax.set_mesh(a_mesh((2,), ("data",))):
            assert fastest(half, "tpu", 8) == "splash"
    assert [fastest(full, p, 1) for p in ("cpu", "gpu", "tpu")] == ["blocked", "xla", "xla"]
    assert [fastest(half, p, 1) for p in ("cpu", "gpu")] == ["blocked", "cudnn"]
    assert fastest(wide, "gpu", 1) == "xla"


@pytest.mark.parametrize(
    ("shape", "axes"), [((8,), ("data",)), ((2, 2, 2), ("data", "fsdp", "tensor"))]
)
@pytest.mark.parametrize("what", ["nothing", "bias", "segments"])
def test_splash_runs_on_each_device(shape, axes, what):
    """As in one piece, with its gradients, and without talk of q, k and v."""
    mesh = a_mesh(shape, axes)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (H, G, G)
    q, k, v = (jax.random.normal(key, (8, 6, h, E)) for key, h in zip(keys, heads, strict=False))
    bias = jax.random.normal(keys[3], (8, 6)) if what == "bias" else None
    segments = jnp.arange(48).reshape(8, 6) // 4 if what == "segments" else None

    def loss(q, k, v, bias):
        asked = Asked(q, k, v, 0.3, bias, causal=True, segments=segments)
        y = splash(asked, interpret=True)
        return jnp.sin(y).sum(), y

    every = jax.value_and_grad(loss, (0, 1, 2) if bias is None else (0, 1, 2, 3), has_aux=True)
    wanted = jax.jit(every)(q, k, v, bias)
    with jax.set_mesh(mesh):
        tensor = "tensor" if "tensor" in axes else None
        lie = PartitionSpec(tuple(a for a in axes if a != "tensor"), None, tensor)
        placed = jax.device_put((q, k, v), NamedSharding(mesh, lie))
        run = jax.jit(every).lower(*placed, bias).compile()
        found = run(*placed, bias)
    assert found[0][1].sharding.spec[:1] == lie[:1]
    assert "all-gather" not in str(run.as_text())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, wanted)


def test_what_does_not_split_is_told():
    mesh = a_mesh((2, 2), ("data", "tensor"))
    shape = (4, 6, H, E)
    with jax.set_mesh(mesh):
        assert uneven(shape, 2) == ""
        for odd, groups in (((3, *shape[1:]), 2), (shape[1:], 2), (shape, 1)):
            assert "does not split among {'data': 2, 'tensor': 2}" in uneven(odd, groups)
        inner = jax.shard_map(
            lambda x: x + len(uneven((3, 6, H, E), 1)), in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec("data"),
        )  # fmt: skip
        np.testing.assert_array_equal(jax.jit(inner)(jnp.zeros(2)), 0)  # one device's own part
    with jax.set_mesh(a_mesh((2,), ("x",))):
        assert "axes ['x'] of the mesh are none of" in uneven(shape, 2)


def test_what_gives_way_is_warned_of_and_told():
    q, k, v, _ = inputs()
    policy = jnp.ones((B, N))
    with watch_choices() as found, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attention(q, k, v)
        attention(q, k[:, :N], v[:, :N], policy=policy)
        attention(q, k[:, :N], v[:, :N], policy=policy, implementation="xla")
    assert [choice.used for choice in found] == ["blocked", "reference", "reference"]
    assert [bool(choice.why) for choice in found] == [False, False, True]
    assert len(told) == 1 and "takes no policy" in str(told[0].message)


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_kernel_that_the_device_lacks_is_an_error(name):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=f"implementation='{name}' needs a .pu, this is a cpu"):
        attention(q, k, v, implementation=name)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "width"), [(197, 6, 6, 64), (512, 8, 2, 128)]
)
def test_splash_compiles_for_a_tpu(tokens, heads, groups, width):
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    one = SingleDeviceSharding(topology.devices[0])

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=one)

    def loss(q, k, v, bias):
        return splash(Asked(q, k, v, 0.125, bias)).astype(jnp.float32).sum()

    kv = shape(2, tokens, groups, width)
    args = shape(2, tokens, heads, width), kv, kv, shape(2, tokens, dtype=jnp.float32)
    with jax.default_matmul_precision("default"):
        step = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*args).compile()
    assert str(step.as_text()).count("tpu_custom_call") >= 3  # forward, queries, keys and values
