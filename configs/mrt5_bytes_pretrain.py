"""Span corruption of bytes without deletion: the model that the mrt5_bytes recipes start from.

python train.py --config=configs/mrt5_bytes_pretrain.py --workdir=runs/mrt5_bytes_pretrain
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import span_config


def get_config(arg: str = "") -> Config:
    config = span_config()
    return finish(config, arg)
