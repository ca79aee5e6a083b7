"""Vision Transformers (Dosovitskiy et al. 2021) whose blocks offer every site."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from tokred.nn.block import Block
from tokred.nn.embeddings import PatchEmbed, grid_positions, sincos_positions
from tokred.nn.layers import Layers
from tokred.nn.mlp import GELUS
from tokred.nn.pool import AttentionPool, attention_pool_macs
from tokred.plan import Layout, Plan, nearest
from tokred.report import Call, Report, make_report, reduce_model
from tokred.tokens import Tokens, make_tokens

DENSE = Plan()
SIZES = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
}
POSITIONS = ("learned", "sincos", "learned_sincos")
POOLS = ("class", "mean", "size_mean", "class_mean", "map")


@dataclass(frozen=True)
class ViTConfig:
    """Everything that shapes a ViT; all fields are static.

    patch_kernel: side of an overlapping patch embedding, None for the patch itself.
    hidden: of the MLPs, None for mlp_ratio widths.
    distill: a second token in front with a head of its own; logits are the mean of both (DeiT).
    position: 'learned', 'sincos' (fixed), 'learned_sincos' (learned from that start).
    pool: 'class', 'mean' over patch tokens, 'size_mean', which weighs merged tokens by size,
    'class_mean', both beside each other (DINOv2), or 'map', a learned query's attention (SigLIP).
    embed_norm: a norm in front of the layers (CLIP). norm_after_pool: the final norm follows
    pooling (MAE, CLIP) instead of preceding it.
    classes: 0 for no head, where only features are wanted. patch_bias, head_bias: of those.
    gelu: 'exact' | 'tanh' | 'quick'. drop_path: stochastic depth of the last layer, growing from 0.
    scan: run equal layers under one compiled body; default False: compiling gets faster, but the
    step slower (README, 'Scanning').
    """

    image_size: tuple[int, int] = (224, 224)
    patch: tuple[int, int] = (16, 16)
    channels: int = 3
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    hidden: int | None = None
    classes: int = 1000
    class_token: bool = True
    distill: bool = False
    registers: int = 0
    position: str = "learned"
    pool: str = "class"
    embed_norm: bool = False
    norm_after_pool: bool = False
    patch_kernel: int | None = None
    patch_bias: bool = True
    head_bias: bool = True
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0
    gelu: str = "exact"
    norm_eps: float = 1e-6
    scan: bool = False
    attention: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for field in ("image_size", "patch"):
            value = getattr(self, field)
            pair = (value, value) if isinstance(value, int) else tuple(value)
            object.__setattr__(self, field, pair)
        if any(size % p for size, p in zip(self.image_size, self.patch, strict=True)):
            raise ValueError(
                f"ViTConfig: image_size={self.image_size} is not divisible by patch={self.patch}; "
                "change one of the two."
            )
        _one_of("position", self.position, POSITIONS)
        _one_of("pool", self.pool, POOLS)
        _one_of("gelu", self.gelu, tuple(GELUS))
        if (self.pool.startswith("class") or self.distill) and not self.class_token:
            raise ValueError(
                f"ViTConfig: pool={self.pool!r} and distill={self.distill} need class_token=True; "
                "or use pool='mean' and distill=False."
            )

    @property
    def grid(self) -> tuple[int, int]:
        (h, w), (a, b) = self.image_size, self.patch
        return h // a, w // b

    @property
    def layout(self) -> Layout:
        """What plans may know of this model."""
        return self.layout_of(self.prefix + self.grid[0] * self.grid[1])

    @property
    def prefix(self) -> int:
        """Class token, the one of distillation, and registers."""
        return self.placed + self.registers

    @property
    def placed(self) -> int:
        """Tokens in front that have a position of their own."""
        return int(self.class_token) + int(self.distill)

    @property
    def feed_width(self) -> int:
        """Of the hidden layer of an MLP."""
        return int(self.width * self.mlp_ratio) if self.hidden is None else self.hidden

    @property
    def head_width(self) -> int:
        """Of what the head reads."""
        return 2 * self.width if self.pool == "class_mean" else self.width

    def layout_of(self, tokens: int) -> Layout:
        """The same for so many tokens at the first layer."""
        return Layout(
            depth=self.depth,
            tokens=tokens,
            prefix=self.prefix,
            grid=self.grid,
            class_token=self.class_token,
            width=self.width,
            heads=self.heads,
        )

    @property
    def projection_macs(self) -> tuple[int, int, int]:
        """Of one token's query, key and value."""
        return self.width**2, self.width**2, self.width**2

    @property
    def pair_macs(self) -> int:
        """Of one query's logits or values with one key, all heads."""
        return self.width

    def layer_macs(self, projected: Any, queries: Any, keys: Any, mlp: Any) -> Any:
        """Of one layer, at these token counts."""
        projections = projected * sum(self.projection_macs) + queries * self.width**2
        feed = 2 * mlp * self.width * self.feed_width
        return projections + 2 * queries * keys * self.pair_macs + feed

    def outer_macs(self, tokens: Any) -> int:
        """Of the embedding and the head."""
        (h, w), (a, b) = self.grid, self.patch
        a, b = (a, b) if self.patch_kernel is None else (self.patch_kernel,) * 2
        heads = (1 + self.distill) * self.head_width * self.classes
        if self.pool == "map":
            heads += attention_pool_macs(self.width, self.feed_width, tokens)
        return h * w * a * b * self.channels * self.width + heads


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(
            f"ViTConfig: {field}={value!r} must be one of {known}{nearest(value, known)}"
        )


