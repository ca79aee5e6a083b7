"""A delete gate in the encoder and Mixture-of-Depths in the decoder, under one budget: the gate
deletes what the whole model's MACs ask for.

python train.py --config=configs/mrt5_mod_bytes.py --workdir=runs/mrt5_mod_bytes \\
  --config.start_from=runs/mrt5_bytes_pretrain --config.train.macs=0.75
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_config


def get_config(arg: str = "") -> Config:
    config = continued_config()
    config.train.method, config.train.macs = "mrt5", 0.75
    config.train.options = {"layer": 2, "proportional": 0.03, "two_sided": True, "corrected": True}
    config.beside = {"decoder/mod": {"keep": 0.5, "gate": "predictor"}}
    return finish(config, arg)
