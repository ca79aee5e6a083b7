"""Mixture-of-Depths in the decoder of an encoder-decoder that has been trained without: half of the
target's bytes skip a layer.

python train.py --config=configs/mod_bytes.py --workdir=runs/mod_bytes \\
  --config.start_from=runs/mrt5_bytes_pretrain
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_config


def get_config(arg: str = "") -> Config:
    config = continued_config()
    config.beside = {"decoder/mod": {"keep": 0.5, "gate": "predictor"}}
    return finish(config, arg)
