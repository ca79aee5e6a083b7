"""Models by size name. They take a Plan and know no method."""

from tokred.models.vit import ViT, ViTConfig, vit_config

__all__ = ["ViT", "ViTConfig", "vit_config"]
