"""MrT5 from a trained model: a gate learns to delete half of the bytes before the last of four
layers.

Gate and controller are slower than published: at this learning rate the published gain swings
between none and all of the bytes for hundreds of steps, which the model does not recover from.

python train.py --config=configs/mrt5_bytes.py --workdir=runs/mrt5_bytes \\
  --config.start_from=runs/mrt5_bytes_pretrain
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import continued_config


def get_config(arg: str = "") -> Config:
    config = continued_config()
    config.train.method = "mrt5"
    config.train.options = {"keep": 0.5, "capacity": 0.75, "layer": 3}
    config.train.options.update({"two_sided": True, "corrected": True})
    config.train.options.update({"proportional": 0.03, "integral": 3e-4})
    config.optimizer.scales = (("^reductions/", 0.1), *config.optimizer.scales)
    return finish(config, arg)
