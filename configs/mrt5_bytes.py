"""MrT5 from a trained model: a gate learns to delete half of the bytes after three of four layers.

The proportional part of the controller is smaller than the published 0.5, with which a small model
deletes half of its bytes within 50 steps, before the gate knows which. Packed rows have slots for
55 % of their bytes: what finds none, the lowest logits first, is deleted, too.

python train.py --config=configs/mrt5_bytes.py --workdir=runs/mrt5_bytes \\
  --config.start_from=runs/mrt5_bytes_pretrain
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_config


def get_config(arg: str = "") -> Config:
    config = continued_config()
    config.train.method = "mrt5"
    config.train.options = {"keep": 0.49, "capacity": 0.55, "layer": 3, "proportional": 0.03}
    config.train.options.update({"two_sided": True, "corrected": True})
    return finish(config, arg)
