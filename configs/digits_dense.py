"""Real digits among clutter, trained densely; then every baseline at 60 % of the MACs.

python train.py --config=configs/digits_dense.py --workdir=runs/digits_dense
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import digits_config


def get_config(arg: str = "") -> Config:
    config = digits_config()
    config.evaluate.macs = 0.6
    return finish(config, arg)
