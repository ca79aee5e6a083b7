"""How selection is learned: estimators, and gates as pure (init, update) pairs.

A gate's `update(logits, state, *, key, train) -> (value, state, aux)`; state is explicit and None
for most. The value acts as a multiplicative policy or, in log space, as an additive key bias.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray


def straight_through(value: Float[Array, "..."], soft: Float[Array, "..."]) -> Float[Array, "..."]:
    """`value` forward, exactly, and the gradient of `soft` backward."""
    return jax.lax.stop_gradient(value) + (soft - jax.lax.stop_gradient(soft))


def ceil_through(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Ceiling with identity gradient."""
    return straight_through(jnp.ceil(x), x)


def one_through(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 forward, and the gradient of `x` backward."""
    return straight_through(jnp.ones_like(x), x)


def min_through(*counts: Float[Array, ""]) -> Float[Array, ""]:
    """The minimum, with the full gradient to every argument (DiffRate's official FLOPs)."""
    total = sum(counts[1:], counts[0])
    return straight_through(jnp.stack(jnp.broadcast_arrays(*counts)).min(0), total)


@dataclass(frozen=True)
class StraightThrough:
    """1 where sigmoid(logit) > threshold, with the sigmoid's gradient. inclusive: >= instead."""

    threshold: float = 0.5
    inclusive: bool = False

    def init(self) -> None:
        return None

    def update(
        self,
        logits: Float[Array, "*B N"],
        state: Any = None,
        *,
        key: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "*B N"], Any, dict]:
        soft = jax.nn.sigmoid(logits)
        above = soft >= self.threshold if self.inclusive else soft > self.threshold
        return straight_through(above.astype(soft.dtype), soft), state, {}


@dataclass(frozen=True)
class Gumbel:
    """Hard two-way Gumbel-softmax over log-probabilities [*B N 2] (keep, drop); straight-through.

    In evaluation (train=False) the likelier one, without noise.
    """

    temperature: float = 1.0

    def init(self) -> None:
        return None

    def update(
        self,
        logits: Float[Array, "*B N 2"],
        state: Any = None,
        *,
        key: PRNGKeyArray | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "*B N"], Any, dict]:
        logits = _with_noise(logits, key) if train else logits
        soft = jax.nn.softmax(logits / self.temperature, axis=-1)[..., 0]
        return straight_through((soft >= 0.5).astype(soft.dtype), soft), state, {}


@dataclass(frozen=True)
class GumbelChoice:
    """Hard Gumbel-softmax over C choices: a one-hot vector; straight-through.

    A logit of -inf is never chosen. In evaluation (train=False) the likeliest, without noise.
    """

    temperature: float = 1.0

    def init(self) -> None:
        return None

    def update(
        self,
        logits: Float[Array, "*B N C"],
        state: Any = None,
        *,
        key: PRNGKeyArray | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "*B N C"], Any, dict]:
        logits = _with_noise(logits, key) if train else logits
        soft = jax.nn.softmax(logits / self.temperature, axis=-1)
        hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=soft.dtype)
        return straight_through(hard, soft), state, {}


def _with_noise(logits: Array, key: PRNGKeyArray | None) -> Array:
    if key is None:
        raise ValueError("gates: training draws Gumbel noise; pass key= (Call(key=...)).")
    return logits + jax.random.gumbel(key, logits.shape, logits.dtype)


@dataclass(frozen=True)
class SigmoidBias:
    """A soft gate in log space: scale * sigmoid(-logit) in [scale, 0], an additive key bias.

    noise: Gumbel noise on the logits in training.
    """

    scale: float = -30.0
    noise: bool = False

    def init(self) -> None:
        return None

    def update(
        self,
        logits: Float[Array, "*B N"],
        state: Any = None,
        *,
        key: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "*B N"], Any, dict]:
        logits = _with_noise(logits, key) if train and self.noise else logits
        return self.scale * jax.nn.sigmoid(-logits), state, {}


@dataclass(frozen=True)
class RateController:
    """A regulariser's coefficient that steers a rate to `target`: PI control, one update a step.

    p <- 0.9 p + 0.1 proportional e, i <- i + integral e with e = target - rate; the coefficient is
    max(0, p + i). delay: steps before it begins. two_sided: p + i as it is, so that a rate above
    the target is pushed back too, which a model that starts from scratch needs. The state is {'p',
    'i', 'coefficient', 'step'}; nothing stops i from winding up. Source: Kallini et al. 2024,
    jkallini/mrt5 (two_sided is our own).
    """

    target: float
    proportional: float = 0.5
    integral: float = 1e-5
    delay: int = 0
    two_sided: bool = False

    def init(self) -> dict[str, Array]:
        zero = jnp.zeros((), jnp.float32)
        return {"p": zero, "i": zero, "coefficient": zero, "step": zero}

    def update(self, rate: Float[Array, ""], state: dict[str, Array]) -> dict[str, Array]:
        """The state after a step that measured `rate`; no gradient."""
        error = (self.target - jax.lax.stop_gradient(rate)) * (state["step"] >= self.delay)
        p = 0.9 * state["p"] + 0.1 * self.proportional * error
        i = state["i"] + self.integral * error
        coefficient = p + i if self.two_sided else jnp.maximum(p + i, 0.0)
        return {"p": p, "i": i, "coefficient": coefficient, "step": state["step"] + 1}


@dataclass(frozen=True)
class LogSigmoid:
    """A soft gate in log space: log sigmoid(sharpness * logit) in (-inf, 0], an additive key bias.

    Its exponential is the gate; products of gates are sums.
    """

    sharpness: float = 1.0

    def init(self) -> None:
        return None

    def update(
        self,
        logits: Float[Array, "*B N"],
        state: Any = None,
        *,
        key: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "*B N"], Any, dict]:
        return jax.nn.log_sigmoid(self.sharpness * logits), state, {}


