"""Matryoshka queries on questions about grids of digits: a length is drawn for every step.

python train.py --config=configs/grid_mqt.py --workdir=runs/grid_mqt
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import nested_config


def get_config(arg: str = "") -> Config:
    config = nested_config()
    return finish(config, arg)
