"""Fused attention kernels behind one signature, and what each of them can take."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.ops.carry import LARGE, carry_bias, pad_to
from tokred.ops.spread import on_each, told, uneven

HOMES = {"cudnn": "gpu", "splash": "tpu"}  # the only platforms of kernels
HALF = (jnp.bfloat16, jnp.float16)
WIDEST = 128  # channels of a head that cuDNN takes on all devices
TILE = 128  # of splash attention: tokens and channels
PADDING = -1  # the segment of what fills the last tile
LONG = 1024  # keys from which on splash attention is chosen: it pads, but holds no probabilities
ROWS, PARTS = 256, 16  # queries at a time on a CPU, unless that makes too many parts
NEGATIVE = -1e30  # finite: a query without any valid key stays finite
UNSEEN = 2 * NEGATIVE  # and looks at none that a mask hides


class Asked(NamedTuple):
    """Of attention: `bias` per key, `pair_bias` and `mask` per query and key; causal: no key behind
    a query's slot; segments: no key of another number; both for as many keys as queries."""

    q: Float[Array, "*B N H E"]
    k: Float[Array, "*B M G E"]
    v: Float[Array, "*B M G E"]
    scale: float
    bias: Float[Array, "*B M"] | None = None
    pair_bias: Float[Array, "*#B #H #N M"] | None = None
    mask: Bool[Array, "*#B N M"] | None = None
    causal: bool = False
    segments: Int[Array, "*B N"] | None = None


def refusal(name: str, asked: Asked) -> str:
    """Why a kernel cannot take this, '' if it can."""
    masks = (asked.mask, asked.pair_bias, *(() if name == "splash" else (asked.segments,)))
    width, pairs = asked.q.shape[-1], any(x is not None for x in masks)
    if name == "splash" and pairs:
        return "it takes no mask or bias by query and key"
    if name == "splash" and (why := uneven(asked.q.shape, asked.k.shape[-2])):
        return why
    config: Any = jax.config  # its fields are not declared
    precise = config.jax_default_matmul_precision not in (None, "default", "bfloat16")
    if name == "splash" and precise and asked.q.dtype in HALF:
        return f"{asked.q.dtype} does not go with jax_default_matmul_precision of more"
    if name == "cudnn":
        if asked.q.dtype not in HALF:
            return f"it takes bfloat16 and float16, not {asked.q.dtype}"
        carried = width + 2 if asked.bias is not None and not pairs else width
        if carried > WIDEST or (pairs and width % 8):
            return f"heads of {width} channels do not fit"
    return ""


def fastest(asked: Asked, platform: str, devices: int) -> str:
    """The kernel that suits a platform ('cpu', 'gpu', 'tpu') best among those that can take this.

    Splash attention for `LONG` sequences, on several TPUs under `jax.set_mesh` alone: the compiler
    does not split it among devices.
    """
    if platform == "cpu":
        return "blocked"
    best = next((name for name, home in HOMES.items() if home == platform), "xla")
    short = asked.k.shape[-3] < LONG or (devices > 1 and not told())
    return "xla" if (best == "splash" and short) or refusal(best, asked) else best


def xla(asked: Asked) -> Float[Array, "*B N H E"]:
    """What XLA fuses of it."""
    return _fused(unsegmented(asked), "xla")


