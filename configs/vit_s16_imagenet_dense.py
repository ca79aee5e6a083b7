"""ImageNet-1k, ViT-S/16 at 224 pixels, dense, from scratch for 300 epochs: DeiT-S.

python train.py --config=configs/vit_s16_imagenet_dense.py --workdir=runs/vit_s16_imagenet_dense

Source: Touvron et al. 2021 (arXiv 2012.12877), facebookresearch/deit, README_deit.md and the
defaults of main.py; every number below is from there. Published: 79.9 % top-1 at 4.6 GMACs; not
reproduced here.

Departures: no repeated augmentation (there, an epoch shows a third of the images three times);
RandAugment from this project's operations (neither Invert nor SolarizeAdd, milder Posterize);
learning rates per step instead of per epoch, the cosine starting after the warm-up; bfloat16
instead of float16. Both keep averaged weights (EMA); this recipe evaluates them, whereas the
official figure is that of the plain ones.

Needs imagenet2012 prepared by TFDS (the error says how) and accelerators whose number divides the
batch. Afterwards every baseline runs at 60 % of the MACs, without fine-tuning.
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import deit_config

IMAGES, EPOCHS, BATCH = 1_281_167, 300, 1024


def get_config(arg: str = "") -> Config:
    config = deit_config(BATCH, IMAGES, EPOCHS)
    return finish(config, arg)
