"""CIFAR-10 from scratch: a ViT of width 192 on 4x4 patches, DiffRate's rates, all baselines.

python train.py --config=configs/cifar10_vit.py --workdir=runs/cifar10_vit

Needs CIFAR-10 prepared by TFDS (the error says how). Meant for one accelerator; not run at full
length here, so no accuracy is claimed.
"""

from tokred.train.config import Config, default_config, finish


def get_config(arg: str = "") -> Config:
    config = default_config()
    config.model.update(
        {
            "image_size": (32, 32),
            "patch": (4, 4),
            "width": 192,
            "depth": 9,
            "heads": 3,
            "classes": 10,
            "drop_path": 0.1,
        }
    )
    config.data.update({"name": "cifar10", "batch": 256, "eval_batch": 500, "threads": 8})
    config.train.steps = 50_000 * 200 // 256
    config.optimizer.update({"lr": 1e-3, "weight_decay": 0.05})
    config.loss.label_smoothing = 0.1
    config.rates.update({"steps": 600, "lr": 0.05, "target": 0.6, "weight": 100.0})
    config.checkpoint.every = 2000
    return finish(config, arg)
