"""Sinkhorn tokenizer (Haurum et al. 2022, MSH-ViT): balanced soft clusters around learned centres
on the sphere.

Official code: JoakimHaurum/TokenReduction (MIT), which writes both marginals as 1 / (K + N) and
then multiplies by K + N: the same as totals of 1 for every cluster and every token, in turns, the
tokens last. It puts the centres back on the sphere in place at every call; here they are normalised
in the forward pass, and their lengths pass no gradient. What comes out are sums, not means, of
tokens of length 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from tokred.methods.registry import register
from tokred.methods.soft_pool import SoftPool, staged
from tokred.nn.slimming import SpherePool
from tokred.plan import Layout, Plan


@dataclass(frozen=True)
class Sinkhorn(SoftPool):
    """`k` centres. eps: temperature of the cosine similarities."""

    method: ClassVar[str] = "sinkhorn"
    over: ClassVar[str] = "both"
    eps: float = 1.0
    iterations: int = 3

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"sinkhorn: eps={self.eps} must be above 0; raise eps.")
        if self.iterations < 1:
            raise ValueError(
                f"sinkhorn: iterations={self.iterations} must be at least 1; raise iterations."
            )

    @property
    def rounds(self) -> int:
        return self.iterations

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> SpherePool:
        return SpherePool(width, self.k, eps=self.eps, rngs=rngs)

    def module_macs(self, n: int, width: int) -> int:
        return n * self.k * width


@register(
    "sinkhorn",
    family="resample",
    site="before",
    learned=True,
    trains="packed",
    golden=("vit/sinkhorn",),
    paper="MSH-ViT 2022",
)
def sinkhorn(
    layout: Layout,
    *,
    keep: float = 0.7,
    layers: Sequence[int] | None = None,
    eps: float = 1.0,
    iterations: int = 3,
) -> Plan:
    """Every token is shared out among learned centres on the sphere, all alike full, in stages.

    keep: ratio per stage. layers: where, default at a quarter, half, three quarters of the depth.
    eps, iterations: of Sinkhorn's algorithm.
    """
    make = lambda k: Sinkhorn(k, eps, iterations)  # noqa: E731
    return staged("sinkhorn", layout, keep, layers, make)
