"""Inputs of the right shapes for any model."""

from typing import Any

import jax.numpy as jnp

from tokred.models.dense_vit import DenseViT
from tokred.models.dual_encoder import DualEncoder
from tokred.models.encoder_decoder import EncoderDecoder
from tokred.models.vit import ViT
from tokred.models.vlm import VLM


def example(model: Any, batch: int = 1) -> tuple[Any, ...]:
    """Inputs of the right shapes, as long as the model takes: zeros."""
    config = model.config
    if isinstance(model, (ViT, DenseViT)):
        return _images(getattr(config, "vision", config), batch)
    if isinstance(model, DualEncoder):
        text = jnp.zeros((batch, config.text.context), jnp.int32)
        return (*_images(config.vision, batch), text)
    if isinstance(model, VLM):
        n = max(1, config.context - config.images * config.image_tokens())  # ids beside images
        ids = jnp.zeros((batch, config.images + n), jnp.int32)
        ids = ids.at[:, : config.images].set(config.image_id)
        images = _images(config.vision, batch)[0][:, None]
        return ids, jnp.repeat(images, config.images, axis=1)
    ids = jnp.zeros((batch, config.context), jnp.int32)
    if isinstance(model, EncoderDecoder):
        return ids, jnp.zeros((batch, config.target_context), jnp.int32)
    return (ids,)


def _images(config: Any, batch: int) -> tuple[Any]:
    return (jnp.zeros((batch, *config.image_size, config.channels)),)
