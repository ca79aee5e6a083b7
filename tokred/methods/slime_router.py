"""SliME's router (Zhang et al. 2024): of an image's tokens those stay that the question is about,
until their chances add up to a share.

Official code: yfzhang114/SliME (Apache-2.0), `TextGuidedSampler`. Unlike there the number of slots
is static, and top_p = 1 keeps every token whatever the rounding of the sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.gates import one_through
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.text_router import TextRouter, router_macs
from tokred.ops.attention import NEGATIVE
from tokred.plan import Ask, Layout, Plan, Reduction, Site, require_module
from tokred.score import unit_rows
from tokred.select import keep_where, rank_within
from tokred.tokens import Tokens, move

SCORERS = ("cosine", "attention")
WORDS = Ask("given", rows="words")


def score_by_text(
    x: Float[Array, "*B N D"],
    text: Float[Array, "*B T D"],
    valid: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B N"]:
    """The sum of each token's cosines with the valid words; without `valid` their mean.

    A sum of cosines is one product with the sum of the words' directions. Gradient: to x and text.
    """
    words = unit_rows(text)
    toward = words.mean(-2) if valid is None else jnp.where(valid[..., None], words, 0).sum(-2)
    return jnp.einsum("...nd,...d->...n", unit_rows(x), toward)


def keep_mass(chance: Float[Array, "*B N"], top_p: float) -> Bool[Array, "*B N"]:
    """The likeliest tokens until their chances add up to more than `top_p`; one at least, and all
    if top_p is 1. Of equals the first goes first. Gradient: none."""
    if top_p >= 1:
        return jnp.ones(chance.shape, bool)
    chance = jax.lax.stop_gradient(chance)
    total = jnp.cumsum(-jnp.sort(-chance, axis=-1), axis=-1)
    count = (total <= top_p).sum(-1, keepdims=True) + 1
    return rank_within(chance, jnp.zeros(chance.shape, jnp.int32)) < count


@dataclass(frozen=True)
class SlimeRouter(Reduction):
    """chance = softmax(score / temperature) over an image's valid tokens; of the likeliest as many
    stay as `keep_mass` says, in their old order.

    The text is asked for as 'words', Tokens [*L T C] whose axes L lead those of the tokens, as the
    examples of images [B I N D] do. together: the chances are over all images of an example, such
    as the crops of one (official), of which absent ones must be invalid; else over each by itself.
    scorer: 'cosine', see `score_by_text`, or 'attention', a `TextRouter` with `heads`, for words of
    `text_width`. Its choice is hard, so tokens are multiplied by 1 with their chance's gradient:
    without that, as in the official code, it would learn nothing. official: its logits first pass
    a softmax over the first axis, the batch, as the code does with several examples.
    capacity: slots behind the prefix, as a share; of more that stay the likeliest find one, and aux
    'overflow' counts the others. packed: they are gathered. soft: all tokens keep their slots,
    those that go are hidden; the twins agree exactly. noise: of the scores in training, times a
    normal draw.
    """

    top_p: float = 0.95
    temperature: float = 1.0
    capacity: float = 1.0
    scorer: str = "cosine"
    heads: int | None = None
    text_width: int | None = None
    official: bool = False
    together: bool = False
    noise: float = 0.1
    asks: ClassVar[tuple[Ask, ...]] = (WORDS,)
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def __post_init__(self) -> None:
        routing.check_share("slime_router", "top_p", self.top_p)
        routing.check_share("slime_router", "capacity", self.capacity)
        if not self.temperature > 0:
            raise ValueError(
                f"slime_router: temperature={self.temperature} must be above 0; raise temperature."
            )
        if self.noise < 0:
            raise ValueError(f"slime_router: noise={self.noise} must be at least 0; raise noise.")
        if self.scorer not in SCORERS:
            raise ValueError(
                f"slime_router: scorer={self.scorer!r} must be one of {SCORERS}; change scorer."
            )

    def counts(self, n: int, prefix: int) -> int:
        return prefix + min(n - prefix, routing.room_of(n - prefix, self.capacity))

    def idle(self, n: int, prefix: int) -> bool:
        """Whether everybody stays."""
        return self.top_p >= 1 and self.counts(n, prefix) == n

    def macs(self, n: int, layout: Layout) -> int:
        each = layout.width if self.scorer == "cosine" else router_macs(layout.width)
        return n * each

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> TextRouter | None:
        if self.scorer == "cosine":
            return None
        return TextRouter(width, self.heads, text=self.text_width, rngs=rngs)

    def __call__(
        self,
        tokens: Tokens,
        evidence: Mapping[str, Any],
        state: Any = None,
        *,
        module: Any = None,
        key: Any = None,
        train: bool = False,
        twin: str = "packed",
    ) -> tuple[Tokens, Any, Any, dict[str, Any]]:
        if self.idle(tokens.n, tokens.prefix):
            return tokens, None, state, {}
        words, front = evidence[WORDS.name], _front(tokens)
        score = self._scores(tokens, words, module)
        chance = self._chances(self._disturbed(score, key, train), tokens, words)
        stays = self._stays(chance, words) & _free(tokens)
        map_, overflow = keep_where(
            stays | front,
            self.counts(tokens.n, tokens.prefix),
            scores=jnp.where(front, jnp.inf, chance),
            valid=tokens.valid,
        )
        share = routing.mean_over(stays.astype(jnp.float32), _free(tokens))
        aux = {"score": score, "chance": chance, "share": share, "overflow": overflow}
        if self.scorer == "attention":
            through = one_through(chance)[..., None].astype(tokens.x.dtype)
            tokens = tokens.replace(x=tokens.x * through)
        map_ = map_.masked() if twin == "soft" else map_
        return move(tokens, map_), map_, state, aux

    def _scores(self, tokens: Tokens, words: Tokens, module: Any) -> Float[Array, "*B N"]:
        """Of the images of an example side by side, as one row of tokens that look at its text."""
        _check(tokens, words)
        x = tokens.x.reshape(*words.batch, -1, tokens.x.shape[-1])
        if self.scorer == "cosine":
            _check_widths(x, words.x)
            score = score_by_text(x, words.x, words.valid)
        else:
            score = require_module(self, module)(x, words.x, words.valid)
            if self.official:
                score = jax.nn.softmax(score / self.temperature, axis=0)
        return score.reshape(*tokens.batch, tokens.n)

    def _disturbed(self, score: Float[Array, "*B N"], key: Any, train: bool) -> Array:
        if not train or self.noise == 0:
            return score
        if key is None:
            raise ValueError(
                f"slime_router: noise={self.noise} in training draws; pass Call(key=...), or set "
                "noise=0."
            )
        return score + self.noise * jax.random.normal(key, score.shape)

    def _chances(
        self, score: Float[Array, "*B N"], tokens: Tokens, words: Tokens
    ) -> Float[Array, "*B N"]:
        free = _free(tokens)
        logits = jnp.where(free, score / self.temperature, NEGATIVE)
        chance = jax.nn.softmax(self._rows(logits, words), axis=-1).reshape(score.shape)
        return jnp.where(free, chance, 0.0)

    def _stays(self, chance: Float[Array, "*B N"], words: Tokens) -> Bool[Array, "*B N"]:
        return keep_mass(self._rows(chance, words), self.top_p).reshape(chance.shape)

    def _rows(self, value: Float[Array, "*B N"], words: Tokens) -> Array:
        """What the chances are over as the last axis."""
        return value.reshape(*words.batch, -1) if self.together else value


def _check(tokens: Tokens, words: Tokens) -> None:
    lead = words.batch
    if tokens.batch[: len(lead)] != lead:
        raise ValueError(
            f"slime_router: the words' leading axes {lead} must begin those of the tokens, "
            f"{tokens.batch}; give each example its text."
        )


def _check_widths(x: Array, words: Array) -> None:
    if x.shape[-1] != words.shape[-1]:
        raise ValueError(
            f"slime_router: tokens of {x.shape[-1]} channels have no cosine with words of "
            f"{words.shape[-1]}; put it behind the projector, or set scorer='attention' and "
            "text_width."
        )


def _front(tokens: Tokens) -> Bool[Array, "*B N"]:
    first = jnp.arange(tokens.n) < tokens.prefix
    return jnp.broadcast_to(first, (*tokens.batch, tokens.n))


def _free(tokens: Tokens) -> Bool[Array, "*B N"]:
    """All but the prefix and padding."""
    free = ~_front(tokens)
    return free if tokens.valid is None else free & tokens.valid


@register(
    "slime_router",
    family="connector",
    site="output",
    needs=("text",),
    count="data-dependent",
    twins="exact",
    paper="SliME 2024",
    golden=("connectors/slime_router", "connectors/slime_router_attn"),
)
def slime_router(
    layout: Layout,
    *,
    keep: float = 0.5,
    top_p: float = 0.95,
    temperature: float = 1.0,
    scorer: str = "cosine",
    heads: int | None = None,
    text_width: int | None = None,
    official: bool = False,
    together: bool = False,
    noise: float = 0.1,
) -> Plan:
    """Of an image's tokens those stay that are like the question's words, up to a share of chance.

    keep: slots, as a share of an image's tokens. Behind the projector, where tokens and words are
    equally wide; other options: see `SlimeRouter`. For the compression in front of it see slime.
    """
    reduction = SlimeRouter(
        top_p, temperature, keep, scorer, heads, text_width, official, together, noise
    )
    return Plan(((Site("output", part="connector"), reduction),), name="slime_router")
