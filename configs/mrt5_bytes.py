"""MrT5 from scratch on span corruption of bytes: a gate deletes half of them after two layers.

python train.py --config=configs/mrt5_bytes.py --workdir=runs/mrt5_bytes
"""

from tokred.train.config import Config, finish, span_config


def get_config(arg: str = "") -> Config:
    config = span_config()
    config.train.method = "mrt5"
    config.train.options = {"keep": 0.5, "capacity": 0.6, "layer": 2, "delay": 300}
    return finish(config, arg)
