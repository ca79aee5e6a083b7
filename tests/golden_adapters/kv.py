"""Adapters of the family `kv`: scores of cache entries, budgets, quantised entries."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tests.golden_adapters.case import Adapter, Case, Output
from tokred import cache
from tokred.methods.key_scores import KeyScores
from tokred.ops import attention_probs
from tokred.rotary import turn
from tokred.select import keep_top_k

ENDS = {"knorm": 0.0, "keydiff": 0.0, "cur": 1.0, "lagkv": 1.0, "lagkv_cross": 1.0}


def queries(case: Case, rotated: bool = True) -> Array:
    """[B L H E]: the projected inputs, rotated by the stored tables."""
    hidden, heads = case.inputs["hidden"], case.settings["num_heads"]
    q = jnp.einsum("bld,ed->ble", hidden, case.params["q_proj"])
    q = q.reshape(*q.shape[:2], heads, -1)
    if not rotated:
        return q
    half = q.shape[-1] // 2
    cos, sin = (case.inputs[name][..., None, :half] for name in ("cos", "sin"))
    return turn(q, cos, sin)


def window_probs(q: Array, k: Array, window: int) -> Array:
    """[B H W T] of the last queries; k [B G T E] as a cache holds it."""
    last, t = q[:, -window:], k.shape[-2]
    seen = jnp.arange(t)[None, None] <= (t - window + jnp.arange(window))[None, :, None]
    return attention_probs(last, jnp.swapaxes(k, 1, 2), mask=seen)


def newest(batch: int, t: int, count: int) -> Array:
    return jnp.broadcast_to(jnp.arange(t) >= t - count, (batch, t))


def kept(scores: Array, k: int) -> Array:
    """Sorted places of the k best."""
    return keep_top_k(scores, k, order="position").index


def finite(scores: Array, end: Any = None) -> Array:
    """Entries that stay as the official code marks them: one above the greatest score."""
    most = jnp.where(jnp.isinf(scores), -jnp.inf, scores).max() + 1 if end is None else end
    return jnp.where(jnp.isposinf(scores), most, scores)


def told(scores: Array, k: int) -> dict[str, Array]:
    return {"scores": finite(scores), "keep_sorted": kept(scores, k)}


def snap_scores(case: Case) -> tuple[Array, Array]:
    s, k = case.settings, case.inputs["keys"]
    probs = window_probs(queries(case), k, s["window"])
    protected = newest(k.shape[0], k.shape[2], s["window"])
    return probs, cache.score_by_window(probs, k.shape[1], protected, kernel=s["kernel"])


def snapkv(case: Case) -> dict[str, Any]:
    probs, scores = snap_scores(case)
    window = case.settings["window"]
    seen = {"window_attention": probs[..., :-window]}
    return {**seen, **told(scores, case.settings["n_kept"])}


def snapkv_original(case: Case) -> dict[str, Any]:
    """Max pooling makes ties, of which torch takes any: stored ids count where they are as good."""
    s, q, k = case.settings, case.inputs["q"], case.inputs["k"]
    probs = window_probs(jnp.swapaxes(q, 1, 2), k, s["window"])
    protected = newest(k.shape[0], k.shape[2], s["window"])
    pool = "max" if s["maxpool"] else "mean"
    scores = cache.score_by_window(probs, k.shape[1], protected, kernel=s["kernel"], pool=pool)
    own = kept(scores, min(s["capacity"], k.shape[2]))
    stored = jnp.asarray(case.outputs["keep_sorted"])
    best = lambda index: jnp.sort(jnp.take_along_axis(scores, index, axis=-1), axis=-1)  # noqa: E731
    as_good = (jnp.diff(stored, axis=-1) > 0).all() & jnp.allclose(best(stored), best(own), 1e-5, 0)
    return {"keep_sorted": jnp.where(as_good, stored, own)}


def tova(case: Case) -> dict[str, Any]:
    k = case.inputs["keys"]
    probs = window_probs(queries(case), k, 1)[..., 0, :]
    scores = cache.score_by_last(probs, k.shape[1], newest(k.shape[0], k.shape[2], 1))
    return told(scores, case.settings["n_kept"])


def tova_original(case: Case) -> dict[str, Any]:
    k = case.inputs["k"]
    scores = cache.score_by_last(case.inputs["attn"][..., -1, :], k.shape[1])
    size = min(case.settings["cache_size"], k.shape[2])
    map_ = keep_top_k(scores, size, order="position")
    kept_k, kept_v = map_.apply((k, case.inputs["v"]))
    return {"k": kept_k, "v": kept_v}


def observed(case: Case) -> dict[str, Any]:
    probs = case.inputs["attn"]
    viewers = jnp.arange(probs.shape[-1], 0, -1)[None]
    scores = cache.score_by_received(probs.sum(-2), viewers, case.settings["num_kv_heads"])
    return told(scores, case.settings["n_kept"])


def expected(case: Case) -> dict[str, Any]:
    s, k, v = case.settings, case.inputs["keys"], case.inputs["values"]
    batch, _, t, _ = k.shape
    sinks = jnp.broadcast_to(jnp.arange(t) < s["n_sink"], (batch, t))
    mean, spread = cache.query_statistics(queries(case, rotated=False), 1.0 - sinks)
    start = jnp.full((batch,), t)
    mean, spread = cache.expect_queries(
        mean, spread, start, case.inputs["inv_freq"], future=s["n_future"]
    )
    scores = cache.score_by_expectation(
        k, v, mean, spread if s["use_covariance"] else None,
        protected=sinks, norms=bool(s["use_vnorm"]), epsilon=s.get("epsilon", 0.0),
    )  # fmt: skip
    return {"mu": mean, "cov": spread, **told(scores, s["n_kept"])}


def keyonly(case: Case) -> dict[str, Any]:
    s, k, v = case.settings, case.inputs["keys"], case.inputs["values"]
    lag = {"lag": s["lag_size"], "sinks": s["n_sink"]}
    place = jnp.broadcast_to(jnp.arange(k.shape[2], dtype=jnp.float32), k.shape[:-1])
    streaming = cache.score_by_place(place, sinks=s["n_sink"])
    scores = {
        "knorm": cache.score_by_key_norm(k),
        "keydiff": cache.score_by_key_difference(k),
        "cur": cache.score_by_leverage(k, v, window=s["cur_window"], sinks=s["n_sink"]),
        "lagkv": cache.score_by_lag(k, v, **lag),
        "lagkv_cross": cache.score_by_lag(k, v, **lag, cross=True),
    }
    out: dict[str, Any] = {f"scores_{n}": finite(x, ENDS[n]) for n, x in scores.items()}
    out |= {f"keep_{n}": kept(scores[n], s["n_kept"]) for n in ("knorm", "keydiff", "cur")}
    inside = keep_top_k(streaming, s["n_kept"]).source >= 0
    return {
        **out, "keep_streaming": kept(streaming, s["n_kept"]), "scores_streaming": inside * 1.0
    }  # fmt: skip


def key_rerotation(case: Case) -> dict[str, Any]:
    """Original positions travel in the field of scores, since those of the cache are new."""
    k, v, n = case.inputs["keys"], case.inputs["values"], case.settings["n_kept"]
    place = jnp.broadcast_to(jnp.arange(k.shape[2], dtype=jnp.float32), (k.shape[0], k.shape[2]))
    whole = cache.hold(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), place)
    none = jnp.zeros((k.shape[0], 1, 1, 1))
    look = cache.Look(none, place[:, -1:], lambda q, *_: q, case.inputs["inv_freq"])
    evict = KeyScores(n, None, positions="rerotate", by="knorm")
    left = evict.begin(replace(whole, score=whole.position), look)
    return {"keep_sorted": left.score.astype(jnp.int32), "keys": left.k, "values": left.v}


def pyramid(case: Case) -> dict[str, Any]:
    s = case.settings
    budgets = cache.pyramid_budgets(
        case.inputs["keys"].shape[2], 1 - s["compression_ratio"], s["num_layers"],
        window=s["window"], beta=s["beta"],
    )  # fmt: skip
    _, scores = snap_scores(case)
    return told(scores, budgets[s["layer_idx"]])


def pyramid_budget(case: Case) -> dict[str, Any]:
    s = case.settings
    keep = 1 - s["compression_ratio"]
    how = {"window": s["window"], "beta": s["beta"]}
    return {"budget": np.array(cache.pyramid_budgets(s["seq_len"], keep, s["num_layers"], **how))}


def adakv(case: Case) -> dict[str, Any]:
    _, scores = snap_scores(case)
    mask = cache.keep_pooled(scores, case.settings["n_kept"], floor=case.settings["alpha"])
    return {"keep_mask": mask, "head_budget": mask.sum(-1)}


def kivi(case: Case) -> dict[str, Any]:
    s, out = case.settings, {}
    for name, axis in (("k", -2), ("v", -1)):
        how = {"axis": axis, "group": s["group_size"], "word": jnp.int32}
        packed = cache.quantise(case.inputs[name], s["bits"], **how)
        out |= {f"{name}_code": packed.codes, f"{name}_dequant": packed.values()}
        out |= {f"{name}_scale": _groups(packed.step, axis)}
        out |= {f"{name}_min": _groups(packed.least, axis)}
    return out


def _groups(x: Array, axis: int) -> Array:
    """[B G E groups 1] of keys as [B G groups 1 E]; those of values as they are."""
    return jnp.moveaxis(x, 2, -1) if axis == -2 else x


def codes(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A code may flip by one at a tie: the share of words that differ, of which 0.5 % may."""
    return np.zeros(()), np.maximum((want != got).mean() - 0.005, 0.0)


def most(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `codes`, for values: those off by more than 1e-4."""
    return np.zeros(()), np.maximum((np.abs(want - got) > 1e-4).mean() - 0.005, 0.0)


QUANTISED = {"*_code": Output(0.0, 0.0, codes), "*dequant": Output(0.0, 0.0, most)}
LOOSE = {"mu": Output(1e-3), "cov": Output(1e-3)}
KV: dict[str, Adapter] = {
    "adakv": Adapter(adakv),
    "expected_attention": Adapter(expected, LOOSE),
    "key_rerotation": Adapter(key_rerotation),
    "keyonly_scores": Adapter(keyonly),
    "kivi": Adapter(kivi, QUANTISED),
    "observed_attention": Adapter(observed),
    "pyramidkv": Adapter(pyramid),
    "pyramidkv_budget": Adapter(pyramid_budget, jit=False),
    "snapkv": Adapter(snapkv),
    "snapkv_original": Adapter(snapkv_original),
    "tova": Adapter(tova),
    "tova_original": Adapter(tova_original),
}
