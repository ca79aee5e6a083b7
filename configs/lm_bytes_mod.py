"""Mixture-of-Depths on bytes: every second layer takes an eighth of the tokens.

python train.py --config=configs/lm_bytes_mod.py --workdir=runs/lm_bytes_mod
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import bytes_config


def get_config(arg: str = "") -> Config:
    config = bytes_config()
    config.train.method = "mod"
    config.train.options = {"keep": 0.125, "gate": "predictor"}
    return finish(config, arg)
