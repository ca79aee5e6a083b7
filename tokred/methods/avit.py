"""A-ViT (Yin et al. 2022, arXiv 2112.07658): every token halts at a depth of its own, and a token's
result is the mean of its states, weighted by how likely it halts at each layer.

Official code: NVlabs/A-ViT (LICENSE file Apache-2.0, source headers NVIDIA non-commercial). It
learns no weights of its own: channel 0 of the stream is the logit. The released code only masks;
packing into slots is ours. Unlike it: a token that has halted goes on unseen by the others, where
the code sets its state to 0 first, so that the chances it would still have, of which only the loss
on their profile knows, are not the same; and that profile leaves out the class token, as the code
means to (it drops the batch's first image instead).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokred.gates import PonderHalting
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.schedule import linear
from tokred.select import keep_where
from tokred.tokens import Tokens, move

UNSEEN = -1000.0  # bias of keys that have halted
STATE = ("sum", "rest", "ponder")


def depth_target(depth: int, peak: int) -> Float[np.ndarray, " L"]:
    """Where tokens should halt: a normal density over layers around `peak`, with variance 1, such
    that the layers before it have 0.98."""
    layers = np.arange(depth)
    density = np.exp(-0.5 * (layers - peak) ** 2)
    before = density[layers < peak].sum()
    return 0.98 * density / (before if before else density.sum())


def halting_profile(
    chances: Float[Array, "*B N L"], valid: Bool[Array, "*B N"] | None = None
) -> Float[Array, " L"]:
    """The mean chance of halting at each layer, over all valid tokens of the batch."""
    valid = jnp.ones(chances.shape[:-1], bool) if valid is None else valid
    axes = tuple(range(valid.ndim))
    total = jnp.where(valid[..., None], chances, 0.0).sum(axes)
    return total / jnp.maximum(valid.sum(), 1)


def profile_loss(profile: Float[Array, " L"], target: Float[np.ndarray, " L"]) -> Float[Array, ""]:
    """KL divergence of the profile, as shares in [0.01, 0.99], from the target, over the number of
    layers. Gradient: to the profile."""
    shares = jnp.clip(profile / jnp.maximum(profile.sum(), 1e-9), 0.01, 0.99)
    known = np.where(target > 0, target * np.log(np.maximum(target, 1e-300)), 0.0).sum()
    told = (jnp.asarray(target, jnp.float32) * jnp.log(shares)).sum()
    return (known - told) / len(target)


@dataclass(frozen=True)
class AViT(Reduction):
    """After a layer: what its state adds to the result of each token, and who halts.

    A halted token is no key for the others. soft: all keep their slots. packed: those behind the
    prefix leave, into `capacity` slots for the rest; of more active tokens those that have most of
    their result fit last (aux 'overflow' [*B]). Where nothing overflows the twins agree exactly on
    the prefix; what left has no result.
    Behind the last layer the result takes the place of every token's state.

    layer, depth: of which model. gate: when tokens halt. peak: the layer around which the loss on
    the profile wants them to; both losses only in training under 'soft'. Static: all fields.
    Gradient: through the results to channel 0 of all states.
    """

    layer: int
    depth: int
    capacity: int
    gate: PonderHalting
    peak: int = 8
    ponder_weight: float = 5e-4
    profile_weight: float = 1e-3
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def counts(self, n: int, prefix: int) -> int:
        return n if self.gate.last else min(n, prefix + self.capacity)

    def idle(self, n: int, prefix: int) -> bool:
        return False  # the result is not the last state

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
    ) -> tuple[Tokens, Any, Any, dict[str, Any]]:
        extra = dict(tokens.extra)
        held = {name: extra.pop(f"avit_{name}") for name in STATE if f"avit_{name}" in extra}
        weight, held, told = self.gate.update(tokens.x[..., 0], held or None)
        x = tokens.x.astype(jnp.float32)
        result = extra.pop("avit_result", 0.0) + weight[..., None] * x
        if tokens.valid is not None:
            told["active"] &= tokens.valid
        aux = {**told, "share": routing.mean_over(1.0 * told["active"], tokens.valid)}
        if train and twin == "soft":
            past = [extra.pop("avit_chances")] if self.layer else []
            chances = jnp.concatenate([*past, told["chance"][..., None]], axis=-1)
            if self.gate.last:
                aux |= self._losses(tokens, held["ponder"], chances)
            extra["avit_chances"] = chances
        if self.gate.last:
            return self._finish(tokens, result, held, extra), None, state, aux
        extra |= {f"avit_{name}": value for name, value in held.items()}
        extra["avit_result"] = result
        active = self.gate.active(held)
        bias = jnp.zeros(active.shape) if tokens.bias is None else tokens.bias
        tokens = tokens.replace(bias=jnp.where(active, bias, UNSEEN), extra=extra)
        if twin == "soft":
            return tokens, None, state, aux
        return self._pack(tokens, active, held["rest"], state, aux)

    def _pack(
        self, tokens: Tokens, active: Array, rest: Array, state: Any, aux: dict[str, Any]
    ) -> tuple[Tokens, Any, Any, dict[str, Any]]:
        front = jnp.broadcast_to(jnp.arange(tokens.n) < tokens.prefix, active.shape)
        map_, overflow = keep_where(
            active | front,
            self.counts(tokens.n, tokens.prefix),
            scores=jnp.where(front, jnp.inf, rest),
            valid=tokens.valid,
        )
        return move(tokens, map_), map_, state, {**aux, "overflow": overflow}

    def _finish(
        self, tokens: Tokens, result: Array, held: Mapping[str, Array], extra: dict[str, Any]
    ) -> Tokens:
        """Results for states; nobody is unseen any longer."""
        extra.pop("avit_chances", None)
        bias = None if tokens.bias is None else jnp.where(tokens.bias <= UNSEEN, 0.0, tokens.bias)
        extra["avit_ponder"] = held["ponder"]
        return tokens.replace(x=result.astype(tokens.x.dtype), bias=bias, extra=extra)

    def _losses(self, tokens: Tokens, ponder: Array, chances: Array) -> dict[str, Array]:
        prefix = tokens.prefix
        valid = None if tokens.valid is None else tokens.valid[..., prefix:]
        profile = halting_profile(chances[..., prefix:, :], valid)
        apart = profile_loss(profile, depth_target(self.depth, self.peak))
        return {
            "loss_ponder": self.ponder_weight * routing.mean_over(ponder, tokens.valid),
            "loss_profile": self.profile_weight * apart,
            "profile": profile,
        }


@register(
    "avit",
    family="halt",
    site="after",
    learned=True,
    count="data-dependent",
    twins="exact",
    paper="A-ViT 2022",
    golden=("vit/avit",),
)
def avit(
    layout: Layout,
    *,
    keep: float = 0.5,
    scale: float = 10.0,
    centre: float = 30.0,
    eps: float = 0.01,
    peak: int | None = None,
    ponder_weight: float = 5e-4,
    profile_weight: float = 1e-3,
) -> Plan:
    """Each token halts at its own depth, by a channel of its state; packed, it then leaves.

    keep: slots in the last layer, as a share of the patches; they fall linearly. scale, centre,
    eps: of the gate, see `PonderHalting`; the paper's centre is 30 (tiny) or 75 (small). peak: the
    layer around which tokens should halt, default two thirds of the depth. Other options: weights
    of the losses.

    Raises:
      ValueError: eps outside (0, 1).
    """
    if not 0 < eps < 1:
        raise ValueError(f"avit: eps={eps} must lie in (0, 1); change eps.")
    depth, patches = layout.depth, layout.patches
    peak = round(2 * depth / 3) if peak is None else peak
    slots = (*linear(patches, keep, range(depth - 1)), patches)
    steps = [
        (
            Site("after", i),
            AViT(
                i, depth, k, PonderHalting(scale, centre, eps, last=i == depth - 1), peak,
                ponder_weight, profile_weight,
            ),
        )
        for i, k in enumerate(slots)
    ]  # fmt: skip
    return Plan(tuple(steps), name="avit")
