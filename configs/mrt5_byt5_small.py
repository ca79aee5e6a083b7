"""MrT5 as published, from ByT5-small's weights: the gate and all weights learn on span corruption.

python train.py --config=configs/mrt5_byt5_small.py --workdir=runs/mrt5_byt5_small \\
  --config.start_from=DIR  # google/byt5-small as config.json and model.safetensors

3000 steps (the released script: 5000) of 1024 sequences, bytes of fifteen languages in equal parts
(TFDS mc4, prepared), in 8 parts; as released, AdamW at a rate that falls linearly from 1e-4. Not
run at full size here.
"""

from tokred.data.languages import MRT5
from tokred.models import encoder_decoder_config
from tokred.train.config import Config, default_config, finish


def get_config(arg: str = "") -> Config:
    config = default_config("seq2seq")
    size = encoder_decoder_config("byt5_small", sink=True)
    for name in ("width", "depth", "decoder_depth", "heads", "head_dim", "hidden", "sink"):
        config.model[name] = getattr(size, name)
    config.model.dtype = "bfloat16"
    config.data.update({"name": "mc4", "languages": MRT5, "length": 1024, "batch": 1024})
    config.data.eval_batch = 64
    config.train.update({"steps": 3000, "method": "mrt5", "options": {"keep": 0.5, "layer": 3}})
    config.optimizer.update({"lr": 1e-4, "schedule": "linear", "warmup": 0.0, "accumulate": 8})
    return finish(config, arg)
