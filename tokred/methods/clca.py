"""CLCA, cross-layer cache aggregation (Rios et al. 2025): what layers knew is kept beside the
sequence and comes back after each reduction, for any method that reduces.

Official code: arkel23/CLCA (MIT). After every layer the mean of the image's tokens, and the last
few tokens, which start as the method's own ("clr"), are written to a cache; behind each reduction,
and behind the last layer but one, all entries are appended to the sequence. As released: once
entries were appended, the last few tokens are entries, no longer the method's own, which the
reduction treats as patches. The released head over the class token's states is `nn.StatesHead` on
`class_states(report)`; the model's own head stands without it. Unlike the code: own tokens start
from a draw, where it copies the class token; the mean leaves out registers and padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.maps import TokenMap
from tokred.methods.registry import make_plan, register
from tokred.nn.cross_layer import OwnTokens
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.report import Report
from tokred.tokens import Tokens, append

MEMO = "clca"


@dataclass(frozen=True)
class AddTokens(Reduction):
    """`count` learned tokens behind the others."""

    count: int
    grows: ClassVar[bool] = True

    def counts(self, n: int, prefix: int) -> int:
        return n + self.count

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> OwnTokens:
        return OwnTokens(self.count, width, rngs=rngs)

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
    ) -> tuple[Tokens, TokenMap, Any, dict[str, Array]]:
        grown, map_ = append(tokens, require_module(self, module)(tokens.batch))
        return grown, map_, state, {}


@dataclass(frozen=True)
class CrossLayer(Reduction):
    """Behind a layer: the cache's entries come back, then new ones are written to it.

    held: entries that the cache has, kept in `Tokens.memo`. recovers: all of them are appended.
    writes: the mean of the tokens behind the prefix, where `mean`, and the `last` tokens. apart:
    how many tokens at the end the mean leaves out. tells: the class token's state is reported as
    aux 'class_state'. All static. Gradient: through the entries.
    """

    held: int
    recovers: bool
    writes: bool
    mean: bool = True
    last: int = 1
    apart: int = 0
    tells: bool = False
    grows: ClassVar[bool] = True

    def counts(self, n: int, prefix: int) -> int:
        return n + self.held * self.recovers

    def idle(self, n: int, prefix: int) -> bool:
        return False

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
    ) -> tuple[Tokens, TokenMap | None, Any, dict[str, Array]]:
        memo, map_ = dict(tokens.memo), None
        entries = [memo.pop(MEMO)] if self.held else []
        if self.recovers and entries:
            tokens, map_ = append(tokens, entries.pop())
        if self.writes:
            entries += self._entries(tokens)
        if entries:
            memo[MEMO] = jnp.concatenate(entries, axis=-2)
        aux = {"class_state": tokens.x[..., 0, :]} if self.tells else {}
        return tokens.replace(memo=memo), map_, state, aux

    def _entries(self, tokens: Tokens) -> list[Float[Array, "*B M D"]]:
        new, image = [], slice(tokens.prefix, tokens.n - self.apart)
        if self.mean:
            x = tokens.x[..., image, :].astype(jnp.float32)
            valid = jnp.ones(x.shape[:-1]) if tokens.valid is None else tokens.valid[..., image]
            total = (x * valid[..., None]).sum(-2, keepdims=True)
            mean = total / jnp.maximum(valid.sum(-1), 1)[..., None, None]
            new.append(mean.astype(tokens.x.dtype))
        if self.last:
            new.append(tokens.x[..., tokens.n - self.last :, :])
        return new


def class_states(report: Report) -> Float[Array, "*B R D"]:
    """The class token's states behind each reduction and behind the last layer: what
    `nn.StatesHead` reads."""
    told = {
        int(site.removeprefix("after_")): aux["class_state"]
        for site, aux in report.aux.items()
        if "class_state" in aux
    }
    return jnp.stack([told[layer] for layer in sorted(told)], axis=-2)


def with_cache(
    plan: Plan,
    layout: Layout,
    *,
    own: int = 1,
    mean: bool = True,
    last: bool = True,
    name: str = "clca",
) -> Plan:
    """A plan with a cache across its layers.

    own: learned tokens, and how many of the last tokens are written. mean: whether the mean is.
    last: whether the entries come back behind the last layer but one, too.

    Raises:
      ValueError: nothing to be written, or a plan that reduces nowhere in the layers.
    """
    reducing = {site.layer for site, _ in plan.steps if site.layer is not None}
    if not own and not mean:
        raise ValueError(f"{name}: own=0 and mean=False write nothing; change one of the two.")
    if not reducing:
        raise ValueError(
            f"{name}: plan {plan.name!r} reduces in no layer, so that nothing would come back; "
            "give it layers."
        )
    recovery = reducing | ({max(layout.depth - 2, 0)} if last else set())
    steps, held, apart = [], 0, own
    for layer in range(layout.depth):
        recovers, writes = layer in recovery, layer < max(recovery)
        apart = held if recovers else apart
        tells = layer in reducing or layer == layout.depth - 1
        step = CrossLayer(held, recovers, writes, mean, own, apart, tells)
        steps.append((Site("after", layer), step))
        held = held * (not recovers) + writes * (mean + own)
    front = ((Site("input"), AddTokens(own)),) if own else ()
    return Plan((*front, *plan.steps, *steps), plan.twin, name)


@register(
    "clca",
    family="prune and merge",
    site="after",
    learned=True,
    trains="packed",
    needs=("class token",),
    paper="CLCA 2025",
    golden=("vit/clca_evit",),
)
def clca(
    layout: Layout,
    *,
    keep: float = 0.7,
    base: str = "evit",
    layers: Sequence[int] | None = None,
    own: int = 1,
    mean: bool = True,
    last: bool = True,
) -> Plan:
    """A cache across layers brings back what a reducing method loses: means and learned tokens.

    keep, layers: of the `base`, any method in stages such as 'evit' or 'topk'; with keep=1 there is
    nothing to bring back, and no cache. Other options: see `with_cache`.
    """
    if keep == 1:
        return Plan(name="clca")
    options = {"keep": keep} if layers is None else {"keep": keep, "layers": layers}
    plan = make_plan(base, layout.alone, **options)
    return with_cache(plan, layout, own=own, mean=mean, last=last)
