"""Matryoshka queries on questions about grids of digits: a length is drawn for every step.

python train.py --config=configs/grid_mqt.py --workdir=runs/grid_mqt
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import grid_config


def get_config(arg: str = "") -> Config:
    config = grid_config()
    config.train.method, config.train.vary = "mqt", "length"
    config.train.each = (1, 2, 4, 8, 16, 32, 64)
    config.train.options = {"look": "tokens"}
    return finish(config, arg)
