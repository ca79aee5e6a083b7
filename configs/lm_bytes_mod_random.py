"""The control of Mixture-of-Depths: the same layers, tokens drawn at random.

python train.py --config=configs/lm_bytes_mod_random.py --workdir=runs/lm_bytes_mod_random
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import bytes_config


def get_config(arg: str = "") -> Config:
    config = bytes_config()
    config.train.method = "mod"
    config.train.options = {"keep": 0.125, "gate": None, "router": "random"}
    return finish(config, arg)