@dataclass(frozen=True)
class Boundary:
    """Which tokens begin a segment: those with a chance above the threshold; told['starts'].

    Takes chances instead of logits. The value is 1 with the gradient of how sure the choice is: of
    the chance where it starts one, of 1 - chance elsewhere. Source: H-Net (goombalab/hnet).
    """

    threshold: float = 0.5

    def init(self) -> None:
        return None

    def update(
        self,
        chance: Float[Array, "*B N"],
        state: Any = None,
        *,
        key: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "*B N"], Any, dict]:
        starts = chance > self.threshold
        return one_through(jnp.where(starts, chance, 1.0 - chance)), state, {"starts": starts}


@dataclass(frozen=True)
class Halting:
    """0 for tokens that halt, sigmoid(logit) > threshold; 1 for those that stay. No gradient: the
    logits are trained on labels. Source: KARL (ShivamDuggal4/karl)."""

    threshold: float = 0.75

    def init(self) -> None:
        return None

    def update(
        self,
        logits: Float[Array, "*B N"],
        state: Any = None,
        *,
        key: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "*B N"], Any, dict]:
        halted = jax.nn.sigmoid(logits) > self.threshold
        return 1.0 - halted.astype(logits.dtype), state, {"halted": halted}


@dataclass(frozen=True)
class PonderHalting:
    """A token halts once its chances sigmoid(scale * logit - centre) have added up to more than
    1 - eps; the value, by update, is how much of its result is from there: the chance, at last what
    is missing to 1, then 0.

    last: nothing goes on from here, the chance is 1. The state is {'sum', 'rest', 'ponder'}, of
    every token: chances so far, what they leave of 1, and the cost: updates that it took part in,
    and the rest with which it halted. told: 'chance' [*B N], also of those that have halted, and
    'active', who had not halted before. A sum of exactly 1 - eps ends without the rest, as in the
    released code. Gradient: to logits. Source: Yin et al. 2022, NVlabs/A-ViT.
    """

    scale: float = 10.0
    centre: float = 30.0
    eps: float = 0.01
    last: bool = False

    def init(self) -> dict[str, Array]:
        zero = jnp.zeros((), jnp.float32)
        return {"sum": zero, "rest": zero + 1.0, "ponder": zero}

    def active(self, state: dict[str, Array]) -> Bool[Array, "..."]:
        """Who has not halted."""
        return state["sum"] < 1.0 - self.eps

    def update(
        self,
        logits: Float[Array, "*B N"],
        state: dict[str, Array] | None = None,
        *,
        key: Any = None,
        train: bool = False,
    ) -> tuple[Float[Array, "*B N"], dict[str, Array], dict]:
        state = self.init() if state is None else state
        chance = jax.nn.sigmoid(self.scale * logits.astype(jnp.float32) - self.centre)
        step = jnp.ones_like(chance) if self.last else chance
        active = jnp.broadcast_to(self.active(state), chance.shape)
        after = {"sum": state["sum"] + step}
        goes_on, halts = self.active(after), active & (after["sum"] > 1.0 - self.eps)
        last_part = jnp.where(halts, state["rest"], 0.0)
        after["rest"] = state["rest"] - jnp.where(goes_on, step, 0.0)
        after["ponder"] = state["ponder"] + active + last_part
        value = jnp.where(goes_on, step, last_part)
        return value, after, {"chance": chance, "active": active}


@dataclass(frozen=True)
class Rate:
    """A differentiable kept count: softmax over candidates patches, patches - g, ... > 0.

    `prefix` tokens are always kept and come on top. Source: Chen et al. 2023, OpenGVLab/DiffRate.
    """

    patches: int
    granularity: int = 1
    prefix: int = 1

    @property
    def candidates(self) -> tuple[int, ...]:
        return tuple(range(self.patches, 0, -self.granularity))

    def kept(self, logits: Float[Array, " C"]) -> Float[Array, ""]:
        """ceil(E[candidate]) + prefix, with the gradient of the expectation."""
        chance = jax.nn.softmax(logits.astype(jnp.float32))
        expected = jnp.dot(jnp.asarray(self.candidates, jnp.float32), chance, precision="highest")
        return ceil_through(expected) + self.prefix

    def survival(self, logits: Float[Array, " C"]) -> Float[Array, " R"]:
        """Probability that each rank (0 = first of the prefix) is kept; R = patches + prefix."""
        chance = jax.nn.softmax(logits.astype(jnp.float32))
        kept = jnp.asarray(self.candidates) + self.prefix
        inside = jnp.arange(self.patches + self.prefix)[None, :] < kept[:, None]
        return chance @ inside.astype(jnp.float32)

    def mask(
        self, logits: Float[Array, " C"], alive: Num[Array, "*B"] | int | None = None
    ) -> Float[Array, "*B R"]:
        """0 for ranks in [kept, alive), 1 elsewhere; the gradient is that of `survival`.

        alive: ranks still present, per example; None means all.
        """
        survival = self.survival(logits)
        ranks = jnp.arange(self.patches + self.prefix)
        present = jnp.asarray(len(ranks) if alive is None else alive)[..., None]
        shape = (1,) * (present.ndim - 1) + (-1,)
        ranks, survival = ranks.reshape(shape), survival.reshape(shape)
        kept = jax.lax.stop_gradient(self.kept(logits))
        hidden = (ranks >= kept) & (ranks < present)
        return straight_through(1.0 - hidden, jnp.broadcast_to(survival, hidden.shape))

    def freeze(self, logits: Float[Array, " C"]) -> int:
        """The integer to export; never recompute it elsewhere."""
        return math.floor(float(self.kept(logits)) + 0.5)
