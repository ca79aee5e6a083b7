"""KARL's halting (Duggal et al. 2025, arXiv 2507.07995; ShivamDuggal4/karl, no licence file): an
encoder says in one pass which of its latent tokens it does not need.

A ViT's last `latents` tokens stand for the latent tokens of the paper's tokenizer (all behind the
prefix by default); the layers after the site stand for its decoder, or at 'output' whatever reads
the tokens. Unlike the released code: at least one latent token stays; tokens may leave in static
slots; the threshold 0.75, which the code fixes in a call, is an option; its random re-binning,
which no call reaches, and its quantiser are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokred.gates import Halting
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.routers import ErrorEmbedding, HaltingHead
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.select import keep_where
from tokred.tokens import Tokens, move

ERRORS = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.24,
    0.28, 0.32, 0.38,
)  # fmt: skip


def bin_up(error: Float[Array, "*B"], levels: Float[Array, " L"]) -> Int[Array, "*B"]:
    """The index of the lowest level that is not below the error, the last one if all are."""
    levels = levels.reshape((1,) * error.ndim + (-1,))
    return jnp.minimum((levels < error[..., None]).sum(-1), levels.shape[-1] - 1)


def blocked_pairs(halted: Bool[Array, "*B N"]) -> Bool[Array, "*B N N"]:
    """Which pairs a decoder's attention leaves out: those with a halted side, but not a token and
    itself."""
    pair = halted[..., :, None] | halted[..., None, :]
    own = jnp.eye(halted.shape[-1], dtype=bool).reshape((1,) * (halted.ndim - 1) + pair.shape[-2:])
    return pair & ~own


def active_labels(count: Int[Array, "*B"], latents: int) -> Bool[Array, "*B T"]:
    """What phase two trains on: the first `count` latent tokens stay, the others halt."""
    return jnp.arange(latents).reshape((1,) * count.ndim + (-1,)) < count[..., None]


def halting_loss(
    logits: Float[Array, "*B T"], active: Bool[Array, "*B T"], valid: Any = None
) -> Float[Array, ""]:
    """Cross entropy of halting, the mean over those that should stay plus the mean over those that
    should halt. Gradient: to logits."""
    valid = jnp.ones(active.shape, bool) if valid is None else valid
    target = 1.0 - active.astype(jnp.float32)
    nats = optax.sigmoid_binary_cross_entropy(logits, target)
    return routing.mean_over(nats, active & valid) + routing.mean_over(nats, ~active & valid)


@dataclass(frozen=True)
class Karl(Reduction):
    """Of the last `latents` tokens those with sigmoid(head(x)) above the threshold halt: for what
    follows they are gone. Other tokens never halt.

    capacity: slots for latent tokens that stay; where more do, those with the lowest chance of
    halting find one, and the others are counted as aux 'overflow'. packed: they are gathered.
    soft: all keep their slots, hidden once halted; the twins agree exactly. Static: the slots.
    In training under 'soft', phase one, the paper's estimate of complexity: all stay and the loss
    asks them to. With extra['active'] [*B N], the labels of phase two, those halt that would, and
    the loss asks for the labels.
    Gradient: to the head, and through it to the tokens, from that loss alone.
    """

    latents: int
    capacity: int
    threshold: float = 0.75
    hidden: int = 512
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def __post_init__(self) -> None:
        if not 1 <= self.capacity <= self.latents:
            raise ValueError(
                f"karl: capacity={self.capacity} must lie in [1, latents={self.latents}]; change "
                "one of the two."
            )
        if not self.threshold > 0:
            raise ValueError(
                f"karl: threshold={self.threshold} must be above 0, a chance; raise threshold."
            )

    def counts(self, n: int, prefix: int) -> int:
        latents = min(self.latents, n - prefix)
        return n - latents + min(self.capacity, latents)

    def idle(self, n: int, prefix: int) -> bool:
        """Whether nobody ever halts."""
        return self.threshold >= 1 and self.counts(n, prefix) == n

    def macs(self, n: int, layout: Layout) -> int:
        return min(self.latents, n) * (layout.width + 1) * self.hidden

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> HaltingHead:
        return HaltingHead(width, self.hidden, rngs=rngs)

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
        n, prefix = tokens.n, tokens.prefix
        if self.idle(n, prefix):
            return tokens, None, state, {}
        others = n - min(self.latents, n - prefix)
        logits = require_module(self, module)(tokens.x[..., others:, :])
        valid = None if tokens.valid is None else tokens.valid[..., others:]
        learning, aux = train and twin == "soft", {"logits": logits}
        if learning:
            active = tokens.extra.get("active", jnp.ones((*tokens.batch, n), bool))
            aux["loss_halting"] = halting_loss(logits, active[..., others:], valid)
            if "active" not in tokens.extra:
                return tokens, None, state, aux
        stays = self._stays(logits, valid)
        aux["share"] = routing.mean_over(stays.astype(jnp.float32), valid)
        map_, aux["overflow"] = keep_where(
            _behind(jnp.ones((*tokens.batch, others), bool), stays),
            self.counts(n, prefix),
            scores=_behind(jnp.full((*tokens.batch, others), jnp.inf), -logits),
            valid=tokens.valid,
        )
        map_ = map_.masked() if twin == "soft" else map_
        return move(tokens, map_), map_, state, aux

    def _stays(self, logits: Float[Array, "*B T"], valid: Any) -> Bool[Array, "*B T"]:
        """All that do not halt, and the least halted one."""
        value, _, _ = Halting(self.threshold).update(logits)
        return routing.at_least_one(value > 0, -logits, valid)


def _behind(front: Array, latents: Array) -> Array:
    return jnp.concatenate([front, latents.astype(front.dtype)], axis=-1)


@dataclass(frozen=True)
class Target(Reduction):
    """Tells the encoder which error of reconstruction is wanted: the embedding of the next higher
    of the released 19 levels is added to the first token, where KARL has a token of its own.

    error: for all images; extra['error'] [*B N], whose first entry counts, gives each its own.
    """

    error: float

    def counts(self, n: int, prefix: int) -> int:
        return n

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> ErrorEmbedding:
        return ErrorEmbedding(jnp.asarray(ERRORS), width)

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
        wanted = jnp.full((*tokens.batch, 1), self.error)
        wanted = tokens.extra.get("error", wanted)[..., 0]
        level = require_module(self, module)(bin_up(wanted, jnp.asarray(ERRORS)))
        x = tokens.x.at[..., 0, :].add(level.astype(tokens.x.dtype))
        return tokens.replace(x=x), None, state, {}


@register(
    "karl",
    family="halt",
    site="after",
    learned=True,
    count="data-dependent",
    twins="exact",
    paper="KARL 2025",
    golden=("core/karl__halt", "gen/karl__halting_mask", "gen/karl__loss_bins"),
)
def karl(
    layout: Layout,
    *,
    keep: float = 0.5,
    latents: int | None = None,
    layer: int | None = None,
    site: str = "after",
    threshold: float = 0.75,
    error: float | None = None,
) -> Plan:
    """Tokens halt by a learned head; the layers behind it do without them.

    keep: slots for those that stay, as a share of the latent tokens. latents: how many of the last
    tokens are latent, default all behind the prefix. layer: the encoder's last, default the middle
    one; site='output': the whole model is the encoder. error: the wanted error of reconstruction,
    which conditions the model's first token; see `Target`. threshold: see `Karl`.

    Raises:
      ValueError: more latents than tokens, or an error without a prefix to carry it.
    """
    where, latents = routing.place_latents("karl", layout, latents, layer, site)
    if error is not None and not layout.prefix:
        raise ValueError(
            f"karl: error={error} conditions the first token of a prefix, which this model lacks; "
            "set class_token=True or leave out error."
        )
    halting = where, Karl(latents, routing.room_of(latents, keep), threshold)
    target = () if error is None else ((Site("input"), Target(error)),)
    return Plan((halting, *target), name="karl")
