"""Weights in and out under the names that other libraries write to disk."""

from tokred.interop.attach import what_fits
from tokred.interop.families import FAMILIES, Source
from tokred.interop.loaded import Loaded, attach, load, save
from tokred.interop.pretrained import PACKAGES, pretrained
from tokred.interop.safetensors import is_exported

__all__ = [
    "FAMILIES",
    "PACKAGES",
    "Loaded",
    "Source",
    "attach",
    "is_exported",
    "load",
    "pretrained",
    "save",
    "what_fits",
]
