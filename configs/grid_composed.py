"""Merging in the encoder, Matryoshka queries in the connector and p-MoD in the decoder, under one
budget: tokens merge as much as the whole model's MACs ask for.

python train.py --config=configs/grid_composed.py --workdir=runs/grid_composed \\
  --config.start_from=runs/grid_dense --config.train.macs=0.6
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import composed_grid_config


def get_config(arg: str = "") -> Config:
    config = composed_grid_config()
    config.train.method, config.train.macs = "tome", 0.6
    return finish(config, arg)
