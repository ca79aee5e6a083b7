"""Images to a map of the same size: a ViT, its tokens put back on the grid, and convolutions."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.models.inner import HasInner
from tokred.models.vit import ViT, ViTConfig, check_images
from tokred.nn.embeddings import grid_positions
from tokred.nn.grids import resize_matrix
from tokred.ops import gather
from tokred.plan import Plan
from tokred.report import Call, Report
from tokred.tokens import Tokens

DENSE = Plan()


@dataclass(frozen=True)
class DenseViTConfig(HasInner):
    """vision: of the encoder, whose head is not used. channels: behind each of the convolutions,
    which double the sides. out: channels of the map. All static."""

    vision: ViTConfig = field(default_factory=lambda: ViTConfig(classes=0))
    channels: tuple[int, ...] = (256, 128, 64)
    out: int = 1

    @property
    def image_size(self) -> tuple[int, int]:
        return self.vision.image_size

    @property
    def inner(self) -> ViTConfig:
        return self.vision

    def outer_macs(self, tokens: Any) -> Any:
        """Of the embedding, the convolutions and the resize, whatever the plan removes."""
        (h, w), width, total = self.vision.grid, self.vision.width, 0
        for channels in self.channels:
            total += 16 * h * w * width * channels
            h, w, width = 2 * h, 2 * w, channels
        (y, x), out = self.image_size, self.out
        return self.vision.outer_macs(tokens) + total + h * w * width * out + out * w * y * (h + x)


class DenseViT(nnx.Module):
    """images [B Y X C] -> (logits [B Y X out], Report), under any Plan.

    A patch whose token was merged gets that token's features, one whose token left those of the
    nearest that stayed.
    """

    def __init__(self, config: DenseViTConfig, *, plan: Plan = DENSE, rngs: nnx.Rngs):
        self.config, c = config, config.vision
        kinds = {"dtype": c.dtype, "param_dtype": c.param_dtype, "rngs": rngs}
        self.vision = ViT(c, plan=plan, rngs=rngs)
        sides = [(c.width, *config.channels)[i : i + 2] for i in range(len(config.channels))]
        up = {"strides": (2, 2), "padding": "SAME", **kinds}
        self.up = nnx.List(nnx.ConvTranspose(a, b, (4, 4), **up) for a, b in sides)
        self.last = nnx.Linear((c.width, *config.channels)[-1], config.out, **kinds)

    @property
    def reductions(self) -> nnx.Dict:
        return self.vision.reductions

    def __call__(
        self, images: Float[Array, "B Y X C"], *, plan: Plan = DENSE, call: Call | None = None
    ) -> tuple[Float[Array, "B Y X out"], Report]:
        """Logits in float32; errors as `ViT` has them. Static: plan."""
        grid, report = self.features(images, plan=plan, call=call)
        return self.logits(grid), report

    def logits(self, grid: Float[Array, "B H W D"]) -> Float[Array, "B Y X out"]:
        """The map of the features of every patch, in float32."""
        for layer in self.up:
            grid = jax.nn.relu(layer(grid))
        return self._resize(self.last(grid).astype(jnp.float32))

    def features(
        self, images: Float[Array, "B Y X C"], *, plan: Plan = DENSE, call: Call | None = None
    ) -> tuple[Float[Array, "B H W D"], Report]:
        """Features of every patch, whatever became of its token."""
        check_images(images, self.config.vision)
        tokens, report = self.vision.encode(self.vision.tokens(images), plan=plan, call=call)
        patches = spread(tokens, self.config.vision.grid)
        return patches.reshape(patches.shape[0], *self.config.vision.grid, -1), report

    def _resize(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Y X C"]:
        for axis, size in ((1, self.config.image_size[0]), (2, self.config.image_size[1])):
            matrix = jnp.asarray(resize_matrix(x.shape[axis], size, "bilinear"))
            x = jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 1)), -1, axis)
        return x


def spread(tokens: Tokens, grid: tuple[int, int]) -> Float[Array, "B N D"]:
    """Features of all patches of a grid: of the token that each is part of, or, where that is gone,
    of the nearest one by position. Gradient: to the tokens."""
    place = tokens.positions()[:, None, :, :]  # [B 1 K 2]
    patches = jnp.asarray(grid_positions(grid))[None, :, None, :]
    away = jnp.square(place - patches).sum(-1)
    slots = jnp.arange(tokens.n)[None, None]
    there = slots >= tokens.prefix
    if tokens.valid is not None:
        there = there & tokens.valid[:, None]
    nearest = jnp.argmin(jnp.where(there, away, jnp.inf), axis=-1)
    source = tokens.sources()[:, -patches.shape[1] :]
    return gather(tokens.x, jnp.where(source < 0, nearest, source), axis=1)
