"""A control of configs/mrt5_bytes.py: as many bytes are deleted, evenly spaced.

python train.py --config=configs/mrt5_bytes_stride.py --workdir=runs/mrt5_bytes_stride \\
  --config.start_from=runs/mrt5_bytes_pretrain
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_config


def get_config(arg: str = "") -> Config:
    config = continued_config()
    config.train.method = "mrt5"
    config.train.options = {"keep": 0.5, "gate": "stride", "layer": 3}
    return finish(config, arg)
