"""PatchMerger (Renggli et al. 2022, arXiv 2202.12015): learned queries without projections take
softmax means of normalised tokens.

No official code; after lucidrains/vit-pytorch (MIT) and its port JoakimHaurum/TokenReduction (MIT),
which puts one before each of three layers, where the paper has one in the middle of the network:
layers=(depth // 2,). What comes out is normalised and has no residual. scaled: logits over sqrt(D),
which neither uses by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from tokred.methods.registry import register
from tokred.methods.soft_pool import SoftPool, staged
from tokred.nn.slimming import QueryPool
from tokred.plan import Layout, Plan


@dataclass(frozen=True)
class PatchMerger(SoftPool):
    """`k` learned queries."""

    method: ClassVar[str] = "patchmerger"
    scaled: bool = False

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> QueryPool:
        return QueryPool(width, self.k, scaled=self.scaled, rngs=rngs)

    def module_macs(self, n: int, width: int) -> int:
        return n * self.k * width


@register(
    "patchmerger",
    family="resample",
    site="before",
    learned=True,
    trains="packed",
    golden=("vit/patchmerger",),
    paper="PatchMerger 2022",
)
def patchmerger(
    layout: Layout,
    *,
    keep: float = 0.7,
    layers: Sequence[int] | None = None,
    scaled: bool = False,
) -> Plan:
    """Learned queries take softmax means of the normalised tokens, in stages.

    keep: ratio per stage. layers: where, default at a quarter, half, three quarters of the depth.
    """
    return staged("patchmerger", layout, keep, layers, lambda k: PatchMerger(k, scaled))
