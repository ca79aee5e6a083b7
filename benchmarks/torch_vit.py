"""The torch side of `benchmarks.peers`: a transformers ViT with tokens merged or dropped.

Runs in an environment of its own, with torch and transformers and without tokred. Reads one JSON
line that says what to build, then names of programs, one a line; answers each with the seconds of
one call. Merging and dropping are written from their papers' formulas.
"""

# pyright: reportMissingImports=false
from collections.abc import Callable, Sequence

import torch
import transformers as tf
from torch.nn import functional as F  # noqa: N812

from benchmarks.answer import answer, hear

Counts = Sequence[int]


def build(spec: dict) -> tf.ViTForImageClassification:
    """A ViT of these sizes with random weights; spec: fields of ViTConfig."""
    torch.manual_seed(0)
    return tf.ViTForImageClassification(tf.ViTConfig(**spec)).eval()


def parts(layer: torch.nn.Module, x: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values [B H N E] of a block's normalised input."""
    inner = layer.attention
    x = layer.layernorm_before(x)
    split = lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    return split(inner.q_proj(x)), split(inner.k_proj(x)), split(inner.v_proj(x))


def forward(
    model: tf.ViTForImageClassification, images: torch.Tensor, method: str, counts: Counts
) -> torch.Tensor:
    """Logits; counts: tokens behind the attention of every layer."""
    x = model.vit.embeddings(images)
    heads, sizes = model.config.num_attention_heads, torch.ones(*x.shape[:2], 1)
    for layer, count in zip(model.vit.layers, counts, strict=True):
        q, k, v = parts(layer, x, heads)
        bias = sizes.log().transpose(1, 2)[:, None] if method == "tome" else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + layer.attention.o_proj(y.transpose(1, 2).flatten(2))
        gone = x.shape[1] - count
        if gone and method == "tome":
            x, sizes = merge(x, sizes, k.mean(1), gone)
        elif gone:
            x = keep_seen(x, q, k, count - 2)
        x = x + layer.mlp(layer.layernorm_after(x))
    return model.classifier(model.vit.layernorm(x)[:, 0])


def merge(
    x: torch.Tensor, sizes: torch.Tensor, metric: torch.Tensor, r: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ToMe (Bolya et al. 2022): r tokens of even places join those of odd places that are most
    like them, in means weighted by size; the class token stays."""
    metric = F.normalize(metric, dim=-1)
    alike = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    alike[:, 0] = -torch.inf
    best, partner = alike.max(-1)
    order = best.argsort(-1, descending=True)
    source, rest = order[:, :r], order[:, r:].sort(-1).values
    target = partner.gather(1, source)[..., None]

    def move(y: torch.Tensor) -> torch.Tensor:
        even, odd = y[:, ::2], y[:, 1::2]
        pick = lambda i: even.gather(1, i[..., None].expand(-1, -1, y.shape[-1]))  # noqa: E731
        odd = odd.scatter_add(1, target.expand(-1, -1, y.shape[-1]), pick(source))
        return torch.cat([pick(rest), odd], 1)

    total = move(sizes)
    return move(x * sizes) / total, total


def keep_seen(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, count: int) -> torch.Tensor:
    """EViT (Liang et al. 2022): the class token, the `count` patches that it looks at most, and one
    token that is the sum of the others by how much it looks at them."""
    logits = q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    seen = logits.softmax(-1).mean(1)[:, 0, 1:]
    order = seen.argsort(-1, descending=True)
    patches = x[:, 1:].gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    weight = seen.gather(1, order)[:, count:, None]
    fused = (patches[:, count:] * weight).sum(1, keepdim=True)
    return torch.cat([x[:, :1], patches[:, :count], fused], 1)


def programs(spec: dict) -> dict[str, Callable[[], torch.Tensor]]:
    """By 'METHOD/eager' and 'METHOD/compile': one forward pass."""
    model, size = build(spec["model"]), spec["model"]["image_size"]
    images = torch.randn(spec["batch"], 3, size, size, generator=torch.Generator().manual_seed(1))
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for method, counts in spec["counts"].items():
        run = lambda m=method, c=tuple(counts): forward(model, images, m, c)  # noqa: E731
        plain = (lambda: model(images).logits) if method == "dense" else run
        found |= {
            f"{method}/eager": plain,
            f"{method}/compile": torch.compile(plain, dynamic=False),
        }
    return found


def main() -> None:
    """The conversation on stdin and stdout."""
    spec = hear()
    torch.set_num_threads(spec["threads"])
    with torch.inference_mode():
        found = programs(spec)
        for run in found.values():
            run()
            run()
        answer(found, {"torch": torch.__version__, "transformers": tf.__version__})


if __name__ == "__main__":
    main()
