"""Token reduction in JAX: one noun (TokenMap), five verbs, methods as short compositions."""

from tokred.maps import Assign, Keep, Mix, TokenMap, compose
from tokred.methods import get_method, list_methods, make_plan, register
from tokred.models import (
    VLM,
    Conditioned,
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Prompted,
    ViT,
    ViTConfig,
    VLMConfig,
    decoder_config,
    encoder_decoder_config,
    vit_config,
    vlm_config,
)
from tokred.models.generate import Sampling, generate
from tokred.plan import Ask, Layout, Plan, Reduction, Site
from tokred.report import Call, Report
from tokred.tokens import Tokens, make_tokens, move

__all__ = [
    "VLM",
    "Ask",
    "Assign",
    "Call",
    "Conditioned",
    "Decoder",
    "DecoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Keep",
    "Layout",
    "Mix",
    "Plan",
    "Prompted",
    "Reduction",
    "Report",
    "Sampling",
    "Site",
    "TokenMap",
    "Tokens",
    "VLMConfig",
    "ViT",
    "ViTConfig",
    "compose",
    "decoder_config",
    "encoder_decoder_config",
    "generate",
    "get_method",
    "list_methods",
    "make_plan",
    "make_tokens",
    "move",
    "register",
    "vit_config",
    "vlm_config",
]