def vit_config(name: str, **changes: Any) -> ViTConfig:
    """A size by name: 'vit_ti16', 'vit_s16', 'vit_b16', 'vit_l16', 'vit_h14' (any patch size).

    changes: fields of ViTConfig. Raises ValueError for an unknown size or field.
    """
    match = re.fullmatch(r"vit_([a-z]+)(\d+)", name)
    if match is None or match[1] not in SIZES:
        known = [f"vit_{size}16" for size in SIZES]
        raise ValueError(f"model {name!r} is unknown; sizes are {known}{nearest(name, known)}")
    fields = {f.name for f in dataclasses.fields(ViTConfig)}
    for field in changes:
        if field not in fields:
            raise ValueError(f"ViTConfig has no field {field!r}{nearest(field, fields)}")
    width, depth, heads = SIZES[match[1]]
    patch = int(match[2])
    base = {"width": width, "depth": depth, "heads": heads, "patch": (patch, patch)}
    return ViTConfig(**{**base, **changes})


class ViT(nnx.Module):
    """images [B H W C] -> (logits [B classes], Report), under any Plan.

    plan: only its learned reductions matter here; their modules become `reductions`.
    """

    def __init__(self, config: ViTConfig, *, plan: Plan = DENSE, rngs: nnx.Rngs):
        self.config = config
        c, layout = config, config.layout
        common = {"dtype": c.dtype, "param_dtype": c.param_dtype, "rngs": rngs}
        kernel = None if c.patch_kernel is None else (c.patch_kernel, c.patch_kernel)
        self.embed = PatchEmbed(
            c.patch, c.channels, c.width, kernel=kernel, bias=c.patch_bias, **common
        )
        draw = lambda n: nnx.Param(  # noqa: E731
            0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, (n, c.width), c.param_dtype)
        )
        self.cls = draw(1) if c.class_token else None
        self.distill = draw(1) if c.distill else None
        self.registers = draw(c.registers) if c.registers else None
        self.position = _position_table(c, rngs)
        self.blocks = nnx.List(
            Block(
                c.width,
                c.heads,
                hidden=c.feed_width,
                qkv_bias=c.qkv_bias,
                layer_scale=c.layer_scale,
                gelu=c.gelu,
                norm_eps=c.norm_eps,
                implementation=c.attention,
                **common,
            )
            for _ in range(c.depth)
        )
        norm = lambda: nnx.LayerNorm(c.width, epsilon=c.norm_eps, **common)  # noqa: E731
        pool = {"gelu": c.gelu, "norm_eps": c.norm_eps, **common}
        self.embed_norm, self.norm = norm() if c.embed_norm else None, norm()
        self.pool = None if c.pool != "map" else AttentionPool(
            c.width, c.heads, c.feed_width, **pool
        )  # fmt: skip
        head = lambda wanted: (  # noqa: E731
            nnx.Linear(c.head_width, c.classes, use_bias=c.head_bias, **common) if wanted else None
        )
        self.head, self.head_distill = head(c.classes), head(c.classes and c.distill)
        self.reductions = nnx.Dict(plan.build(layout, rngs))

    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Bool[Array, "B P"] | None = None,
    ) -> tuple[Float[Array, "B classes"], Report]:
        """valid: which patches are real (None: all). Static: plan.

        Raises:
          ValueError: wrong image shape, or a plan that does not fit the model.
          TypeError: images that are not floats.
        """
        check_images(images, self.config)
        tokens, report = self.encode(self.tokens(images, valid), plan=plan, call=call)
        return self.classify(tokens), report

    def tokens(
        self, images: Float[Array, "B Y X C"], valid: Bool[Array, "B P"] | None = None
    ) -> Tokens:
        """Embedded patches with positions, class token and registers in front."""
        c = self.config
        x = self.embed(images)
        table = self.position[...].astype(x.dtype)
        own = [token for token in (self.cls, self.distill) if token is not None]
        front = [token[...].astype(x.dtype) + table[i][None] for i, token in enumerate(own)]
        if self.registers is not None:
            front.append(self.registers[...].astype(x.dtype))
        x = x + table[None, len(table) - x.shape[1] :]
        front = [jnp.broadcast_to(row[None], (x.shape[0], *row.shape)) for row in front]
        x = jnp.concatenate([*front, x], axis=1)
        x = x if self.embed_norm is None else self.embed_norm(x)
        prefix = c.prefix
        place = np.concatenate([np.full((prefix, 2), -1, np.float32), grid_positions(c.grid)])
        place = jnp.broadcast_to(jnp.asarray(place)[None], (x.shape[0], *place.shape))
        if valid is not None:
            valid = jnp.concatenate([jnp.ones((x.shape[0], prefix), bool), valid], axis=1)
        return make_tokens(x, valid=valid, position=place, prefix=prefix)

    def encode(
        self,
        tokens: Tokens,
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        layers: int | None = None,
    ) -> tuple[Tokens, Report]:
        """All layers and the final norm, or the first `layers` without it (static); the Report
        tells what the plan did."""
        depth = self.config.depth if layers is None else layers
        counts = plan.counts(dataclasses.replace(self.config.layout, depth=depth))
        call = call or Call()
        call = dataclasses.replace(call, modules={**self.reductions, **call.modules})
        tokens, first = reduce_model(plan, "input", tokens, call)
        c = self.config
        rates = [c.drop_path * layer / max(c.depth - 1, 1) for layer in range(c.depth)]
        only = None if layers is None else range(layers)
        ran = Layers(self.blocks, rates, c.scan)(tokens, plan, call, counts, only=only)
        tokens = ran.tokens
        if not c.norm_after_pool and layers is None:
            tokens = tokens.replace(x=self.norm(tokens.x))
        tokens, last = reduce_model(plan, "output", tokens, call)
        return tokens, make_report(tokens, first + ran.records + last, ran.sources, counts)

    def classify(self, tokens: Tokens) -> Float[Array, "B classes"]:
        """Logits of pooled tokens, in float32. Raises ValueError without a head."""
        if self.head is None:
            raise ValueError("ViT: classes=0 has no head; set ViTConfig.classes, or call encode.")
        logits = self.head(self.features(tokens))
        if self.head_distill is not None:
            second = tokens.x[..., 1, :]
            second = self.norm(second) if self.config.norm_after_pool else second
            logits = (logits + self.head_distill(second)) / 2
        return logits.astype(jnp.float32)

    def features(self, tokens: Tokens) -> Float[Array, "B D"]:
        """What the head reads: pooled tokens."""
        x = pool_tokens(tokens, self.config.pool) if self.pool is None else self.pool(tokens)
        return self.norm(x) if self.config.norm_after_pool else x


