"""Adapters of the family `kv` for how entries are stored and read: ZipCache, Quest, Razor."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tests.golden_adapters.case import Adapter, Case, Output, sorted_rows
from tests.golden_adapters.kv import most
from tokred import cache
from tokred.cache.pages import choose_pages, page_bounds, pages_of, score_pages
from tokred.ops import attention_probs, cached_probs, gather
from tokred.select import keep_top_k


def saliency(case: Case) -> dict[str, Any]:
    s, q, k = case.settings, case.inputs["q"], case.inputs["k"]
    n, groups, probes = k.shape[2], k.shape[1], case.inputs["probe_ids"]
    asked = jnp.swapaxes(gather(q, probes[None, None], axis=2), 1, 2)
    seen = (jnp.arange(n)[None] <= probes[:, None])[None]
    probs = attention_probs(asked, jnp.swapaxes(k, 1, 2), mask=seen)
    viewers = jnp.arange(n, 0, -1)[None]
    mean = cache.score_by_received(probs.sum(-2), viewers, groups)
    scores = mean * (q.shape[1] // groups)  # the official code sums over a group
    least = keep_top_k(-scores, int(s["unimportant_ratio"] * n))
    rest = keep_top_k(scores, n - least.k, order="position")
    return {"saliency": scores, "unimportant_ids": least.index, "important_ids": rest.index}


def zipcache(case: Case) -> dict[str, Any]:
    """Quantised in the order of the stored ids, on which shared steps depend."""
    s, k, v = case.settings, case.inputs["k"], case.inputs["v"]
    scale = cache.channel_scale(cache.join_heads(v))
    out_k, out_v = jnp.zeros_like(k), jnp.zeros_like(v)
    for name in ("important", "unimportant"):
        index, bits = jnp.asarray(case.outputs[f"{name}_ids"]), s[f"bits_{name}"]
        rows = lambda x, at=index: gather(x, at, axis=2)  # noqa: E731
        keys = cache.quantise(rows(k), bits, axis=-2, group=index.shape[-1]).values()
        values = cache.quantise_scaled(rows(v), bits, scale).values()
        at = (jnp.arange(k.shape[0])[:, None, None], jnp.arange(k.shape[1])[None, :, None], index)
        out_k, out_v = out_k.at[at].set(keys), out_v.at[at].set(values)
    told = saliency(case)
    return {**told, "v_channel_scale": scale, "k_dequant": out_k, "v_dequant": out_v}


def halves(codes: Array) -> Array:
    """Each code of the first half beside its partner in the second, as the official bytes hold."""
    return jnp.stack(jnp.split(codes, 2, axis=-1), -1).reshape(codes.shape)


def cst4(case: Case) -> dict[str, Any]:
    bits = case.settings["bits"]
    stored = cache.quantise_scaled(case.inputs["x"], bits)
    codes = cache.unpack(stored.rows.codes, bits, stored.rows.count)
    return {
        "packed": cache.pack(halves(codes), bits),
        "min": stored.rows.least[..., 0, :],
        "step": stored.rows.step[..., 0, :],
        "channel_scale": stored.scale,
        "dequant": stored.values(),
    }


def quest(case: Case) -> dict[str, Any]:
    s, q, k, v = case.settings, case.inputs["q"], case.inputs["k"], case.inputs["v"]
    t, page = k.shape[2], s["page"]
    scores = score_pages(q[:, :, 0], *page_bounds(k, page))
    chosen = choose_pages(scores, pages_of(s["token_budget"], page, t))
    read = (jnp.arange(t)[None, None, None] // page == chosen[..., None]).any(-2)  # [B H T]
    heads = lambda x: jnp.repeat(x, q.shape[1] // k.shape[1], axis=1)  # noqa: E731
    probs = cached_probs(jnp.swapaxes(q, 1, 2), heads(k), mask=read[:, :, None])[:, :, 0]
    y = jnp.einsum("bht,bhte->bhe", probs, heads(v))
    return {"keep_mask": read, "attn_prob": probs, "attn": y}


def razor(case: Case) -> dict[str, Any]:
    x, s = case.inputs["cache"], case.settings  # [L H E]
    n, k, sinks = x.shape[0], min(s["capacity"], x.shape[0]), s["sink"]
    plain = keep_top_k(cache.score_by_place(jnp.arange(n) * 1.0, sinks=sinks), k, order="position")
    folded, _ = cache.fold_middle(jnp.asarray(n), n, s["capacity"], sinks=sinks)
    return {"plain": plain.apply(x), "virtual": folded.apply(x)[:k]}


def near(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A byte of two codes may differ where one of them was a tie: 0.5 % may."""
    return np.zeros(()), np.maximum((want != got).mean() - 0.005, 0.0)


DEQUANTISED = {"*dequant": Output(0.0, 0.0, most), "packed": Output(0.0, 0.0, near)}
STORED = {"unimportant_ids": Output(0.0, 0.0, sorted_rows), **DEQUANTISED}
KV_STORAGE: dict[str, Adapter] = {
    "quest": Adapter(quest),
    "razor_compress": Adapter(razor),
    "zipcache": Adapter(zipcache, STORED),
    "zipcache_cst4": Adapter(cst4, DEQUANTISED),
}
