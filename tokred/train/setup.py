"""From a config to what a job runs on: mesh, model without arrays, teacher, and the stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tokred.cost import solve_keep
from tokred.methods import diffrate, get_method, make_plan
from tokred.nn.skeleton import Arrays, Skeleton, Weights, split_model
from tokred.plan import LayerCount, Layout, Plan
from tokred.train.beside import Beside
from tokred.train.checkpoint import Checkpoints
from tokred.train.config import Config, from_json, model_config
from tokred.train.families import Family, find_family, objective_fields
from tokred.train.loop import Stage
from tokred.train.losses import Objective, Teacher
from tokred.train.mesh import RULES, Rules, make_mesh, replicated, with_places
from tokred.train.processes import to_host
from tokred.train.state import State, born_sharded
from tokred.train.varied import Varied, vary_options

WEIGHTS = "^(?!(.*/)?reductions/)"


@dataclass(frozen=True)
class Setup:
    """What a config fixes before any training.

    shapes: of the weights, with shardings. build: makes the model; under jit only, so that nothing
    is ever in one piece. frozen: 'params' and 'rest' of the teacher, {} without one. beside: what
    is part of every plan but the dense one.
    """

    config: Config
    model: Any
    mesh: Mesh
    rules: Rules
    skeleton: Skeleton
    shapes: Weights
    stages: tuple[Stage, ...]
    build: Callable[[], Any]
    beside: Beside
    frozen: dict[str, Arrays] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return self.model.layout

    @property
    def tokens(self) -> int | None:
        """How many tokens an example has, where the model's config does not say."""
        return self.config.data.get("length")

    def plan(self, method: str, **options: Any) -> Plan:
        """The packed plan of a method, with what stands beside it."""
        return self.beside(make_plan(method, self.layout, **options))

    def counts(self, plan: Plan) -> tuple[LayerCount, ...]:
        """Tokens in each layer of the part that the method is made for."""
        part = self.layout.part
        return plan.of(part).counts(self.layout.alone)

    def objective(self, plan: Plan) -> Objective:
        """What the task minimises and measures, under a plan and without a teacher."""
        family = find_family(self.config.task)
        return family.objective(plan, **objective_fields(self.config))

    def init(self) -> Weights:
        """Fresh weights, born in place."""
        places = jax.tree.map(lambda x: x.sharding, self.shapes)
        return born_sharded(lambda: split_model(self.build())[1], places)

    def start(self, stage: int, weights: Weights) -> State:
        """The state of a stage at its step 0, on the mesh; with copies, as steps consume it."""
        places = jax.tree.map(lambda x: x.sharding, self.state_shapes(stage))
        copy = lambda w: self._start(stage, jax.tree.map(jnp.copy, w))  # noqa: E731
        return born_sharded(copy, places, weights)

    def state_shapes(self, stage: int) -> State:
        """Its shapes and shardings."""
        return with_places(
            jax.eval_shape(lambda w: self._start(stage, w), self.shapes), self.mesh, self.rules
        )

    def eval_key(self) -> jax.Array:
        """The key of all draws in evaluation, on all devices."""
        return born_sharded(lambda: seed_key(self.config, -1), replicated(self.mesh))

    def _start(self, stage: int, weights: Weights) -> State:
        return self.stages[stage].init(weights, seed_key(self.config, stage))


def make_setup(config: Config, devices: Sequence[Any] | None = None) -> Setup:
    """The model's shapes on the mesh, and the stages of training; devices: all by default.

    Raises:
      ValueError: fields that do not fit each other or the devices, unknown methods or options.
      FileNotFoundError: config.distill.workdir holds no run.
    """
    model = model_config(config)
    mesh = make_mesh(config.mesh.shape, config.mesh.axes, devices)
    rules = (*((pattern, tuple(axes)) for pattern, axes in config.mesh.rules), *RULES)
    teacher, frozen = read_teacher(config, devices)
    beside = Beside(model, config.beside.to_dict())
    stages = make_stages(config, model, teacher, beside)
    plan = stages[-1].objective.plan

    family: Family = find_family(config.task)

    def build() -> Any:
        return family.build(model, plan, config.seed)

    skeleton, shapes = split_model(nnx.eval_shape(build))
    shapes = with_places(shapes, mesh, rules)
    return Setup(config, model, mesh, rules, skeleton, shapes, stages, build, beside, frozen)


def restore_setup(
    workdir: str | Path, devices: Sequence[Any] | None = None, **mesh: Any
) -> tuple[Setup, Weights]:
    """(setup, weights) of a run, from its checkpoint alone, on all devices.

    mesh: fields of config.mesh; by default the run's own, or where that does not fit the devices
    here, all of them share the batch. Raises FileNotFoundError without a run in `workdir`,
    ValueError for a damaged checkpoint.
    """
    with Checkpoints(workdir, create=False) as checkpoints:
        config = from_json(checkpoints.about()["config"])
        with config.unlocked():
            config.distill.workdir = None
            config.mesh.update(mesh or _mesh_here(config, devices))
        setup = make_setup(config, devices)
        return setup, checkpoints.model(setup.shapes)


def _mesh_here(config: Config, devices: Sequence[Any] | None) -> dict[str, Any]:
    try:
        make_mesh(config.mesh.shape, config.mesh.axes, devices)
    except ValueError:
        return {"shape": (-1,), "axes": ("data",)}
    return {}


