"""Models by size name. They take a Plan and know no method."""

from tokred.models.decoder import Decoder, DecoderConfig, decoder_config
from tokred.models.vit import ViT, ViTConfig, vit_config

__all__ = ["Decoder", "DecoderConfig", "ViT", "ViTConfig", "decoder_config", "vit_config"]
