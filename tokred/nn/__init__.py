"""Flax NNX layers with parameters. No mesh names, no methods, no data carried in attributes."""

from tokred.nn.attention import Attention
from tokred.nn.block import Block
from tokred.nn.embeddings import PatchEmbed, sincos_positions
from tokred.nn.layers import Layers
from tokred.nn.mlp import Mlp
from tokred.nn.routers import KeepPredictor, RateLogits
from tokred.nn.run import Here, run_block

__all__ = [
    "Attention",
    "Block",
    "Here",
    "KeepPredictor",
    "Layers",
    "Mlp",
    "PatchEmbed",
    "RateLogits",
    "run_block",
    "sincos_positions",
]