def read_teacher(
    config: Config, devices: Sequence[Any] | None
) -> tuple[Teacher | None, dict[str, Arrays]]:
    """The teacher of config.distill with its arrays on the mesh; None and {} without one."""
    how = config.distill
    if how.workdir is None:
        return None, {}
    mesh = {"shape": tuple(config.mesh.shape), "axes": tuple(config.mesh.axes)}
    setup, weights = restore_setup(how.workdir, devices, **mesh)
    teacher = Teacher(setup.skeleton, how.logits, how.features, how.temperature)
    return teacher, weights._asdict()


def make_stages(
    config: Config, model: Any, teacher: Teacher | None, beside: Beside
) -> tuple[Stage, ...]:
    """Training under config.train's method, then, if asked, of the rates alone."""
    train, rates, loss = config.train, config.rates, config.loss
    options = dict(train.options)
    if train.macs is not None:
        options.pop("keep", None)
        counted = {"whole": beside, "tokens": config.data.get("length")}
        _, options["keep"] = solve_keep(model, train.method, train.macs, **counted, **options)
    make = lambda method, how: training_plan(method, model.layout, dict(how), beside)  # noqa: E731
    plan = make(train.method, options)
    shared = {**objective_fields(config), "aux_weight": loss.aux_weight}
    make_objective = find_family(config.task).objective
    optimizer = dict(config.optimizer)
    accumulate, ema = optimizer.pop("accumulate"), optimizer.pop("ema")
    learned = get_method(train.method).learned
    trainable = train.trainable or ("" if learned or beside.methods else WEIGHTS)
    varied = _varied(train, options, make)
    objective = make_objective(plan, **shared, teacher=teacher, remat=train.remat, varied=varied)
    stages = []
    if config.align.steps:
        first = {**optimizer, "lr": config.align.lr}
        part = config.align.trainable
        stages = [Stage("align", objective, config.align.steps, part, first, accumulate, ema)]
    if train.steps:
        stages.append(Stage("train", objective, train.steps, trainable, optimizer, accumulate, ema))
    if rates.steps:
        if learned:
            raise ValueError(
                f"config.train.method={train.method!r} is learned and so is "
                f"config.rates.method={rates.method!r}; set config.rates.steps=0 or train densely."
            )
        plan = make(rates.method, rates.options)
        objective = make_objective(plan, **shared, **_budget(rates))
        alone = make_plan(rates.method, model.layout, **rates.options)
        part, how = modules_of(alone, model.layout.part), {**optimizer, **_steadily(rates)}
        stages.append(Stage("rates", objective, rates.steps, part, how, accumulate))
    if not stages:
        raise ValueError("config.train.steps and config.rates.steps are both 0; raise one of them.")
    return tuple(stages)


def _varied(
    train: Config, known: dict[str, Any], make: Callable[[str, dict[str, Any]], Plan]
) -> Varied | None:
    """The plans that take turns, None where train.vary names no option."""
    if not train.vary:
        return None
    options = [{**known, **more} for more in vary_options(train.vary, train.each)]
    plans = tuple(make(train.method, each).with_twin("packed") for each in options)
    weights = None if train.weights is None else tuple(train.weights)
    return Varied(plans, train.rule, weights, tuple(train.pivots))


def _budget(rates: Config) -> dict[str, Any]:
    """What the objective of rates is told beside its plan."""
    return {"macs_weight": rates.weight} | {k: rates[k] for k in ("target", "unit", "remat")}


def _steadily(rates: Config) -> dict[str, Any]:
    """The optimizer of rates: without a warm-up, as the penalty must be felt from the first step,
    and constant unless `end` says otherwise."""
    falls = {"schedule": "cosine", "end": rates.end}
    course = {"schedule": "constant", "end": 0.0} if rates.end == 1 else falls
    return {"lr": rates.lr, "warmup": 0.0, "weight_decay": 0.0, **course}


def modules_of(plan: Plan, part: str) -> str:
    """A pattern of the parameters of a plan's reductions in the part that it is made for."""
    names = "|".join(reduction.module_name(site) for site, reduction in plan.of(part).steps)
    return f"^{part}{'/' if part else ''}reductions/({names})/"


def training_plan(method: str, layout: Layout, options: dict[str, Any], beside: Beside) -> Plan:
    """The plan to train under: where the method learns, the twin that it trains."""
    plan, about = beside(make_plan(method, layout, **options)), get_method(method)
    return plan.with_twin(about.trains) if about.learned else plan


def learned_plan(setup: Setup, params: Arrays, stage: int = -1) -> Plan | None:
    """The packed plan that a stage gave: rates frozen to integers; None after dense training."""
    plan = setup.stages[stage].objective.plan
    if not plan.steps:
        return None
    if plan.name != "diffrate" or plan.twin != "soft":
        return plan.with_twin("packed")
    logits = to_host({k: v for k, v in params.items() if "reductions/" in k})
    logits = jax.tree.map(jnp.asarray, logits)
    model = setup.skeleton.merge({**setup.shapes.params, **logits}, setup.shapes.rest)
    layout = setup.layout
    part = getattr(model, layout.part) if layout.part else model
    schedule = diffrate.freeze(part.reductions, plan.of(layout.part), layout)
    return setup.plan("diffrate", **schedule)


def seed_key(config: Config, purpose: int) -> jax.Array:
    """A key for one purpose of the run: the number of a stage, or -1 for evaluation."""
    return jax.random.fold_in(jax.random.key(config.seed), purpose + 1)
