"""What stands beside a job's method in every plan: reductions of other parts of the model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokred.methods import make_plan
from tokred.plan import Layout, Plan

DECODER = "decoder"


@dataclass(frozen=True)
class Beside:
    """Methods by name with their options; 'decoder/NAME' acts in the decoder of a model that has
    one behind something else, and is made for what all others leave it.

    model: the model's config.
    """

    model: Any
    methods: Mapping[str, Mapping[str, Any]]

    def __call__(self, plan: Plan) -> Plan:
        """The plan, under its own name, with all of them. Raises ValueError for unknown methods,
        options and parts."""
        whole = plan
        in_order = sorted(self.methods.items(), key=lambda item: "/" in item[0])
        for name, options in in_order:
            part, _, method = name.rpartition("/")
            whole += make_plan(method, self._layout_of(name, part, whole), **options)
        return dataclasses.replace(whole, name=plan.name if plan.steps else whole.name)

    def _layout_of(self, name: str, part: str, before: Plan) -> Layout:
        if not part:
            return self.model.layout
        if part != DECODER or not hasattr(self.model, "decoder_layout"):
            raise ValueError(
                f"config.beside: {name!r} names the part {part!r}, which "
                f"{type(self.model).__name__} lacks; use the method's name, or '{DECODER}/NAME' "
                "where there is a decoder behind."
            )
        return self.model.decoder_layout(plan=before)
