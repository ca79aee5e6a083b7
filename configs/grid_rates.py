"""Learned rates in the encoder, beside Matryoshka queries in the connector and p-MoD in the
decoder: those two are trained first, then the rates alone, until the whole model costs 0.6.

python train.py --config=configs/grid_dense.py --workdir=runs/grid_dense_class \\
  --config.model.vision.class_token=True
python train.py --config=configs/grid_rates.py --workdir=runs/grid_rates \\
  --config.start_from=runs/grid_dense_class
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import composed_grid_config


def get_config(arg: str = "") -> Config:
    config = composed_grid_config()
    config.model.vision.class_token = True  # whose attention ranks the tokens
    config.rates.update({"steps": 300, "lr": 0.05, "target": 0.6, "weight": 100.0})
    return finish(config, arg)
