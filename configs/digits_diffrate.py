"""Real digits among clutter: a small ViT, DiffRate's learned rates, and every baseline beside it.

python train.py --config=configs/digits_diffrate.py --workdir=runs/digits_diffrate
"""

from tokred.train.config import Config, default_config, finish


def get_config(arg: str = "") -> Config:
    config = default_config()
    config.model.update(
        {
            "image_size": (16, 16),
            "patch": (2, 2),
            "patch_kernel": 6,
            "channels": 1,
            "width": 64,
            "depth": 4,
            "heads": 4,
            "mlp_ratio": 2.0,
            "classes": 10,
            "position": "learned_sincos",
        }
    )
    config.data.update({"name": "digits", "batch": 32, "shift": 1, "placements": 4})
    config.train.steps = 3200
    config.optimizer.update({"lr": 2e-3, "weight_decay": 0.2})
    config.loss.label_smoothing = 0.1
    config.rates.update({"steps": 200, "lr": 0.1, "target": 0.53, "weight": 100.0})
    return finish(config, arg)
