"""What stands beside a job's method in every plan: reductions of other parts of the model."""

from collections.abc import Mapping
from typing import Any

from tokred.methods import make_plan
from tokred.plan import Layout, Plan

DECODER = "decoder"


def plan_beside(model: Any, beside: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan of all methods, by name with their options; 'decoder/NAME' acts in the decoder of a
    model that has one behind something else.

    model: the model's config. Raises ValueError for unknown methods, options and parts.
    """
    plan = Plan()
    for name, options in beside.items():
        part, _, method = name.rpartition("/")
        plan += make_plan(method, _layout_of(model, name, part, plan), **options)
    return plan


def _layout_of(model: Any, name: str, part: str, before: Plan) -> Layout:
    if not part:
        return model.layout
    if part != DECODER or not hasattr(model, "decoder_layout"):
        raise ValueError(
            f"config.beside: {name!r} names the part {part!r}, which {type(model).__name__} lacks; "
            f"use the method's name, or '{DECODER}/NAME' where there is a decoder behind."
        )
    return model.decoder_layout(plan=before)
