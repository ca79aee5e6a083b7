"""Attention, and the parts of its probabilities that scores ask for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from tokred.ops.dispatch import choose, note, preferred
from tokred.ops.kernels import (
    HOMES,
    NEGATIVE,
    UNSEEN,
    Asked,
    blocked,
    cudnn,
    fastest,
    joint_bias,
    mask_of,
    refusal,
    splash,
    xla,
)
from tokred.ops.spread import platform


def attention(
    q: Float[Array, "*B N H E"],
    k: Float[Array, "*B M G E"],
    v: Float[Array, "*B M G E"],
    *,
    bias: Float[Array, "*B M"] | None = None,
    valid: Bool[Array, "*B M"] | None = None,
    mask: Bool[Array, "*#B N M"] | None = None,
    causal: bool = False,
    segments: Int[Array, "*B N"] | None = None,
    policy: Float[Array, "*B M"] | None = None,
    policy_eps: float = 1e-6,
    pair_bias: Float[Array, "*#B H N M"] | None = None,
    sink: bool = False,
    scale: float | None = None,
    cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B N H E"]:
    """softmax(q k^T scale + bias + pair_bias) v, with the softmax in float32.

    H is a multiple of G: H / G neighbouring query heads share a key head. `bias` is added per key
    (log size, log gate), `mask` tells which keys a query sees; causal: none behind its own slot,
    segments: none of another number (M = N); kernels skip what these two hide. `policy` multiplies
    the exponentials of every key but a query's own (DynamicViT, DiffRate) and needs M = N. `cap`
    bounds logits as cap tanh(logits / cap). sink: one more key, with logit 0 and value 0, so that a
    query may look at nothing (softmax1). Policy, cap and sink take the plain path, which holds all
    probabilities.
    `scale` defaults to E^-0.5; scale, causal, cap and sink are static.

    Implementations: 'auto' (None: the fastest of the device that takes these arguments), 'xla'
    (fused by the compiler), 'blocked' (for CPUs), 'cudnn' (NVIDIA, half precision), 'splash'
    (TPUs; several under `jax.set_mesh` with axes as in `ops.spread`), 'reference'. Kernels that
    take no bias per key get it in channels, see `carry_bias`; lengths and channels that they want
    even or in tiles are padded inside. One that cannot take these arguments gives way to 'xla',
    with a warning, and `watch_choices` tells; one that the device lacks is an error.
    Gradient: to q, k, v, bias, pair_bias and policy.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    asked = Asked(q, k, v, scale, None, pair_bias, mask, causal, segments)
    if policy is not None or cap is not None or sink:
        how: dict[str, Any] = {"policy": policy, "policy_eps": policy_eps, "scale": scale}
        how |= {"cap": cap, "pair_bias": pair_bias, "sink": sink}
        note("attention", "reference", _plainly(implementation))
        probs = attention_probs(q, k, bias=bias, valid=valid, mask=mask_of(asked), **how)
        return weighted_values(probs, v)
    asked = asked._replace(bias=key_bias(bias, valid))
    return _kernel(implementation, asked)(asked)


def _plainly(asked_for: str | None) -> str:
    if asked_for in (None, AUTO, "reference"):
        return ""
    return f"implementation={asked_for!r} takes no policy, cap or sink"


def _kernel(asked_for: str | None, asked: Asked) -> Callable[[Asked], Array]:
    """The implementation of that name, or XLA's where this device or these arguments forbid it."""
    home, why = platform(), ""
    used = asked_for or preferred("attention", AUTO)
    if used == AUTO:
        used = fastest(asked, home, jax.device_count())
    found = choose("attention", used, KERNELS, "xla")
    if HOMES.get(used, home) != home:
        raise ValueError(
            f"ops.attention: implementation={used!r} needs a {HOMES[used]}, this is a {home}; "
            "use 'auto'."
        )
    if lacks := refusal(used, asked):
        used, why, found = "xla", f"implementation={used!r}: {lacks}", xla
    note("attention", used, why)
    return found


def position_mask(
    queries: Num[Array, "*#B N C"], keys: Num[Array, "*#B M C"], window: int | None = None
) -> Bool[Array, "*B N M"]:
    """Which keys a query may see: those not after it, and of its own document where positions have
    a second coordinate. window: at most so many places back, its own included; static."""
    q, k = queries[..., :, None, :], keys[..., None, :, :]
    seen = k[..., 0] <= q[..., 0]
    if window is not None:
        seen &= k[..., 0] > q[..., 0] - window
    return seen & (k[..., 1:] == q[..., 1:]).all(-1)


