"""Plans, parameters and cached runs that all checks share."""

import functools
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tests.conformance.models import BATCH, MODELS, Config, Result, kind_of
from tests.methods_table import Extra, Options, Row
from tokred import cost
from tokred.methods import make_plan
from tokred.models import ViTConfig
from tokred.nn.skeleton import path_name
from tokred.plan import AROUND, Plan, Reduction
from tokred.report import Call

DENSE = Plan()
KEY = jax.random.key(7)


def odd(row: Row) -> Any:
    return MODELS[row.model].odd


def even(row: Row) -> Any:
    return MODELS[row.model].even


def plan_of(row: Row, config: Config, options: Options) -> Plan:
    return make_plan(row.method, config.layout, **options)


def easy(row: Row) -> Plan:
    return plan_of(row, odd(row), row.easy)


def training(row: Row) -> Plan:
    """The plan that a train step runs."""
    return easy(row).with_twin(row.trains if row.learned else "packed")


def decoding(row: Row) -> Plan:
    """The plan of decoding with a cache; run it under its causal twin."""
    return plan_of(row, odd(row), row.easy if row.decode is None else row.decode)


def routes(plan: Plan) -> bool:
    """Whether tokens only skip layers: then all are there at the end."""
    return bool(plan.steps) and all(site.kind in AROUND for site, _ in plan.steps)


@functools.cache
def split_model(config: Config, learned: Plan) -> tuple[Any, Any]:
    """(graph, state) of a model whose parameters depend on their paths alone."""
    make = kind_of(config).make
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(config, learned, nnx.Rngs(0))))
    return graph, jax.tree_util.tree_map_with_path(_draw, shapes)


def _draw(path: Any, leaf: Any) -> Array:
    name = path_name(path)
    if rate := re.fullmatch(r"reductions/mid_(\d+)/(prune|merge)", name):
        # Each rate keeps less than the one before: an idle one learns nothing.
        slope = 4.0 * int(rate[1]) + 2.0 * (rate[2] == "merge") - 9.0
        return slope * jnp.linspace(0.0, 1.0, *leaf.shape, dtype=leaf.dtype)
    spread = math.prod(leaf.shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.1
    spread = 1.0 if name == "embed/embedding" else spread
    draws = np.random.default_rng(zlib.crc32(name.encode())).normal(0, spread, leaf.shape)
    return jnp.asarray(draws + name.endswith("scale"), leaf.dtype)


def model_of(config: Config, plan: Plan) -> tuple[Any, Any]:
    learns = any(type(r).build is not Reduction.build for _, r in plan.steps)
    return split_model(config, plan.with_twin("packed") if learns else DENSE)


class Run:
    """A compiled forward pass under a plan; `traces` counts compilations."""

    def __init__(self, config: Config, plan: Plan, extra: Extra | None):
        self.graph, self.state = model_of(config, plan)
        self.kind, self.plan, self.extra = kind_of(config), plan, extra
        self.traces = 0
        self._jitted = jax.jit(self.forward)

    def forward(self, state: Any, inputs: Array, valid: Array | None) -> Result:
        self.traces += 1
        model = nnx.merge(self.graph, state)
        return self.kind.run(model, inputs, valid, self.plan, Call(key=KEY), self.extra, None)

    def __call__(self, inputs: Array, valid: Array | None = None) -> Result:
        return self._jitted(self.state, inputs, valid)


@functools.cache
def _run(config: Config, plan: Plan, extra: Extra | None) -> Run:
    return Run(config, plan, extra)


def run_of(row: Row, config: Config, plan: Plan) -> Run:
    return _run(config, plan, row.extra)


@functools.cache
def inputs_of(config: Config, seed: int = 0) -> Array:
    return kind_of(config).inputs(config, seed)


@functools.cache
def valid_of(config: Config) -> Array:
    """Tokens (behind the prefix) of which the last 0..7 of an example are padding."""
    n = config.layout.tokens - config.layout.prefix
    return jnp.arange(n)[None] < n - jnp.arange(BATCH)[:, None]


@functools.cache
def _report(config: Config, plan: Plan, extra: Extra | None) -> Result:
    return _run(config, plan, extra)(inputs_of(config))


def report_of(row: Row, plan: Plan) -> Result:
    """(logits, report) of the 'odd' model."""
    return _report(odd(row), plan, row.extra)


def loss_of(graph: Any, row: Row, plan: Plan, remat: int = 0) -> Callable[..., Any]:
    """A training loss (state, inputs, key, nudge): a fixed direction of logits, auxiliary losses,
    and the expected cost, which alone reaches a rate whose count is not the smallest so far."""

    def loss(state: Any, inputs: Array, key: Array, nudge: Array | None = None) -> Any:
        model = nnx.merge(graph, state)
        call = Call(states=plan.init(), key=key, train=True, remat=remat)
        run = kind_of(model.config).run
        logits, report = run(model, inputs, None, plan, call, row.extra, nudge)
        fit = (jax.nn.log_softmax(logits)[..., 0]).mean()
        return sum(report.losses.values(), _spent(model.config, plan, report) - fit)

    return loss


def _spent(config: Config, plan: Plan, report: Any) -> Any:
    if not isinstance(config, ViTConfig):
        return 0.0
    return cost.expected_macs(config, plan, report) / cost.macs(config)
