"""The tiny models, batches and cached runs that all checks share."""

import dataclasses
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

from tests.methods_table import Options, Row
from tokred import cost
from tokred.evidence import Seen, provide
from tokred.methods import make_plan
from tokred.models import ViT, ViTConfig
from tokred.plan import Layout, Plan, Reduction
from tokred.report import Call, Report
from tokred.tokens import Tokens, make_tokens
from tokred.train.state import path_name

BATCH = 8
TINY: dict[str, Any] = {"patch": (4, 4), "width": 16, "depth": 4, "heads": 2, "classes": 5}
ODD = ViTConfig(image_size=(12, 20), **TINY)
EVEN = ViTConfig(image_size=(16, 16), registers=2, **TINY)
DENSE = Plan()
KEY = jax.random.key(7)


def plan_of(row: Row, config: ViTConfig, options: Options) -> Plan:
    return make_plan(row.method, config.layout, **options)


def easy(row: Row) -> Plan:
    return plan_of(row, ODD, row.easy)


def training(row: Row) -> Plan:
    """The plan that a train step runs: the soft twin of what learns."""
    return easy(row).with_twin("soft" if row.learned else "packed")


@functools.cache
def split_model(config: ViTConfig, learned: Plan) -> tuple[Any, Any]:
    """(graph, state) of a model whose parameters depend on their paths alone."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: ViT(config, plan=learned, rngs=nnx.Rngs(0))))
    return graph, jax.tree_util.tree_map_with_path(_draw, shapes)


def _draw(path: Any, leaf: Any) -> Array:
    name = path_name(path)
    if rate := re.fullmatch(r"reductions/mid_(\d+)/(prune|merge)", name):
        # Each rate keeps less than the one before: an idle one learns nothing.
        slope = 4.0 * int(rate[1]) + 2.0 * (rate[2] == "merge") - 9.0
        return slope * jnp.linspace(0.0, 1.0, *leaf.shape, dtype=leaf.dtype)
    spread = math.prod(leaf.shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.1
    draws = np.random.default_rng(zlib.crc32(name.encode())).normal(0, spread, leaf.shape)
    return jnp.asarray(draws + name.endswith("scale"), leaf.dtype)


def model_of(config: ViTConfig, plan: Plan) -> tuple[Any, Any]:
    learns = any(type(r).build is not Reduction.build for _, r in plan.steps)
    return split_model(config, plan.with_twin("packed") if learns else DENSE)


class Run:
    """A compiled forward pass under a plan; `traces` counts compilations."""

    def __init__(self, config: ViTConfig, plan: Plan):
        self.graph, self.state = model_of(config, plan)
        self.plan, self.traces = plan, 0
        self._jitted = jax.jit(self.forward)

    def forward(self, state: Any, images: Array, valid: Array | None) -> tuple[Array, Report]:
        self.traces += 1
        model = nnx.merge(self.graph, state)
        return model(images, plan=self.plan, call=Call(key=KEY), valid=valid)

    def __call__(self, images: Array, valid: Array | None = None) -> tuple[Array, Report]:
        return self._jitted(self.state, images, valid)


@functools.cache
def run_of(config: ViTConfig, plan: Plan) -> Run:
    return Run(config, plan)


@functools.cache
def images_of(config: ViTConfig, seed: int = 0) -> Array:
    shape = (BATCH, *config.image_size, config.channels)
    return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def valid_of(config: ViTConfig) -> Array:
    """Patches of which the last 0..7 of an example are padding."""
    patches = config.grid[0] * config.grid[1]
    return jnp.arange(patches)[None] < patches - jnp.arange(BATCH)[:, None]


@functools.cache
def easy_report(row_plan: Plan) -> tuple[Array, Report]:
    return run_of(ODD, row_plan)(images_of(ODD))


def loss_of(graph: Any, plan: Plan) -> Callable[[Any, Array, Array], Array]:
    """A training loss (state, images, key): a fixed direction of logits, auxiliary losses, and the
    expected cost, which alone reaches a rate whose count is not the smallest so far."""

    def loss(state: Any, images: Array, key: Array) -> Array:
        model = nnx.merge(graph, state)
        logits, report = model(images, plan=plan, call=Call(key=key, train=True))
        fit = (jax.nn.log_softmax(logits)[:, 0]).mean()
        spent = cost.expected_macs(model.config, plan, report) / cost.macs(model.config)
        return sum(report.losses.values(), spent - fit)

    return loss


def layout_of(grid: tuple[int, int], prefix: int = 1) -> Layout:
    return dataclasses.replace(
        EVEN.layout, grid=grid, prefix=prefix, tokens=prefix + grid[0] * grid[1]
    )


def first_reduction(row: Row, layout: Layout) -> Reduction:
    """The reduction at a plan's first site, sized for its tokens."""
    if row.padding is not None:
        return row.padding(layout)
    keep = 8 / (layout.tokens - layout.prefix)
    return make_plan(row.method, layout, keep=keep).steps[0][1]


@functools.cache
def router(reduction: Reduction) -> Any:
    return reduction.build(16, 2, nnx.Rngs(0))


def tokens_of(n: int, prefix: int, padded: int = 0) -> Tokens:
    """`n` random tokens and `padded` rows of NaN behind, which leave garbage in later layers."""
    x = jax.random.normal(jax.random.key(1), (2, n, 16))
    tail = jnp.full((2, padded, 16), jnp.nan)
    valid = jnp.concatenate([jnp.ones((2, n), bool), jnp.zeros((2, padded), bool)], 1)
    if not padded:
        return make_tokens(x, prefix=prefix)
    tokens = make_tokens(jnp.concatenate([x, tail], 1), valid=valid, prefix=prefix)
    garbage = 9 * jax.random.normal(jax.random.key(2), tokens.x.shape)
    return tokens.replace(x=jnp.where(valid[..., None], tokens.x, garbage))


def reduce_tokens(reduction: Reduction, tokens: Tokens) -> tuple[Tokens, Any]:
    """(tokens, map) of one reduction with evidence from fixed projections."""
    kernels = jax.random.normal(jax.random.key(4), (3, 16, 2, 8)) / 4
    q, k, v = jnp.einsum("bnd,cdhe->cbnhe", tokens.x, kernels)
    evidence = {a.name: provide(a, Seen(q, k, v, tokens.x, tokens)) for a in reduction.asks}
    module = router(reduction)
    out, map_, _, _ = reduction(tokens, evidence, reduction.init(), module=module, key=KEY)
    return out, map_
