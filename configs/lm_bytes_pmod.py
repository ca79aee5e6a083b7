"""Mixture-of-Depths on bytes with p-MoD's progressive decay: the deeper, the fewer tokens enter.

python train.py --config=configs/lm_bytes_pmod.py --workdir=runs/lm_bytes_pmod

As many tokens per layer in the mean as configs/lm_bytes_mod.py. p-MoD's own router looks at vision
tokens alone, which bytes have none of; its schedule is what is taken from it.
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import bytes_config


def get_config(arg: str = "") -> Config:
    config = bytes_config()
    config.train.method = "mod"
    config.train.options = {"keep": 0.5625, "decay": "cosine", "gate": "predictor"}
    return finish(config, arg)
