"""ImageNet-1k, ViT-S/16 at 224 pixels for 300 epochs, then DiffRate's rates, all baselines.

python train.py --config=configs/imagenet_vit_s16.py --workdir=runs/imagenet_vit_s16

Needs imagenet2012 prepared by TFDS (the error says how) and accelerators; one process, one device.
Not run here: no accuracy is claimed. Mixup and CutMix are not part of it.
"""

from tokred.train.config import Config, default_config, finish


def get_config(arg: str = "") -> Config:
    config = default_config()
    config.model.update({"width": 384, "depth": 12, "heads": 6, "drop_path": 0.1})
    config.model.dtype = "bfloat16"
    config.data.update({"name": "imagenet2012", "batch": 1024, "eval_batch": 500, "threads": 16})
    config.train.steps = 1_281_167 * 300 // 1024
    config.optimizer.update({"lr": 1e-3, "weight_decay": 0.05, "b2": 0.999})
    config.optimizer.warmup = 5 / 300
    config.loss.label_smoothing = 0.1
    config.rates.update({"steps": 3000, "lr": 0.01, "unit": "giga", "target": 2.9, "weight": 5.0})
    config.log.save_every = 5000
    return finish(config, arg)
