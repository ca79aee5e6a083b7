"""What recipes share: configs of a task with the sizes and schedules of one kind of data."""

from tokred.train.config import Config, default_config


def bytes_config() -> Config:
    """What the recipes on bytes share: a small decoder on the Python standard library's sources."""
    config = default_config("text")
    config.model.update({"vocab": 259, "width": 64, "depth": 8, "heads": 4, "context": 256})
    config.data.update({"name": "stdlib", "length": 256, "batch": 8})
    config.train.steps = 1000
    config.optimizer.update({"lr": 2e-3, "weight_decay": 0.1, "warmup": 0.05, "end": 0.1})
    config.log.every = 50
    return config


def span_config() -> Config:
    """What the recipes on corrupted bytes share: a small encoder-decoder on the same sources."""
    config = default_config("seq2seq")
    config.model.update({"width": 96, "depth": 4, "decoder_depth": 2, "heads": 3, "head_dim": 32})
    config.model.update({"hidden": 256, "context": 128, "target_context": 65, "sink": True})
    config.data.options = {"mean_span": 3.0, "density": 0.3}
    config.data.update({"length": 128, "batch": 24, "eval_batch": 64, "eval_rows": 2048})
    config.train.steps = 3000
    config.optimizer.update({"lr": 2e-3, "weight_decay": 0.1, "warmup": 0.05, "end": 0.1})
    config.optimizer.scales = (("/relative/", 20.0),)
    return config


def continued_config() -> Config:
    """What the recipes that go on from a model of `span_config` share; set start_from.

    15 % of the bytes in spans of twenty, as published: in rows of 128, one span at the end.
    """
    config = span_config()
    config.data.options.update({"mean_span": 20.0, "density": 0.15})
    config.train.steps = 2000
    config.optimizer.update({"lr": 5e-4, "schedule": "linear", "warmup": 0.0, "end": 0.0})
    config.log.every = 25
    return config


def digits_config() -> Config:
    """What the digits recipes share: the model, and dense training of it for 3200 steps."""
    config = default_config()
    config.model.update({"image_size": (16, 16), "patch": (2, 2), "patch_kernel": 6})
    config.model.update({"channels": 1, "classes": 10, "position": "learned_sincos"})
    config.model.update({"width": 64, "depth": 4, "heads": 4, "mlp_ratio": 2.0})
    config.data.update({"name": "digits", "batch": 32, "shift": 1, "placements": 4})
    config.train.steps = 3200
    config.optimizer.update({"lr": 2e-3, "weight_decay": 0.2})
    config.loss.label_smoothing = 0.1
    return config


def imagenet_config(batch: int) -> Config:
    """What the ImageNet recipes share: ViT-S/16, and how DeiT-S is trained on images."""
    config = default_config()
    config.model.update({"width": 384, "depth": 12, "heads": 6, "drop_path": 0.1})
    config.model.dtype = "bfloat16"
    config.data.update({"name": "imagenet2012", "batch": batch, "eval_batch": 1024, "threads": 16})
    config.optimizer.update({"b2": 0.999, "clip": 0.0})
    config.loss.update({"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0})
    return config


def deit_config(batch: int, images: int, epochs: int) -> Config:
    """What the ImageNet recipes from scratch share: DeiT-S's schedule and averages."""
    config = imagenet_config(batch)
    config.train.steps = images * epochs // batch
    config.optimizer.update({"lr": 5e-4 * batch / 512, "end": 0.01, "warmup": 5 / epochs})
    config.optimizer.update({"weight_decay": 0.05, "ema": 0.99996})
    config.checkpoint.every = 5000
    return config


def grid_config() -> Config:
    """What the recipes on questions about grids of digits share: a small model of all three parts,
    trained from scratch."""
    config = default_config("talk")
    vision, decoder = config.model.vision, config.model.decoder
    vision.update({"image_size": (32, 32), "patch": (4, 4), "channels": 1, "class_token": False})
    vision.update({"width": 96, "depth": 4, "heads": 3, "mlp_ratio": 2.0, "pool": "mean"})
    vision.position = "learned_sincos"
    decoder.update({"width": 96, "depth": 3, "heads": 3, "hidden": 192, "context": 96})
    config.model.image_positions = "place"
    config.data.options = {"kinds": ("which", "which", "row", "read")}
    config.data.update({"batch": 48, "eval_batch": 100, "eval_rows": 2000, "length": 26})
    config.train.steps = 3000
    config.optimizer.update({"lr": 2e-3, "weight_decay": 0.1, "warmup": 0.05, "end": 0.05})
    return config


def continued_grid_config() -> Config:
    """What the recipes that go on from a model of `grid_config` share; set start_from."""
    return in_two_stages(grid_config())


def composed_grid_config() -> Config:
    """The same with every patch given back behind the encoder, Matryoshka queries for them in the
    connector, and p-MoD in the decoder."""
    config = continued_grid_config()
    config.beside = {
        "restore": {},
        "mqt": {"length": 16, "start": "local"},
        "decoder/pmod": {"schedule": "interleave"},
    }
    return config


def in_two_stages(config: Config) -> Config:
    """First what is new learns, then the decoder with it; as usual in the field, the vision model
    stays as it is."""
    config.align.steps, config.train.steps = 100, 500
    config.optimizer.lr = 1e-3
    config.train.trainable = "^(projector|decoder|.*reductions)/"
    return config


def nested_config() -> Config:
    """What the recipes of Matryoshka queries on these questions share: the lengths take turns."""
    config = grid_config()
    config.train.method, config.train.vary = "mqt", "length"
    config.train.each = (1, 2, 4, 8, 16, 32, 64)
    config.train.options = {"start": "local"}
    return config
