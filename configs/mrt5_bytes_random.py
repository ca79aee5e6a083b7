"""A control of configs/mrt5_bytes.py: as many bytes are deleted, drawn at random.

python train.py --config=configs/mrt5_bytes_random.py --workdir=runs/mrt5_bytes_random \\
  --config.start_from=runs/mrt5_bytes_pretrain
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_config


def get_config(arg: str = "") -> Config:
    config = continued_config()
    config.train.method = "mrt5"
    config.train.options = {"keep": 0.5, "gate": "random", "layer": 3}
    return finish(config, arg)
