"""Span corruption of bytes without deletion: what the others are compared with.

python train.py --config=configs/mrt5_bytes_dense.py --workdir=runs/mrt5_bytes_dense
"""

from tokred.train.config import Config, finish, span_config


def get_config(arg: str = "") -> Config:
    return finish(span_config(), arg)
