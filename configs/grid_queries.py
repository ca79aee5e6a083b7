"""Matryoshka queries of one length in a model that has been trained with all tokens.

python train.py --config=configs/grid_queries.py --workdir=runs/grid_queries \\
  --config.start_from=runs/grid_dense --config.beside.mqt.length=8
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_grid_config


def get_config(arg: str = "") -> Config:
    config = continued_grid_config()
    config.beside = {"mqt": {"length": 16, "start": "local"}}
    return finish(config, arg)
