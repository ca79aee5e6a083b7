"""What one model under one plan costs, all that can be said without running it."""

from typing import Any

import jax
from flax import nnx

from tokred.cost.activations import activations
from tokred.cost.compiled import compile_cost
from tokred.cost.macs import Composite, layer_costs
from tokred.models.example import example
from tokred.nn.skeleton import split_model
from tokred.plan import Plan
from tokred.report import Call

Row = dict[str, Any]


def cost_report(kind: Any, config: Any, plan: Plan, *, batch: int = 1) -> Row:
    """{'layers', 'macs', 'params', 'activations', 'compiled_macs', 'bytes', 'temp_bytes',
    'compile_s'} of the forward pass of kind(config).

    layers: rows of `layer_costs`. macs, activations (see there) and compiled_macs (half of the
    flops that the compiler counts, elementwise ones included) are of one example. params: numbers
    of the model with what the plan learns. bytes: read and written per batch, as the compiler
    counts; temp_bytes: its peak beside inputs and results.

    Raises:
      ValueError: a plan that the model cannot host.
    """
    model = nnx.eval_shape(lambda: kind(config, plan=plan, rngs=nnx.Rngs(0)))
    skeleton, shapes = split_model(model)
    inputs = example(model, batch)

    def run(params: Any, rest: Any, key: Any, *inputs: Any) -> Any:
        return skeleton.merge(params, rest)(*inputs, plan=plan, call=Call(key=key))[0]

    args = (shapes.params, shapes.rest, jax.random.key(0), *inputs)
    compiled = compile_cost(run, *args)
    tokens = inputs[0].shape[1] if isinstance(config, Composite) else None
    layers = layer_costs(config, plan, tokens=tokens)
    return {
        "layers": [{**row._asdict(), "macs": row.macs} for row in layers],
        "macs": sum(row.macs for row in layers),
        "params": sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
        "activations": activations(run, *args) // batch,
        "compiled_macs": compiled.macs / batch,
        "bytes": compiled.bytes,
        "temp_bytes": compiled.temp_bytes,
        "compile_s": compiled.seconds,
    }