def _position_table(c: ViTConfig, rngs: nnx.Rngs) -> Any:
    rows = c.placed + c.grid[0] * c.grid[1]
    table = 0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, (rows, c.width), c.param_dtype)
    if c.position != "learned":
        temperature = 100.0 if c.position == "learned_sincos" else 10000.0
        waves = sincos_positions(c.grid, c.width, temperature=temperature).astype(c.param_dtype)
        table = jnp.concatenate([table[: rows - len(waves)], waves])
    return nnx.Variable(table) if c.position == "sincos" else nnx.Param(table)


def pool_tokens(tokens: Tokens, pool: str) -> Float[Array, "*B D"]:
    """'class': the first token · 'mean' of valid patch tokens · 'size_mean' weighed by size ·
    'class_mean' the first and the mean."""
    if pool == "class":
        return tokens.x[..., 0, :]
    if pool == "class_mean":
        return jnp.concatenate([tokens.x[..., 0, :], pool_tokens(tokens, "mean")], axis=-1)
    body = tokens.x[..., tokens.prefix :, :]
    weight = jnp.ones(tokens.x.shape[:-1]) if tokens.valid is None else tokens.valid
    weight = tokens.sizes() if pool == "size_mean" else weight
    if tokens.policy is not None:
        weight = weight * tokens.policy
    weight = weight[..., tokens.prefix :, None].astype(jnp.float32)
    total = (body.astype(jnp.float32) * weight).sum(-2)
    return (total / jnp.maximum(weight.sum(-2), 1e-6)).astype(body.dtype)


def check_images(images: Any, config: ViTConfig) -> None:
    """Raises where images do not fit the model, or (concrete ones only) hold NaN or infinity."""
    expected = (*config.image_size, config.channels)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise ValueError(
            f"images: expected shape (B, {', '.join(map(str, expected))}), got {images.shape}; "
            "resize the images or set image_size and channels."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images: expected floats, got {images.dtype}; normalise them (for example x / 255.0)."
        )
    if not isinstance(images, Tracer) and not np.isfinite(images).all():
        raise ValueError("images: found NaN or infinite pixels; clean the input before the model.")