def cached_attention(
    q: Float[Array, "*B N H E"],
    k: Float[Array, "*B G C E"],
    v: Float[Array, "*B G C E"],
    **kwargs,
) -> Float[Array, "*B N H E"]:
    """Attention of a few queries over the slots of a cache, whose key heads may hold different
    tokens; arguments as in `cached_probs`. A query that sees no slot gives 0. Gradient: to q, k, v
    and biases."""
    probs = cached_probs(q, k, **kwargs)
    grouped = probs.reshape(*k.shape[:-2], -1, *probs.shape[-2:])  # [*B G R N C]
    y = jnp.einsum("...grnc,...gce->...ngre", grouped.astype(v.dtype), v)
    return y.reshape(q.shape)


def cached_probs(
    q: Float[Array, "*B N H E"],
    k: Float[Array, "*B G C E"],
    *,
    mask: Bool[Array, "*B G N C"],
    bias: Float[Array, "*B G C"] | None = None,
    pair_bias: Float[Array, "*#B H #N C"] | None = None,
    sink: bool = False,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "*B H N C"]:
    """The probabilities themselves, in float32, 0 where a query may not look; arguments as in
    `attention`."""
    grouped = q.reshape(*q.shape[:-2], k.shape[-3], -1, q.shape[-1])  # [*B N G R E]
    logits = jnp.einsum("...ngre,...gce->...grnc", grouped, k, preferred_element_type=jnp.float32)
    logits = _capped(logits * (q.shape[-1] ** -0.5 if scale is None else scale), cap)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[..., None, None, :]
    if pair_bias is not None:
        *lead, _, n, c = pair_bias.shape
        logits = logits + pair_bias.reshape(*lead, *logits.shape[-4:-2], n, c)
    seen = mask[..., None, :, :]
    probs = softmax(jnp.where(seen, logits, NEGATIVE), sink=sink) * seen
    return probs.reshape(*q.shape[:-3], q.shape[-2], *probs.shape[-2:])


def softmax(logits: Float[Array, "*B M"], *, sink: bool = False) -> Float[Array, "*B M"]:
    """Over the last axis. sink: with one more logit of 0 that is left out of the result, whose sum
    may then be below 1 (softmax1); static."""
    if not sink:
        return jax.nn.softmax(logits, axis=-1)
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), 0.0))
    weight = jnp.exp(logits - top)
    return weight / (weight.sum(-1, keepdims=True) + jnp.exp(-top))


def _capped(logits: Array, cap: float | None) -> Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def weighted_values(
    probs: Float[Array, "*B H N M"], v: Float[Array, "*B M G E"]
) -> Float[Array, "*B N H E"]:
    """What attention with these probabilities gives. Gradient: to both."""
    return jnp.einsum("...hnm,...mhe->...nhe", probs.astype(v.dtype), per_query_head(v, probs))


