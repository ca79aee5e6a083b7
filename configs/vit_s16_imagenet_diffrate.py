"""ImageNet-1k, ViT-S/16 at 224 pixels: DiffRate's rates for 2.9 GMACs, learned on frozen weights.

python train.py --config=configs/vit_s16_imagenet_diffrate.py --workdir=runs/vit_s16_diffrate

Starts from the finished run of vit_s16_imagenet_dense (--config.start_from=WORKDIR for another)
and trains the rates alone for 3 epochs; then every baseline runs at the MACs of what was learned.

Source: Chen et al. 2023 (arXiv 2305.17997), OpenGVLab/DiffRate, README.md and the defaults of
main.py and engine.py; every number below is from there. Published: 79.5 % top-1 at 2.905 GMACs
without fine-tuning the weights (79.9 % dense at 4.6); not reproduced here. The published schedule
itself is the plan make_plan('diffrate', layout, preset='deit_s@2.9').

Departures: no repeated augmentation, and RandAugment as in vit_s16_imagenet_dense. The learning
rate falls to 0.001 within the 3 epochs; the official scheduler counts epochs, one late, and is at
0.0078 in the last one. The MACs that meet the target are tokred's count, which includes what the
reductions cost (0.004 G). bfloat16 instead of float16.

Needs imagenet2012 prepared by TFDS (the error says how) and accelerators whose number divides the
batch.
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import imagenet_config

IMAGES, EPOCHS, BATCH = 1_281_167, 3, 1024


def get_config(arg: str = "") -> Config:
    config = imagenet_config(BATCH)
    config.start_from = "runs/vit_s16_imagenet_dense"
    config.train.steps = 0
    config.rates.update({"steps": IMAGES * EPOCHS // BATCH, "lr": 0.01, "end": 0.1})
    config.rates.update({"unit": "giga", "target": 2.9, "weight": 5.0})
    config.rates.options = {"granularity": 4}
    return finish(config, arg)
