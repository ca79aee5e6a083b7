"""Dynamic visual-token exit (DyVTE, Wu et al. 2024/25): after some layer, which a router on the
text finds for each example, all vision tokens leave.

Official code: DoubtedSteam/DyVTE (no licence). There the image lies at fixed places (35, 576), the
batch of inference is 1, and the router of the last layer is asked too, which changes no text. Where
no text lies between the image and the last token of the prompt, its mean is 0 here and NaN there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokred.gates import GumbelChoice
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nn.predictors import ExitRouter
from tokred.ops import gather
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.report import Report
from tokred.select import keep_where
from tokred.tokens import Tokens, move

RULES = ("gate", "plan")


def exit_feature(
    x: Float[Array, "*B N D"], vision: Bool[Array, "*B N"], prompt: Bool[Array, "*B N"]
) -> Float[Array, "*B F"]:
    """F = 2 D: the mean state of the prompt's text behind the last vision token, without its last
    token, and the state of that one. prompt: valid tokens of it. No gradient."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    slot = jax.lax.broadcasted_iota(jnp.int32, prompt.shape, prompt.ndim - 1)
    image = jnp.where(vision, slot, -1).max(-1, keepdims=True)
    last = jnp.where(prompt, slot, -1).max(-1, keepdims=True)
    text = (prompt & ~vision & (slot > image) & (slot < last))[..., None]
    mean = jnp.where(text, x, 0.0).sum(-2) / jnp.maximum(text.sum(-2), 1)
    state = gather(x, jnp.maximum(last, 0), axis=x.ndim - 2)[..., 0, :]
    return jnp.concatenate([mean, state], axis=-1)


@dataclass(frozen=True)
class VisualExit(Reduction):
    """After this layer all vision tokens of an example leave, or none does; positions stay.

    soft and causal, which are one: every example by its own router, in the first layer where the
    logit of exit exceeds the other; its vision tokens stay in their slots, hidden from all later
    layers, so that nothing is saved, except entries in a cache. rule='plan': where `leaves`,
    whatever routers say. packed: the vision tokens of all examples are gathered away where
    `leaves`, the layer that the plan was made for; routers are not asked. See `exit_layers` for
    plans that fit a batch. With rule='plan' the twins agree exactly on text.

    Reads extra['vision'], bool [*B N], and where it is given extra['generated'], int, -1 for the
    prompt: only the prompt decides, and it must come whole, in one call. A token decoded alone
    decides nothing: caches of later layers hold no vision, those of earlier ones do.
    A decoder has no logits for tokens that left: `Report.restore` puts the others' in place.
    targets: vision tokens that every row holds at least, so many slots are saved; further ones are
    hidden. A row with fewer loses its last text (aux 'overflow'). first: the first layer that may
    change tokens; static, as all fields. aux: 'logits' [*B 2], 'exited' [*B] by now.
    Gradient: through 'logits' to the router alone; a choice has none. See `exit_loss`.
    """

    leaves: bool
    targets: int = 0
    rule: str = "gate"
    hidden: int = 2048
    first: bool = False
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"dyvte: rule={self.rule!r} must be one of {RULES}; change rule.")
        if self.targets < 0:
            raise ValueError(f"dyvte: targets={self.targets} is a count; make it 0 or more.")

    def counts(self, n: int, prefix: int) -> int:
        if not self.leaves:
            return n
        if self.targets >= n - prefix:
            raise ValueError(
                f"dyvte: targets={self.targets} vision tokens leave nothing of a sequence of {n}; "
                "lower targets, or decode single tokens under plan.with_twin('causal')."
            )
        return n - self.targets

    def macs(self, n: int, layout: Layout) -> int:
        return 0  # the packed form asks no router

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> ExitRouter:
        return ExitRouter(2 * width, self.hidden, rngs=rngs)

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
    ) -> tuple[Tokens, Any, Any, dict[str, Array]]:
        alone = twin == "causal" and tokens.n == 1
        if alone or (twin == "packed" and not self.leaves):
            return tokens, None, state, {}
        vision = routing.require_extra("dyvte", tokens, "vision").astype(bool)
        vision = vision if tokens.valid is None else vision & tokens.valid
        if twin == "packed":
            k = self.counts(tokens.n, tokens.prefix)
            map_, overflow = keep_where(~vision, k, valid=tokens.valid)
            return move(tokens, map_), map_, state, {"overflow": overflow}
        exits, aux = self._decide(tokens, vision, module)
        gone = vision & exits[..., None]
        map_ = routing.keep_decided(~gone, tokens.valid)
        aux["exited"] = ~(vision & ~gone).any(-1)
        return move(tokens, map_), map_, state, aux

    def _decide(
        self, tokens: Tokens, vision: Bool[Array, "*B N"], module: Any
    ) -> tuple[Bool[Array, "*B"], dict[str, Array]]:
        """Whether each example's vision tokens leave, and what the router said."""
        planned = jnp.full(tokens.batch, self.leaves)
        if self.rule == "plan" and module is None:
            return planned, {}
        prompt = jnp.ones_like(vision) if tokens.valid is None else tokens.valid
        if "generated" in tokens.extra:
            prompt &= tokens.extra["generated"] < 0
        logits = require_module(self, module)(exit_feature(tokens.x, vision, prompt))
        choice, _, _ = GumbelChoice().update(logits)
        exits = planned if self.rule == "plan" else choice[..., 1] > 0
        return exits, {"logits": logits}


