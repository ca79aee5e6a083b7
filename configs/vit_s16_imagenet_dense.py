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

from tokred.train.config import Config, default_config, finish

IMAGES, EPOCHS, BATCH = 1_281_167, 300, 1024


def get_config(arg: str = "") -> Config:
    config = default_config()
    config.model.update({"width": 384, "depth": 12, "heads": 6, "drop_path": 0.1})
    config.model.dtype = "bfloat16"
    config.data.update({"name": "imagenet2012", "batch": BATCH, "eval_batch": 1024, "threads": 16})
    config.train.steps = IMAGES * EPOCHS // BATCH
    config.optimizer.update({"lr": 5e-4 * BATCH / 512, "end": 0.01, "warmup": 5 / EPOCHS})
    config.optimizer.update({"weight_decay": 0.05, "b2": 0.999, "clip": 0.0, "ema": 0.99996})
    config.loss.update({"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0})
    config.loss.update({"mix_share": 1.0, "mix_switch": 0.5})
    config.checkpoint.every = 5000
    return finish(config, arg)
