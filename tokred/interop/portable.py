"""What a model computes under a plan, as plain functions of named arrays: for export."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tokred.cache import KVCache
from tokred.models import VLM, Decoder, EncoderDecoder, ViT
from tokred.nn.skeleton import path_name
from tokred.plan import Plan

DENSE = Plan()
Shapes = dict[str, jax.ShapeDtypeStruct]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Function:
    """call: arrays, in the order of `inputs` -> arrays by name, as `outputs` says. A batch of None
    is one dimension with the name 'batch'."""

    name: str
    call: Callable[..., Arrays]
    inputs: Shapes
    outputs: Shapes

    def example(self, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs: normal, or small integers; caches empty."""
        draw = np.random.default_rng(seed)
        return {name: _draw(draw, spec, name, batch) for name, spec in self.inputs.items()}


def _draw(draw: np.random.Generator, spec: Any, name: str, batch: int) -> np.ndarray:
    shape = tuple(n if isinstance(n, int) else batch for n in spec.shape)
    if name.startswith(CACHE):
        return np.zeros(shape, spec.dtype)
    if jnp.issubdtype(spec.dtype, jnp.floating):
        return draw.normal(size=shape).astype(spec.dtype)
    return draw.integers(3, 100, shape).astype(spec.dtype)


CACHE = "cache/"


def functions_of(
    model: Any,
    plan: Plan = DENSE,
    *,
    batch: int | None = None,
    tokens: int | None = None,
    steps: int = 64,
    suffix: str = "",
) -> list[Function]:
    """The functions of a model under the plan's packed twin, counts baked in.

    ViT: logits (images). Decoder: prefill (ids of `tokens`; causal, as it is decoded) and step (one
    id each, with a cache for `steps` more). EncoderDecoder: encode (ids of `tokens`). VLM: see
    (images -> tokens of each), and logits (ids of `tokens`, images). batch: None for any. suffix:
    of their names, such as the budget.

    Raises:
      TypeError: another model. ValueError: a plan that draws, so that an artifact would need a key.
    """
    size = jax.export.symbolic_shape("batch")[0] if batch is None else batch
    kinds: dict[type, Callable[..., dict[str, tuple[Any, Shapes]]]] = {
        ViT: _vit, Decoder: _decoder, EncoderDecoder: _pairs, VLM: _vlm
    }  # fmt: skip
    make = next((make for kind, make in kinds.items() if isinstance(model, kind)), None)
    if make is None:
        known = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"export: {type(model).__name__} is none of {known}; give its ViT or so.")
    made = make(_unrolled(model), plan.with_twin("packed"), size, tokens, steps)
    return [_function(name + suffix, call, inputs) for name, (call, inputs) in made.items()]


def _unrolled(model: Any) -> Any:
    """The model with its layers one after another; the one that was given stays as it is."""
    if not getattr(model.config, "scan", False):
        return model
    other = nnx.merge(*nnx.split(model))
    other.config = dataclasses.replace(model.config, scan=False)
    return other


def _function(name: str, call: Callable[..., Arrays], inputs: Shapes) -> Function:
    return Function(name, call, inputs, dict(jax.eval_shape(call, *inputs.values())))


def _vit(model: ViT, plan: Plan, batch: Any, tokens: Any, steps: int) -> dict[str, Any]:
    images = _images(model.config, batch)
    return {"logits": (lambda x: {"logits": model(x, plan=plan)[0]}, {"images": images})}


def _pairs(model: Any, plan: Plan, batch: Any, tokens: int | None, steps: int) -> dict[str, Any]:
    ids = jax.ShapeDtypeStruct((batch, tokens or model.config.context), jnp.int32)

    def encode(ids: Array) -> Arrays:
        memory, _ = model.encode(ids, plan=plan)
        valid = jnp.ones(memory.x.shape[:2], bool) if memory.valid is None else memory.valid
        told = {"memory": memory.x, "valid": valid, "position": memory.position[..., 0]}
        bias = memory.key_bias()
        return told if bias is None else told | {"bias": bias}

    return {"encode": (encode, {"ids": ids})}


def _vlm(model: VLM, plan: Plan, batch: Any, tokens: int | None, steps: int) -> dict[str, Any]:
    config = model.config
    views = jax.ShapeDtypeStruct(
        (batch, config.images, *_images(config.vision, batch).shape[1:]), jnp.float32
    )
    ids = jax.ShapeDtypeStruct((batch, tokens or config.decoder.context // 2), jnp.int32)
    see = lambda x: {"tokens": model.see(x, plan=plan)[0].x}  # noqa: E731
    answer = lambda ids, x: {"logits": model(ids, x, plan=plan)[0]}  # noqa: E731
    return {"see": (see, {"images": views}), "logits": (answer, {"ids": ids, "images": views})}


def _decoder(model: Decoder, plan: Plan, batch: Any, tokens: int | None, steps: int) -> Any:
    """The cache travels as arrays 'cache/NAME'; it knows how many tokens it has seen."""
    n = tokens or model.config.context // 2
    ids = jax.ShapeDtypeStruct((batch, n), jnp.int32)
    causal = plan.with_twin("causal")
    empty = lambda ids: model.make_cache(ids.shape[0], n + steps, plan=plan, prompt=n)  # noqa: E731
    shapes = jax.eval_shape(empty, ids)
    tree = jax.tree.structure(shapes)

    def prefill(ids: Array) -> Arrays:
        return extend(ids, empty(ids), jnp.full(ids.shape, -1, jnp.int32), fresh=True)

    def step(ids: Array, *leaves: Array) -> Arrays:
        cache = jax.tree.unflatten(tree, leaves)
        return extend(ids, cache, cache.seen[:, None].astype(jnp.int32) - n)

    def extend(ids: Array, cache: KVCache, generated: Array, fresh: bool = False) -> Arrays:
        logits, cache, _ = model.extend(
            ids, cache, plan=causal, extra={"generated": generated}, fresh=fresh
        )
        return {"logits": logits, **_named(cache)}

    cached = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in _named(shapes).items()}
    one = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    return {"prefill": (prefill, {"ids": ids}), "step": (step, {"ids": one, **cached})}


def _named(cache: Any) -> Arrays:
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {CACHE + path_name(path): leaf for path, leaf in leaves}


def _images(config: Any, batch: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *config.image_size, config.channels), jnp.float32)


def describe(function: Function) -> Mapping[str, Any]:
    """Names, shapes and types of inputs and outputs, as JSON."""
    return {"inputs": _told(function.inputs), "outputs": _told(function.outputs)}


def _told(specs: Shapes) -> dict[str, Any]:
    size = lambda n: n if isinstance(n, int) else str(n)  # noqa: E731
    return {n: {"shape": [*map(size, s.shape)], "dtype": str(s.dtype)} for n, s in specs.items()}
