"""Matryoshka queries in a model that has been trained with all tokens: first the connector learns,
then the decoder with it. As usual in the field, the vision model stays as it is.

python train.py --config=configs/grid_mqt_two_stage.py --workdir=runs/grid_mqt_two_stage \\
  --config.start_from=runs/grid_dense  # or start_parts.vision, start_parts.decoder
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import in_two_stages, nested_config


def get_config(arg: str = "") -> Config:
    return finish(in_two_stages(nested_config()), arg)
