"""p-MoD in every other layer of the decoder of a model that has been trained with all tokens.

python train.py --config=configs/grid_depths.py --workdir=runs/grid_depths \\
  --config.start_from=runs/grid_dense
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_grid_config


def get_config(arg: str = "") -> Config:
    config = continued_grid_config()
    config.beside = {"decoder/pmod": {"keep": 0.5, "schedule": "interleave"}}
    return finish(config, arg)
