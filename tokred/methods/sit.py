"""Self-slimmed ViT (Zong et al. 2022, arXiv 2111.12624): a perceptron's softmax means of tokens
(TSM), and in training modules that make all tokens again (RTSM), to be like a teacher's (FRD).

Official code: Sense-X/SiT (Apache-2.0). There stages follow LV-ViT's depth, [9, 3, 2, 2] layers of
SiT-S, which is layers=(9, 12, 14) here, each with half of the tokens before it. A reversing module
is made for its number of original tokens, and for no other. FRD is `train.distill.match_layers` of
the aux 'recovered' of all layers with the teacher's tokens there, beside `match_logits`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array

from tokred.methods.registry import register
from tokred.methods.soft_pool import SoftPool, staged
from tokred.methods.topk import stage_counts
from tokred.nn.slimming import ReverseSlimming, ScorePool
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.tokens import Tokens


@dataclass(frozen=True)
class Slim(SoftPool):
    """TSM: `k` softmax means by a perceptron of width D / 2."""

    method: ClassVar[str] = "sit"

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> ScorePool:
        return ScorePool(width, self.k, width // 2, scaled=True, rngs=rngs)

    def module_macs(self, n: int, width: int) -> int:
        return n * (width + self.k) * (width // 2)


@dataclass(frozen=True)
class Recover(Reduction):
    """RTSM: the `k` tokens behind the prefix stay, and aux['recovered'] [*B originals D] is all of
    them again. Gradient: to the tokens and the module. What nobody reads costs nothing, and is not
    counted."""

    k: int
    originals: int

    def counts(self, n: int, prefix: int) -> int:
        return n

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> ReverseSlimming:
        return ReverseSlimming(width, self.k, self.originals, rngs=rngs)

    def __call__(
        self,
        tokens: Tokens,
        evidence: Mapping[str, Array],
        state: Any = None,
        *,
        module: Any = None,
        key: Any = None,
        train: bool = False,
        twin: str = "packed",
    ) -> tuple[Tokens, None, Any, dict[str, Any]]:
        recovered = require_module(self, module)(tokens.x[..., tokens.prefix :, :])
        return tokens, None, state, {"recovered": recovered}


@register(
    "sit",
    family="resample",
    site="before",
    learned=True,
    trains="packed",
    golden=("vit/sit_tsm_rtsm", "vit/sit_frd_loss"),
    paper="SiT 2022",
)
def sit(
    layout: Layout,
    *,
    keep: float = 0.5,
    layers: Sequence[int] | None = None,
    recover: bool = False,
) -> Plan:
    """A perceptron slims the tokens to a few softmax means of them, in stages.

    keep: ratio per stage. layers: where, default at a quarter, half, three quarters of the depth.
    recover: modules behind every layer from the first stage on that make all tokens again, for
    distillation and for pictures at full resolution: aux['recovered'].
    """
    slim = staged("sit", layout, keep, layers, Slim)
    if not recover:
        return slim
    originals, steps, left = layout.patches, [], None
    stages = dict(stage_counts(layout, keep, layers))
    for layer in range(layout.depth):
        left = stages.get(layer, left)
        if left is not None:
            steps.append((Site("after", layer), Recover(left, originals)))
    return Plan((*slim.steps, *steps), name="sit")
