"""Attention, and the parts of its probabilities that scores ask for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.ops.dispatch import choose

NEGATIVE = -1e30  # finite: a query without any valid key stays finite


def attention(
    q: Float[Array, "*B N H E"],
    k: Float[Array, "*B M H E"],
    v: Float[Array, "*B M H E"],
    *,
    bias: Float[Array, "*B M"] | None = None,
    valid: Bool[Array, "*B M"] | None = None,
    policy: Float[Array, "*B M"] | None = None,
    policy_eps: float = 1e-6,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B N H E"]:
    """softmax(q k^T scale + bias) v, with the softmax in float32.

    `bias` is added per key (log size, log gate). `policy` multiplies the exponentials of every
    key but a query's own (DynamicViT, DiffRate) and needs M = N; it takes the plain path, which
    holds all probabilities. `scale` defaults to E^-0.5 and is static.

    Implementations: 'xla' (fused by the compiler), 'cudnn' (NVIDIA kernels), 'reference'.
    Gradient: to q, k, v, bias and policy.
    """
    if policy is not None:
        probs = attention_probs(
            q, k, bias=bias, valid=valid, policy=policy, policy_eps=policy_eps, scale=scale
        )
        return jnp.einsum("...hnm,...mhe->...nhe", probs.astype(v.dtype), v)
    table = {
        "xla": functools.partial(_fused, implementation="xla"),
        "cudnn": functools.partial(_fused, implementation="cudnn"),
        "reference": _reference,
    }
    return choose("attention", implementation, table, "xla")(
        q, k, v, key_bias(bias, valid), q.shape[-1] ** -0.5 if scale is None else scale
    )


def key_bias(
    bias: Float[Array, "*B M"] | None, valid: Bool[Array, "*B M"] | None
) -> Float[Array, "*B M"] | None:
    """Bias and validity as one additive float32 bias per key; None if there is neither."""
    if valid is None:
        return bias
    hidden = jnp.where(valid, 0.0, NEGATIVE).astype(jnp.float32)
    return hidden if bias is None else jnp.where(valid, bias.astype(jnp.float32), NEGATIVE)


def _fused(q: Array, k: Array, v: Array, bias: Array | None, scale: float, implementation: str):
    fused: Any = jax.nn.dot_product_attention  # its overloads do not know a name at run time
    run = functools.partial(fused, scale=scale, implementation=implementation)
    if bias is not None and implementation == "cudnn":
        bias = bias.astype(q.dtype)
    args = (q, k, v) if bias is None else (q, k, v, bias[..., None, None, :])
    if q.ndim == 3:
        return run(*[a[None] for a in args])[0]
    for _ in range(q.ndim - 4):
        run = jax.vmap(run)
    return run(*args)


def _reference(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> Array:
    probs = attention_probs(q, k, bias=bias, scale=scale)
    return jnp.einsum("...hnm,...mhe->...nhe", probs.astype(v.dtype), v)


def attention_probs(
    q: Float[Array, "*B N H E"],
    k: Float[Array, "*B M H E"],
    *,
    bias: Float[Array, "*B M"] | None = None,
    valid: Bool[Array, "*B M"] | None = None,
    policy: Float[Array, "*B M"] | None = None,
    policy_eps: float = 1e-6,
    own: Int[Array, " N"] | None = None,
    scale: float | None = None,
) -> Float[Array, "*B H N M"]:
    """All probabilities, in float32. `own` [N] tells which key is a query's own (default: its
    index), for `policy` only. Gradient: to every float argument.
    """
    logits = jnp.einsum("...nhe,...mhe->...hnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    joint = key_bias(bias, valid)
    if joint is not None:
        logits = logits + joint[..., None, None, :]
    if policy is None:
        return jax.nn.softmax(logits, axis=-1)
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
    q: Float[Array, "*B R H E"], k: Float[Array, "*B M H E"], **kwargs
) -> Float[Array, "*B H R M"]:
    """The probabilities of a few query rows: exact, and beside any fused kernel almost free.

    Takes the keyword arguments of `attention_probs`; with `policy`, `own` [R] is required.
    """
    if kwargs.get("policy") is not None and kwargs.get("own") is None:
        raise ValueError("ops.attention_rows: with policy, own= must name each row's own key.")
    return attention_probs(q, k, **kwargs)


def attention_column_mean(
    q: Float[Array, "*B N H E"],
    k: Float[Array, "*B M H E"],
    *,
    query_valid: Bool[Array, "*B N"] | None = None,
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
        own = jnp.arange(start, min(start + block, n))
        rows = attention_rows(q[..., start : start + block, :, :], k, own=own, **kwargs)
        total = total + jnp.einsum("...hnm,...n->...m", rows, weight[..., start : start + block])
    queries = jnp.maximum(weight.sum(-1, keepdims=True), 1.0)
    return total / (queries * q.shape[-2])
