"""Questions about grids of digits, with all tokens of the image.

python train.py --config=configs/grid_dense.py --workdir=runs/grid_dense
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import grid_config


def get_config(arg: str = "") -> Config:
    config = grid_config()
    return finish(config, arg)
