"""LLaVA 1.5 and LLaVA-NeXT: a CLIP tower, two linears, a Llama; NeXT's rows end in newlines.

A prompt of LLaVA-NeXT is read under `make_plan("anyres", config.layout, crops=..., size=...)`.
"""

from collections.abc import Iterable

from tokred.interop.decoders import llama_config, llama_rules
from tokred.interop.family import Family, Settings, require
from tokred.interop.names import Rule, first_prefix, linears
from tokred.interop.vision import clip_vision_config, tower_rules
from tokred.models import VLM, VLMConfig

PROJECTOR = {"linear_1": "layers/0", "linear_2": "layers/1"}


def _config(settings: Settings, names: Iterable[str]) -> VLMConfig:
    vision, text = settings["vision_config"], settings["text_config"]
    require(settings, projector_hidden_act="gelu", vision_feature_select_strategy="default")
    require(settings, multimodal_projector_bias=True)
    require(vision, model_type="clip_vision_model")
    require(text, model_type=("llama", "mistral", "qwen2"))
    layer = settings.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or layer >= -1:
        require(settings, vision_feature_layer=-2)
    image = settings.get("image_token_index", settings.get("image_token_id"))
    return VLMConfig(
        vision=clip_vision_config(vision),
        decoder=llama_config(text),
        feature_layer=vision["num_hidden_layers"] + 1 + layer,
        image_id=image,
        newline=settings["model_type"] == "llava_next",
    )


def _rules(settings: Settings, names: Iterable[str], config: VLMConfig) -> list[Rule]:
    names = tuple(names)
    tower = first_prefix(names, "vision_tower.vision_model.", "vision_tower.")
    return [
        *tower_rules(tower, "vision/", settings["vision_config"], config.vision),
        *linears("multi_modal_projector.", "projector/", PROJECTOR),
        *llama_rules("language_model.", "decoder/"),
        Rule("image_newline", "newline"),
    ]


LLAVA = Family("llava", ("llava", "llava_next"), VLM, _config, _rules)
