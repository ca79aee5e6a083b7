"""A decoder spelled out in numpy, token by token: the reference."""

import math
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]


def logits(
    weights: Weights, config: Any, ids: np.ndarray, place: np.ndarray | None = None
) -> np.ndarray:
    """[N vocab] of one sequence [N], whose tokens lie at `place`, ascending."""
    place = np.arange(len(ids)) if place is None else place
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = w["embed/embedding"][ids] * (math.sqrt(config.width) if config.scale_embed else 1.0)
    for layer in range(config.depth):
        own = {n.split("/", 2)[2]: v for n, v in w.items() if n.startswith(f"blocks/{layer}/")}
        x = block(own, config, layer, x, place)
    x = norm(x, w["norm/scale"], config)
    head = w["embed/embedding"].T if config.tie else w["head/kernel"]
    return capped(x @ head, config.logit_cap)


def block(w: Weights, config: Any, layer: int, x: np.ndarray, place: np.ndarray) -> np.ndarray:
    update = attend(w, config, layer, norm(x, w["norm1/scale"], config), place)
    x = x + (norm(update, w["post1/scale"], config) if config.post_norm else update)
    y = norm(x, w["norm2/scale"], config)
    update = mixture(w, config, y) if config.experts else feed(w, config, y)
    return x + (norm(update, w["post2/scale"], config) if config.post_norm else update)


def norm(x: np.ndarray, scale: np.ndarray, config: Any) -> np.ndarray:
    mean = (x * x).mean(-1, keepdims=True)
    return x / np.sqrt(mean + config.norm_eps) * (scale + config.norm_offset)


def capped(a: Any, cap: float | None) -> Any:
    return a if cap is None else cap * np.tanh(a / cap)


def attend(w: Weights, config: Any, layer: int, x: np.ndarray, place: np.ndarray) -> np.ndarray:
    n, width = len(x), config.head_dim
    q, k, v = (heads(w, name, x, width) for name in ("query", "key", "value"))
    if config.qk_norm:
        q = norm(q, w["attn/query_norm/scale"], config)
        k = norm(k, w["attn/key_norm/scale"], config)
    q, k = turned(q, place, config.rope_theta), turned(k, place, config.rope_theta)
    whole = config.window is None or (
        config.global_every and (layer + 1) % config.global_every == 0
    )
    out = np.zeros((n, config.heads, width))
    for i in range(n):
        near = [j for j in range(i + 1) if whole or place[i] - place[j] < config.window]
        for h in range(config.heads):
            g = h // (config.heads // k.shape[1])
            score = np.array([q[i, h] @ k[j, g] / math.sqrt(width) for j in near])
            chance = np.exp(capped(score, config.attention_cap))
            out[i, h] = sum(p * v[j, g] for p, j in zip(chance / chance.sum(), near, strict=True))
    return out.reshape(n, -1) @ w["attn/out/kernel"]


def heads(w: Weights, name: str, x: np.ndarray, width: int) -> np.ndarray:
    y = x @ w[f"attn/{name}/kernel"] + w.get(f"attn/{name}/bias", 0.0)
    return y.reshape(len(x), -1, width)


def turned(x: np.ndarray, place: np.ndarray, theta: float) -> np.ndarray:
    """Halves as real and imaginary parts, multiplied by exp(i place / theta^(2c/E))."""
    half = x.shape[-1] // 2
    rate = np.array([theta ** (-2 * c / (2 * half)) for c in range(half)])
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * place[:, None, None] * rate)
    return np.concatenate([z.real, z.imag], -1)


def activate(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def feed(w: Weights, config: Any, x: np.ndarray) -> np.ndarray:
    gate = activate(x @ w["mlp/gate/kernel"], config.activation)
    return (gate * (x @ w["mlp/up/kernel"])) @ w["mlp/down/kernel"]


def mixture(w: Weights, config: Any, x: np.ndarray) -> np.ndarray:
    """The best experts of each token by a softmax over the best."""
    scores, out = x @ w["mlp/router/kernel"], np.zeros_like(x)
    for i, row in enumerate(scores):
        best = np.argsort(-row)[: config.experts_per_token]
        chance = np.exp(row[best]) / np.exp(row[best]).sum()
        for p, m in zip(chance, best, strict=True):
            gate = activate(x[i] @ w["mlp/gate"][m], "silu")
            out[i] += p * ((gate * (x[i] @ w["mlp/up"][m])) @ w["mlp/down"][m])
    return out
