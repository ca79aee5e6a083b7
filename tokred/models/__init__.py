"""Models by size name. They take a Plan and know no method."""

from tokred.models.decoder import Decoder, DecoderConfig, decoder_config
from tokred.models.dense_vit import DenseViT, DenseViTConfig
from tokred.models.dual_encoder import DualEncoder, DualEncoderConfig
from tokred.models.encoder_decoder import Conditioned, EncoderDecoder
from tokred.models.encoder_decoder_config import EncoderDecoderConfig, encoder_decoder_config
from tokred.models.text_encoder import TextEncoder, TextEncoderConfig
from tokred.models.vit import ViT, ViTConfig, vit_config
from tokred.models.vlm import VLM, Prompted, VLMConfig
from tokred.models.vlm_sizes import vlm_config

__all__ = [
    "VLM",
    "Conditioned",
    "Decoder",
    "DecoderConfig",
    "DenseViT",
    "DenseViTConfig",
    "DualEncoder",
    "DualEncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Prompted",
    "TextEncoder",
    "TextEncoderConfig",
    "VLMConfig",
    "ViT",
    "ViTConfig",
    "decoder_config",
    "encoder_decoder_config",
    "vit_config",
    "vlm_config",
]
