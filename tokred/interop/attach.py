"""Plans for models that exist, and what fits them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from tokred.methods import get_method, list_methods, make_plan
from tokred.models import VLM, Decoder
from tokred.models.example import example
from tokred.nn.skeleton import Skeleton, Weights, split_model
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.report import Call


def find_plan(
    model: Any,
    reduction: Plan | Reduction | str,
    layers: Sequence[int] | None,
    site: str,
    options: Mapping[str, Any],
) -> tuple[Plan, dict[str, Any]]:
    """The plan, and the options that a named method was given; see `attach`."""
    layout = model.config.layout
    if isinstance(reduction, str):
        where = {} if layers is None else {"layers": tuple(layers)}
        given = {**options, **where}
        plan = make_plan(reduction, layout, **given)
    else:
        given, plan = {}, _made_by_hand(reduction, layers, site, layout, options)
    _require_cache(model, plan)
    return plan, given


def _made_by_hand(
    reduction: Plan | Reduction,
    layers: Sequence[int] | None,
    site: str,
    layout: Layout,
    options: Mapping[str, Any],
) -> Plan:
    if options:
        raise ValueError(
            f"attach: options {sorted(options)} belong to a method's name, got a "
            f"{type(reduction).__name__}; set them there."
        )
    if isinstance(reduction, Plan):
        plan = reduction
    elif layers is None:
        raise ValueError("attach: a Reduction needs layers=, where it acts; name them.")
    else:
        steps = tuple((Site(site, layer), reduction) for layer in layers)
        plan = Plan(steps, name=type(reduction).__name__).within(layout.part)
    plan.counts(layout)
    return plan


def _require_cache(model: Any, plan: Plan) -> None:
    caching = isinstance(model, (Decoder, VLM))
    if not caching and any(site.kind == "cache" for site, _ in plan.steps):
        raise ValueError(
            f"plan {plan.name!r} reduces a key-value cache, which a {type(model).__name__} does "
            "not have; choose a method for tokens."
        )


def attached(model: Any, plan: Plan, seed: int) -> Any:
    """The model with the modules that the plan learns; its own arrays are shared, not copied."""
    skeleton, shapes = _outline(model, plan)
    own = split_model(model)[1]
    missing = [name for name in shapes.params if name not in own.params]
    new = {}
    if missing:  # what is not asked for is never computed

        def draw(key: Array) -> dict[str, Array]:
            params = split_model(_made(model, plan, key))[1].params
            return {name: params[name] for name in missing}

        new = jax.jit(draw)(jax.random.key(seed))
    params = {n: new[n] if n in new else own.params[n] for n in shapes.params}
    return skeleton.merge(params, own.rest)


def _made(model: Any, plan: Plan, key: Array) -> Any:
    return type(model)(model.config, plan=plan, rngs=nnx.Rngs(key))


def _outline(model: Any, plan: Plan) -> tuple[Skeleton, Weights]:
    """The model under the plan without arrays. Raises ValueError where the plan does more than to
    add modules of its own."""
    skeleton, shapes = split_model(nnx.eval_shape(lambda: _made(model, plan, jax.random.key(0))))
    changed = shapes.params.keys() ^ split_model(model)[1].params.keys()
    foreign = sorted(name for name in changed if "reductions/" not in name)
    if foreign:
        raise ValueError(
            f"plan {plan.name!r} changes the model's own parameters, such as {foreign[0]!r}; build "
            "a new model with plan= and train it."
        )
    return skeleton, shapes


def what_fits(
    model: Any,
    methods: Sequence[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """These methods, or all: {'method', 'fits', 'learned', 'why'}, why it does not. Each is built
    and traced, nothing is computed. options: of methods by name, beside their defaults."""
    names = methods or [m.name for m in list_methods()]
    return [_fit(model, name, (options or {}).get(name, {})) for name in names]


def _fit(model: Any, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    row = {"method": name, "fits": True, "learned": get_method(name).learned, "why": ""}
    try:
        plan, _ = find_plan(model, name, None, "mid", options)
        skeleton, shapes = _outline(model, plan)
        inputs = example(model)

        def run(params: Any, rest: Any, key: Any) -> Any:
            call = Call(key=key)
            return skeleton.merge(params, rest)(*inputs, plan=plan, call=call)[0]

        jax.eval_shape(run, shapes.params, shapes.rest, jax.random.key(0))
    except (ValueError, TypeError) as error:
        row |= {"fits": False, "why": str(error).split("\n")[0]}
    return row
