"""MrT5 from a trained model: a gate learns to delete half of the bytes after two of four layers,
with the published controller.

It keeps 52 % of the stream that it trains on, since texts of other files lose two points more.

python train.py --config=configs/mrt5_bytes.py --workdir=runs/mrt5_bytes \\
  --config.start_from=runs/mrt5_bytes_pretrain
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_config


def get_config(arg: str = "") -> Config:
    config = continued_config()
    config.train.method = "mrt5"
    config.train.options = {"keep": 0.52, "capacity": 0.75, "layer": 2}
    config.train.options.update({"two_sided": True, "corrected": True})
    return finish(config, arg)