def exit_layers(report: Report) -> Int[Array, "*B"]:
    """Through how many layers the vision tokens of each example went, by the report of a run under
    the soft or causal twin: `make_plan('dyvte', layout, exit=int(exits.max()), ...)` is the packed
    plan that takes vision from no example of the batch too early. 1 where an example has none.

    Raises ValueError for a report in which no router decided.
    """
    exited = [aux["exited"] for aux in report.aux.values() if "exited" in aux]
    if not exited:
        raise ValueError(
            "dyvte: the report has no exits; run the model under plan.with_twin('soft') first."
        )
    return 1 + jnp.stack([~e for e in exited]).sum(0)


def exit_labels(
    shown: Float[Array, "B N V"],
    hidden: Float[Array, "B N V"],
    target: Int[Array, "B N"],
    weight: Float[Array, "B N"],
    *,
    agreement: float = 0.99,
    slack: float = 1.03,
) -> Int[Array, " B"]:
    """1 where an example may do without vision: more than `agreement` of its answer's likeliest
    tokens are the same, and its loss is below `slack` times the other.

    shown, hidden: logits with vision in all layers, and hidden from some layer on. weight: 1 for
    tokens of the answer. Gradient: none.
    """
    shown, hidden = jax.lax.stop_gradient((shown, hidden))
    mean = lambda a: (a * weight).sum(-1) / jnp.maximum(weight.sum(-1), 1.0)  # noqa: E731
    loss = lambda y: mean(optax.softmax_cross_entropy_with_integer_labels(y, target))  # noqa: E731
    same = mean(shown.argmax(-1) == hidden.argmax(-1)) > agreement
    return (same & (loss(hidden) < slack * loss(shown))).astype(jnp.int32)


def exit_loss(
    model: Any,
    ids: Int[Array, "B N"],
    target: Int[Array, "B N"],
    weight: Float[Array, "B N"],
    *,
    layer: int,
    extra: Mapping[str, Array],
    **inputs: Any,
) -> tuple[Float[Array, ""], Int[Array, " B"]]:
    """(cross-entropy of one layer's router with its labels, labels), from two runs: with vision in
    all layers, and with vision hidden after `layer`; draw another layer every step.

    model: a decoder built with a 'dyvte' plan. target, weight: see `exit_labels`; answers must not
    be part of the prompt: extra['generated'] >= 0. inputs: further ones of the model. Static:
    layer. Gradient: to that router alone. The released recipe: learning rate 6e-5, batch 16, one
    epoch over 1 % of the instruction data, all else frozen.

    Raises ValueError for the last layer, which has no router.
    """
    depth = model.config.depth
    if not 0 <= layer < depth - 1:
        raise ValueError(
            f"dyvte: layer={layer} must lie in [0, {depth - 2}], the layers with a router; "
            "change layer."
        )
    layout = model.config.layout_of(ids.shape[1])
    plan = dyvte(layout, exit=layer + 1, rule="plan").with_twin("soft")
    shown, _ = model(ids, extra=extra, **inputs)
    hidden, report = model(ids, plan=plan, extra=extra, **inputs)
    labels = exit_labels(shown, hidden, target, weight)
    logits = report.aux[f"after_{layer}"]["logits"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), labels


@register(
    "dyvte",
    family="prune",
    site="after",
    learned=True,
    needs=("vision",),
    twins="different",
    golden=("core/dyvte__router",),
    paper="DyVTE 2024",
)
def dyvte(
    layout: Layout,
    *,
    keep: float = 0.5,
    exit: int | None = None,
    targets: int = 0,
    rule: str = "gate",
    hidden: int = 2048,
) -> Plan:
    """All vision tokens leave after a layer that routers on the text choose, one per layer.

    exit: through how many layers vision tokens go in the packed form, by default the share `keep`
    of them; all of them: they never leave. Other options: see `VisualExit`.
    """
    depth = layout.depth
    exit = max(1, round(keep * depth)) if exit is None else exit
    if not 1 <= exit <= depth:
        raise ValueError(f"dyvte: exit={exit} must lie in [1, {depth}], the layers; change exit.")
    layers = [exit - 1] if rule == "plan" else range(depth - 1)
    steps = [
        (Site("after", i), VisualExit(i == exit - 1, targets, rule, hidden, i == layers[0]))
        for i in layers
        if i < depth - 1
    ]
    return Plan(tuple(steps), name="dyvte")
