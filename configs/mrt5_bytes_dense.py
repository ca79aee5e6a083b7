"""More span corruption of bytes without deletion: what the others are compared with.

python train.py --config=configs/mrt5_bytes_dense.py --workdir=runs/mrt5_bytes_dense \\
  --config.start_from=runs/mrt5_bytes_pretrain
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_config


def get_config(arg: str = "") -> Config:
    config = continued_config()
    return finish(config, arg)