def blocked(asked: Asked) -> Float[Array, "*B N H E"]:
    """Plain products head by head, some queries at a time, divided by the sum at the end: what CPUs
    are quick at. Causal: a block leaves out the keys behind it."""
    q, k, v = (jnp.swapaxes(x, -3, -2) for x in asked[:3])
    q, k, n = q.astype(jnp.float32) * asked.scale, k.astype(jnp.float32), q.shape[-2]
    bias = joint_bias(asked.bias, asked.pair_bias)
    mask = mask_of(asked)
    size, parts = max(ROWS, -(-n // PARTS)), []
    for start in range(0, max(n, 1), size):
        rows = slice(start, min(start + size, n))
        keys = slice(rows.stop if asked.causal else None)
        logits = _by_group(q[..., rows, :], jnp.swapaxes(k[..., keys, :], -1, -2))
        if bias is not None:
            logits = logits + bias[..., rows if bias.shape[-2] > 1 else slice(None), keys]
        if mask is not None:
            logits = jnp.where(mask[..., None, rows, keys], logits, UNSEEN)
        weight = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        y = _by_group(weight.astype(v.dtype), v[..., keys, :])
        parts.append(y / weight.sum(-1, keepdims=True))
    return jnp.swapaxes(jnp.concatenate(parts, axis=-2), -3, -2).astype(v.dtype)


def _by_group(x: Float[Array, "*B H N K"], y: Float[Array, "*B G K M"]) -> Array:
    """Products in float32; H / G neighbouring heads of x share one of y."""
    *lead, heads, n, width = x.shape
    x = x.reshape(*lead, y.shape[-3], heads // y.shape[-3] * n, width)
    product = jnp.matmul(x, y, preferred_element_type=jnp.float32)
    return product.reshape(*lead, heads, n, y.shape[-1])


def cudnn(asked: Asked, fused: Callable[[Asked], Array] | None = None) -> Array:
    """cuDNN's kernel, which takes no bias per key, and pairs of even lengths alone."""
    fused, asked = fused or functools.partial(_fused, implementation="cudnn"), unsegmented(asked)
    n, width = asked.q.shape[-3], asked.q.shape[-1]
    if asked.mask is None and asked.pair_bias is None:
        return fused(_carried(asked, 8))[..., :width]
    even = functools.partial(pad_to, multiple=2)
    bias = joint_bias(asked.bias, asked.pair_bias)
    if bias is not None:
        full = (*asked.q.shape[:-3], asked.q.shape[-2], n, asked.k.shape[-3])
        bias = even(jnp.broadcast_to(bias, full).astype(asked.q.dtype), axis=-2)
        bias = even(bias, axis=-1, value=-LARGE)
    mask = asked.mask
    if mask is None and asked.k.shape[-3] % 2:
        mask = jnp.ones((*asked.q.shape[:-3], n, asked.k.shape[-3]), bool)
    if mask is not None:  # a query that is padding sees the first keys
        mask = even(even(mask, axis=-1), axis=-2, value=True)
    q, k, v = (even(x, axis=-3) for x in asked[:3])
    return fused(Asked(q, k, v, asked.scale, None, bias, mask, asked.causal))[..., :n, :, :]


def splash(asked: Asked, interpret: bool = False) -> Array:
    """Splash attention, in tiles of 128 tokens and channels, of every device's examples and heads
    under `jax.set_mesh`."""
    arrays = {name: x for name, x in asked._asdict().items() if isinstance(x, jax.Array)}
    return on_each(lambda x: _splash(asked._replace(**x), interpret), arrays)


def _splash(asked: Asked, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    n, heads, width = asked.q.shape[-3:]
    fill = functools.partial(pad_to, multiple=TILE)
    scaled = (asked.q * asked.scale).astype(asked.q.dtype)
    bias = None if asked.bias is None else fill(asked.bias, axis=-1, value=-LARGE)
    q, k, v = (fill(x, axis=-3) for x in (scaled, asked.k, asked.v))
    whole = _carried(Asked(q, k, v, 1.0, bias), TILE)
    segments = asked.segments
    if segments is not None or q.shape != asked.q.shape or k.shape != asked.k.shape:
        own = lambda x: jnp.zeros(x.shape[:-2], jnp.int32) if segments is None else segments  # noqa: E731
        numbers = (fill(own(x), axis=-1, value=PADDING) for x in (asked.q, asked.k))
        segments = kernel.SegmentIds(*numbers)
    mask = masks.CausalMask if asked.causal else masks.FullMask
    seen = masks.MultiHeadMask([mask((q.shape[-3], k.shape[-3]))] * heads)
    run: Any = kernel.make_splash_mha_single_device(seen, interpret=interpret)
    for _ in range(asked.q.ndim - 3):
        run = jax.vmap(run)
    y = run(*(jnp.swapaxes(x, -3, -2) for x in whole[:3]), segments)
    return jnp.swapaxes(y, -3, -2)[..., :n, :, :width]


def _carried(asked: Asked, multiple: int) -> Asked:
    """The same with the bias per key in channels; values are as wide."""
    q, k = asked.q, asked.k
    if asked.bias is None:
        q, k = (pad_to(x, multiple, -1) for x in (q, k))
    else:
        q, k = carry_bias(q, k, asked.bias, asked.scale, multiple)
    return asked._replace(q=q, k=k, v=pad_to(asked.v, q.shape[-1], -1), bias=None)


def unsegmented(asked: Asked) -> Asked:
    """The same with segments as a mask."""
    if asked.segments is None:
        return asked
    own = asked.segments[..., :, None] == asked.segments[..., None, :]
    return asked._replace(mask=own if asked.mask is None else asked.mask & own, segments=None)


def mask_of(asked: Asked) -> Bool[Array, "*#B N M"] | None:
    """All that hides keys from queries, as one mask."""
    mask, n, rank = unsegmented(asked).mask, asked.q.shape[-3], asked.q.ndim - 3
    if not asked.causal:
        return mask
    order = jnp.tril(jnp.ones((n, n), bool)).reshape((1,) * rank + (n, n))
    return order if mask is None else mask & order


def joint_bias(
    per_key: Float[Array, "*B M"] | None, per_pair: Float[Array, "*#B #H #N M"] | None
) -> Float[Array, "*#B #H #N M"] | None:
    if per_key is None:
        return per_pair
    per_key = per_key[..., None, None, :]
    return per_key if per_pair is None else per_pair + per_key


def _fused(asked: Asked, implementation: str) -> Array:
    fused: Any = jax.nn.dot_product_attention  # its overloads do not know a name at run time

    def run(q: Array, k: Array, v: Array, bias: Any, mask: Any) -> Array:
        how = {"scale": asked.scale, "implementation": implementation}
        return fused(q, k, v, bias, mask, is_causal=asked.causal, **how)

    mask = None if asked.mask is None else asked.mask[..., None, :, :]
    args = (*asked[:3], joint_bias(asked.bias, asked.pair_bias), mask)
    if asked.q.ndim == 3:
        return jax.tree.map(lambda y: y[0], run(*jax.tree.map(lambda a: a[None], args)))
    for _ in range(asked.q.ndim - 4):
        run = jax.vmap(run)
    return run(*args)
