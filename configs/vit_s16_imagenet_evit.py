"""ImageNet-1k, ViT-S/16 at 224 pixels, fine-tuned for 30 epochs with EViT keeping 70 % thrice.

python train.py --config=configs/vit_s16_imagenet_evit.py --workdir=runs/vit_s16_imagenet_evit

Starts from the finished run of vit_s16_imagenet_dense (--config.start_from=WORKDIR for another).
Tokens are dropped and fused after the attention of blocks 3, 6 and 9, counted from 0.

Source: Liang et al. 2022 (arXiv 2202.07800), youweiliang/evit, finetune.sh and the defaults of
main.py; every number below is from there: the keep rate is fixed from the first step on, and
dropout of paths is off, because the official code fine-tunes in evaluation mode. Published for
this script: 79.5 % top-1 (its author, issue 9 there; a user got 79.35) at 3.0 GMACs, against 79.9
dense; not reproduced here.

Departures: no repeated augmentation, RandAugment and bfloat16 as in vit_s16_imagenet_dense; no
averaged weights, since the official code keeps but does not evaluate them, and over 30 epochs they
would hold half of the dense start.

From scratch, the official run_code.sh trains as DeiT does for 300 epochs at batch 2048, and lets
the keep rate fall from 1 to 0.7 along a cosine between epochs 10 and 110. Such a schedule of the
keep rate is not part of training here: vit_s16_imagenet_dense with --config.train.method=evit
--config.train.options.keep=0.7 keeps it fixed, with an unknown effect on accuracy.

Needs imagenet2012 prepared by TFDS (the error says how) and accelerators whose number divides the
batch.
"""

from tokred.train.config import Config, finish
from tokred.train.recipes import imagenet_config

IMAGES, EPOCHS, BATCH = 1_281_167, 30, 2048


def get_config(arg: str = "") -> Config:
    config = imagenet_config(BATCH)
    config.start_from = "runs/vit_s16_imagenet_dense"
    config.model.drop_path = 0.0
    config.train.update({"steps": IMAGES * EPOCHS // BATCH, "method": "evit"})
    config.train.options = {"keep": 0.7, "fuse": True}
    config.optimizer.update({"lr": 2e-5 * BATCH / 512, "end": 0.025, "warmup": 0.0})
    config.optimizer.weight_decay = 1e-6
    return finish(config, arg)
