"""ImageNet-1k, ViT-S/16 at 224 pixels, trained from scratch with ToMe merging 13 tokens per layer.

python train.py --config=configs/vit_s16_imagenet_tome.py --workdir=runs/vit_s16_imagenet_tome

Sources: Bolya et al. 2023 (arXiv 2210.09461) and facebookresearch/ToMe, README.md: r = 13,
proportional attention and 'the official implementation' of DeiT are from there. It publishes no
training code; the numbers below are those of facebookresearch/deit, and that none was changed is
assumed. Published: 79.36 % top-1 against 79.8 % dense; 2.7 GMACs by tokred's count, against 4.6.
Not reproduced here.

Without training, r = 13 on DeiT-S gave a user of the official code 78.8 % (issue 11 there); close
to it lies the row of ToMe at 60 % of the MACs that vit_s16_imagenet_dense ends with.

Departures: those of vit_s16_imagenet_dense. Needs imagenet2012 prepared by TFDS (the error says
how) and accelerators whose number divides the batch.
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import deit_config

IMAGES, EPOCHS, BATCH = 1_281_167, 300, 1024


def get_config(arg: str = "") -> Config:
    config = deit_config(BATCH, IMAGES, EPOCHS)
    config.train.method = "tome"
    config.train.options = {"r": 13, "proportional": True}
    return finish(config, arg)
