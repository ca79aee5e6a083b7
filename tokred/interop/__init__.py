"""Weights in and out under the names that other libraries write to disk."""

from tokred.interop.safetensors import is_exported, read_params, read_settings
from tokred.interop.t5 import T5, t5_config

__all__ = ["T5", "is_exported", "read_params", "read_settings", "t5_config"]
