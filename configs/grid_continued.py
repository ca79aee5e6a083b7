"""A method in a model that has been trained with all tokens.

python train.py --config=configs/grid_continued.py --workdir=runs/grid_tome \\
  --config.start_from=runs/grid_dense --config.train.method=tome --config.train.macs=0.6
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_grid_config


def get_config(arg: str = "") -> Config:
    return finish(continued_grid_config(), arg)
