"""Images and texts in one space: CLIP and SigLIP."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokred.models.text_encoder import TextEncoder, TextEncoderConfig
from tokred.models.vit import ViT, ViTConfig
from tokred.plan import Layout, Plan
from tokred.report import Call, Report
from tokred.score import cosine

DENSE = Plan()


@dataclass(frozen=True)
class DualEncoderConfig:
    """Two towers whose features have the same width; static. shift: a learned bias of the logits
    beside their scale (SigLIP)."""

    vision: ViTConfig = field(default_factory=lambda: ViTConfig(classes=0))
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    shift: bool = False

    @property
    def layout(self) -> Layout:
        """Of the vision tower, where plans act."""
        return self.vision.layout


class DualEncoder(nnx.Module):
    """(images [B ...], ids [T N]) -> (logits [B T], Report); plans act in the vision tower."""

    def __init__(self, config: DualEncoderConfig, *, plan: Plan = DENSE, rngs: nnx.Rngs):
        self.config = config
        self.vision = ViT(config.vision, plan=plan, rngs=rngs)
        self.text = TextEncoder(config.text, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros(()))
        self.shift = nnx.Param(jnp.zeros(())) if config.shift else None

    @property
    def reductions(self) -> nnx.Dict:
        return self.vision.reductions

    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        ids: Int[Array, "T N"],
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Bool[Array, "T N"] | None = None,
    ) -> tuple[Float[Array, "B T"], Report]:
        """Similarity of every image with every text, times exp(scale), plus the shift. valid: of
        the ids. Static: plan."""
        seen, report = self.see(images, plan=plan, call=call)
        read, _ = self.text(ids, valid=valid)
        logits = jnp.exp(self.scale[...]) * cosine(seen, read)
        return logits if self.shift is None else logits + self.shift[...], report

    def see(
        self, images: Float[Array, "B Y X C"], *, plan: Plan = DENSE, call: Call | None = None
    ) -> tuple[Float[Array, "B D"], Report]:
        """An image's features, not yet of length 1."""
        tokens, report = self.vision.encode(self.vision.tokens(images), plan=plan, call=call)
        features = self.vision.features(tokens)
        if self.vision.head is not None:
            features = self.vision.head(features)
        return features.astype(jnp.float32), report
