"""A dense decoder on bytes: the Python standard library's sources, which need no network.

python train.py --config=configs/lm_bytes_dense.py --workdir=runs/lm_bytes_dense
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import bytes_config


def get_config(arg: str = "") -> Config:
    return finish(bytes_config(), arg)
