"""H-Net on bytes: the text cuts itself into chunks, on which the inner layers run.

python train.py --config=configs/lm_bytes_hnet.py --workdir=runs/lm_bytes_hnet
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import bytes_config


def get_config(arg: str = "") -> Config:
    config = bytes_config()
    config.train.method = "hnet"
    config.train.options = {"keep": 0.4, "chunk": 4.0}
    return finish(config, arg)