def per_query_head(x: Array, probs_or_queries: Array, axis: int = -3) -> Array:
    """Key heads repeated for the query heads that share them."""
    return jnp.repeat(x, probs_or_queries.shape[axis] // x.shape[-2], axis=-2)


def key_bias(
    bias: Float[Array, "*B M"] | None, valid: Bool[Array, "*B M"] | None
) -> Float[Array, "*B M"] | None:
    """Bias and validity as one additive float32 bias per key; None if there is neither."""
    if valid is None:
        return bias
    hidden = jnp.where(valid, 0.0, NEGATIVE).astype(jnp.float32)
    return hidden if bias is None else jnp.where(valid, bias.astype(jnp.float32), NEGATIVE)


def _reference(asked: Asked) -> Float[Array, "*B N H E"]:
    how: Any = {"bias": asked.bias, "pair_bias": asked.pair_bias, "mask": mask_of(asked)}
    return weighted_values(attention_probs(asked.q, asked.k, scale=asked.scale, **how), asked.v)


AUTO = "auto"
KERNELS = {"xla": xla, "blocked": blocked, "cudnn": cudnn, "splash": splash}
KERNELS["reference"] = _reference


def attention_probs(
    q: Float[Array, "*B N H E"],
    k: Float[Array, "*B M G E"],
    *,
    bias: Float[Array, "*B M"] | None = None,
    valid: Bool[Array, "*B M"] | None = None,
    mask: Bool[Array, "*#B N M"] | None = None,
    policy: Float[Array, "*B M"] | None = None,
    policy_eps: float = 1e-6,
    own: Int[Array, " N"] | None = None,
    pair_bias: Float[Array, "*#B #H #N M"] | None = None,
    sink: bool = False,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "*B H N M"]:
    """All probabilities, in float32; arguments as `attention` has them. `own` [N] tells which key
    is a query's own (default: its index), for `policy` only. Gradient: to every float argument.
    """
    k = per_query_head(k, q, axis=-2)
    logits = jnp.einsum("...nhe,...mhe->...hnm", q, k, preferred_element_type=jnp.float32)
    logits = _capped(logits * (q.shape[-1] ** -0.5 if scale is None else scale), cap)
    joint = joint_bias(key_bias(bias, valid), pair_bias)
    if joint is not None:
        logits = logits + joint
    if mask is not None:
        logits = jnp.where(mask[..., None, :, :], logits, UNSEEN)
    if policy is None:
        return softmax(logits, sink=sink)
    if sink:
        raise ValueError("ops.attention: a policy and sink=True do not go together; drop one.")
    own = jnp.arange(q.shape[-3]) if own is None else own
    m = k.shape[-3]
    share = jnp.full(policy.shape, 1 / m) if valid is None else _uniform(valid)
    return _policy_softmax(logits, policy, own, policy_eps, share[..., None, None, :])


def _uniform(valid: Bool[Array, "*B M"]) -> Float[Array, "*B M"]:
    return valid / jnp.maximum(valid.sum(-1, keepdims=True), 1)


def _policy_softmax(logits: Array, policy: Array, own: Array, eps: float, share: Array) -> Array:
    m = logits.shape[-1]
    itself = own[:, None] == jnp.arange(m)[None, :]  # [N M]
    itself = itself.reshape((1,) * (policy.ndim - 1) + (1, *itself.shape))
    gate = policy[..., None, None, :]
    open_ = gate + (1 - gate) * itself
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weight = jnp.exp(logits - top) * open_
    return (weight + eps * share) / (weight.sum(-1, keepdims=True) + eps)


def attention_rows(
    q: Float[Array, "*B R H E"], k: Float[Array, "*B M G E"], **kwargs
) -> Float[Array, "*B H R M"]:
    """The probabilities of a few query rows: exact, and beside any fused kernel almost free.

    Takes the keyword arguments of `attention_probs` (mask [*B R M]); with `policy`, `own` [R] is
    required.
    """
    if kwargs.get("policy") is not None and kwargs.get("own") is None:
        raise ValueError("ops.attention_rows: with policy, own= must name each row's own key.")
    return attention_probs(q, k, **kwargs)


def attention_column_mean(
    q: Float[Array, "*B N H E"],
    k: Float[Array, "*B M G E"],
    *,
    query_valid: Bool[Array, "*B N"] | None = None,
    mask: Bool[Array, "*#B N M"] | None = None,
    pair_bias: Float[Array, "*#B H N M"] | None = None,
    block: int = 128,
    **kwargs,
) -> Float[Array, "*B M"]:
    """Attention that each key receives, mean over heads and valid queries, `block` rows at a time.

    Never holds [N M] for N > block. Static: block. Takes the keyword arguments of
    `attention_probs` except own: with policy, M = N.
    """
    n = q.shape[-3]
    weight = jnp.ones(q.shape[:-2]) if query_valid is None else query_valid.astype(jnp.float32)
    total = jnp.zeros((*k.shape[:-3], k.shape[-3]), jnp.float32)
    for start in range(0, n, block):
        part = slice(start, start + block)
        kwargs |= {"own": jnp.arange(start, min(start + block, n))}
        kwargs |= {"mask": None if mask is None else mask[..., part, :]}
        kwargs |= {"pair_bias": None if pair_bias is None else pair_bias[..., part, :]}
        rows = attention_rows(q[..., part, :, :], k, **kwargs)
        total = total + jnp.einsum("...hnm,...n->...m", rows, weight[..., part])
    queries = jnp.maximum(weight.sum(-1, keepdims=True), 1.0)
    return total / (queries * q.shape[-2])
