"""Kinds of tasks by name: which model, which objective."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from tokred.data.grid_kinds import KINDS
from tokred.models.decoder import Decoder, DecoderConfig
from tokred.models.encoder_decoder import EncoderDecoder
from tokred.models.encoder_decoder_config import EncoderDecoderConfig
from tokred.models.vit import ViT, ViTConfig
from tokred.models.vlm import VLM, VLMConfig
from tokred.plan import Plan, nearest
from tokred.train.losses import ImageObjective, Objective
from tokred.train.mixing import Mixing
from tokred.train.seq2seq import Seq2SeqObjective
from tokred.train.talk import TalkObjective
from tokred.train.text import TextObjective


@dataclass(frozen=True)
class Family:
    """config, model, objective: their classes."""

    config: type
    model: type
    objective: type[Objective]

    def build(self, config: Any, plan: Plan, seed: int) -> Any:
        """A model with fresh weights; under jit only, so that nothing is ever in one piece."""
        return self.model(config, plan=plan, rngs=nnx.Rngs(seed))


FAMILIES: Mapping[str, Family] = {
    "images": Family(ViTConfig, ViT, ImageObjective),
    "text": Family(DecoderConfig, Decoder, TextObjective),
    "seq2seq": Family(EncoderDecoderConfig, EncoderDecoder, Seq2SeqObjective),
    "talk": Family(VLMConfig, VLM, TalkObjective),
}


def find_family(task: str) -> Family:
    """The family of config.task. Raises ValueError with the nearest name."""
    if task not in FAMILIES:
        raise ValueError(
            f"config.task={task!r} must be one of {list(FAMILIES)}{nearest(task, FAMILIES)}"
        )
    return FAMILIES[task]


def objective_fields(config: Any) -> dict[str, Any]:
    """What config.loss and config.data say to the objective of config.task."""
    loss, data = config.loss, config.data
    if config.task == "text":
        return {"padded": not data.packed, "documents": bool(data.packed)}
    if config.task == "seq2seq":
        return {"padded": not data.packed}
    if config.task == "talk":
        return {"kinds": KINDS if data.name == "grid_questions" else ()}
    mixing = Mixing(loss.mixup, loss.cutmix, loss.mix_share, loss.mix_switch)
    return {"label_smoothing": loss.label_smoothing, "mixing": mixing}
