"""Real digits among clutter, trained with DynamicViT's predictors from the start.

python train.py --config=configs/digits_dynamicvit.py --workdir=runs/digits_dynamicvit

Gumbel decisions act as a policy on attention while training, and a ratio loss holds the share of
kept tokens near `keep` per stage; in evaluation the tokens leave. No teacher is distilled.
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import digits_config


def get_config(arg: str = "") -> Config:
    config = digits_config()
    config.train.update({"method": "dynamicvit", "options": {"keep": 0.6, "layers": (1, 2, 3)}})
    return finish(config, arg)
