"""From a config to what a job runs on: the model's skeleton, its arrays, and the stages."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from tokred.methods import diffrate, get_method, make_plan
from tokred.models.vit import ViT, ViTConfig
from tokred.plan import Layout, Plan
from tokred.train.config import Config, model_config
from tokred.train.loop import Stage
from tokred.train.losses import Objective
from tokred.train.state import Arrays, Skeleton, split_model

WEIGHTS = "^(?!reductions/)"
REDUCTIONS = "^reductions/"


@dataclass(frozen=True)
class Setup:
    """What a config fixes before any training; plans by the name of the stage."""

    config: Config
    model: ViTConfig
    skeleton: Skeleton
    params: Arrays
    rest: Arrays
    stages: tuple[Stage, ...]

    @property
    def layout(self) -> Layout:
        return self.model.layout


def make_setup(config: Config) -> Setup:
    """The model with fresh weights, and the stages of training.

    Raises:
      ValueError: fields that do not fit each other, or unknown methods and options.
    """
    model = model_config(config)
    stages = make_stages(config, model.layout)
    plan = stages[-1].objective.plan
    built = ViT(model, plan=plan, rngs=nnx.Rngs(config.seed))
    skeleton, params, rest = split_model(built)
    return Setup(config, model, skeleton, params, rest, stages)


def make_stages(config: Config, layout: Layout) -> tuple[Stage, ...]:
    """Training under config.train's method, then, if asked, of the rates alone."""
    train, rates = config.train, config.rates
    plan = soft_plan(train.method, layout, dict(train.options))
    loss = {"label_smoothing": config.loss.label_smoothing, "aux_weight": config.loss.aux_weight}
    optimizer = dict(config.optimizer)
    learned = plan.twin == "soft"
    everything = "" if learned else WEIGHTS
    stages = [Stage("train", Objective(plan, **loss), train.steps, everything, optimizer)]
    if rates.steps:
        if learned:
            raise ValueError(
                f"config.train.method={train.method!r} is learned and so is "
                f"config.rates.method={rates.method!r}; set config.rates.steps=0 or train densely."
            )
        objective = Objective(
            soft_plan(rates.method, layout, dict(rates.options)),
            **loss,
            macs_weight=rates.weight,
            target=rates.target,
            unit=rates.unit,
        )
        # The penalty must be felt from the first step to the last: no decay, no warm-up.
        how = {**optimizer, "lr": rates.lr, "schedule": "constant", "warmup": 0.0}
        how["weight_decay"] = 0.0
        stages.append(Stage("rates", objective, rates.steps, REDUCTIONS, how))
    return tuple(stages)


def soft_plan(method: str, layout: Layout, options: dict[str, Any]) -> Plan:
    """The plan to train under: the soft twin where the method has one."""
    plan = make_plan(method, layout, **options)
    return plan.with_twin("soft") if get_method(method).learned else plan


def learned_plan(setup: Setup, params: Arrays) -> Plan | None:
    """The packed plan that training gave: rates frozen to integers; None after dense training."""
    plan = setup.stages[-1].objective.plan
    if not plan.steps:
        return None
    if plan.name != "diffrate" or plan.twin != "soft":
        return plan.with_twin("packed")
    model = setup.skeleton.merge(params, setup.rest)
    schedule = diffrate.freeze(model.reductions, plan, setup.layout)
    return make_plan("diffrate", setup.layout, **schedule)


def seed_key(config: Config, purpose: int) -> jax.Array:
    """A key for one purpose of the run: the number of a stage, or -1 for evaluation."""
    return jax.random.fold_in(jax.random.key(config.seed), purpose + 1)
