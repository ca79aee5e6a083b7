"""No reduction."""

from tokred.methods.registry import register
from tokred.plan import Layout, Plan


@register("dense", family="baseline", site="none")
def dense(layout: Layout, *, keep: float = 1.0) -> Plan:
    """All tokens in all layers.

    Raises:
      ValueError: keep is not 1: there is nothing to keep less of.
    """
    if keep != 1.0:
        raise ValueError(f"method 'dense': keep={keep} must be 1; choose another method to reduce.")
    return Plan()
