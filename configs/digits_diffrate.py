"""Real digits among clutter: a small ViT, DiffRate's learned rates, and every baseline beside it.

python train.py --config=configs/digits_diffrate.py --workdir=runs/digits_diffrate

Trains densely, then the rates alone, then compares all methods at the MACs of the learned
schedule, without fine-tuning any. Takes 3 minutes on two quiet CPU cores. Expected: dense accuracy
97 %, the learned schedule within one point of it at 0.545 of the MACs (seeds 0, 1, 2).
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import digits_config


def get_config(arg: str = "") -> Config:
    config = digits_config()
    config.rates.update({"steps": 300, "lr": 0.05, "target": 0.55, "weight": 100.0})
    return finish(config, arg)
