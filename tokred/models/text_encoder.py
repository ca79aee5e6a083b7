"""Text to one vector: BERT, MiniLM, and the text towers of CLIP and SigLIP."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokred.models.decoder import Decoder, DecoderConfig
from tokred.models.inner import HasInner
from tokred.models.vit import pool_tokens
from tokred.ops import gather
from tokred.plan import Plan, nearest
from tokred.report import Call, Report
from tokred.tokens import Tokens, last_of

DENSE = Plan()
POOLS = ("first", "last", "mean", "size_mean", "end")


@dataclass(frozen=True)
class TextEncoderConfig(HasInner):
    """Everything that shapes a text encoder; all fields are static.

    trunk: embeddings and layers; it has no logits. pool: the 'first' token, the 'last' valid one,
    the 'mean' of the valid ones, 'size_mean', which weighs merged tokens by size, or the 'end': the
    first token that is end_id (of None: the largest id). tanh: a dense layer and tanh behind it
    (BERT's pooler). classes: channels of a head, 0 for none; head_bias: of it.
    """

    trunk: DecoderConfig = field(default_factory=DecoderConfig)
    pool: str = "mean"
    end_id: int | None = None
    tanh: bool = False
    classes: int = 0
    head_bias: bool = True

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(
                f"TextEncoderConfig: pool={self.pool!r} must be one of {POOLS}"
                f"{nearest(self.pool, POOLS)}"
            )

    @property
    def context(self) -> int:
        return self.trunk.context

    @property
    def inner(self) -> DecoderConfig:
        return self.trunk

    def outer_macs(self, tokens: Any) -> int:
        """Of what follows pooling."""
        width = self.trunk.width
        return width * (self.classes + self.tanh * width)


class TextEncoder(nnx.Module):
    """ids [B N] -> (features [B D], Report), under any Plan.

    plan: only its learned reductions matter here; their modules hang in the trunk.
    """

    def __init__(self, config: TextEncoderConfig, *, plan: Plan = DENSE, rngs: nnx.Rngs):
        self.config, c = config, config.trunk
        kinds = {"dtype": c.dtype, "param_dtype": c.param_dtype, "rngs": rngs}
        self.trunk = Decoder(c, plan=plan, rngs=rngs)
        self.pooler = nnx.Linear(c.width, c.width, **kinds) if config.tanh else None
        self.head = None if not config.classes else nnx.Linear(
            c.width, config.classes, use_bias=config.head_bias, **kinds
        )  # fmt: skip

    @property
    def reductions(self) -> nnx.Dict:
        return self.trunk.reductions

    def __call__(
        self,
        ids: Int[Array, "B N"],
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Bool[Array, "B N"] | None = None,
        extra: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B D"], Report]:
        """Arguments and errors as `Decoder` has them; float32. Static: plan."""
        tokens, report = self.encode(ids, plan=plan, call=call, valid=valid, extra=extra)
        x = self._pooled(ids, tokens, valid)
        x = x if self.pooler is None else jnp.tanh(self.pooler(x))
        x = x if self.head is None else self.head(x)
        return x.astype(jnp.float32), report

    def encode(
        self, ids: Int[Array, "B N"], *, plan: Plan = DENSE, call: Call | None = None, **how: Any
    ) -> tuple[Tokens, Report]:
        """All layers and the final norm, if any; other arguments as in a call."""
        tokens = self.trunk.embedded(ids, plan=plan, **how)
        tokens, report, _ = self.trunk.decode(tokens, plan=plan, call=call)
        return tokens, report

    def _pooled(self, ids: Array, tokens: Tokens, valid: Array | None) -> Float[Array, "B D"]:
        pool = self.config.pool
        if pool.endswith("mean"):
            return pool_tokens(tokens.replace(x=tokens.x.astype(jnp.float32)), pool)
        if valid is None:
            valid = jnp.ones(ids.shape, bool)
        if pool == "end":
            end = self.config.end_id
            slot = jnp.argmax(ids if end is None else (ids == end) & valid, axis=-1)
        else:
            slot = jnp.argmax(valid, -1) if pool == "first" else last_of(valid)[:, 0]
        now = gather(tokens.sources(), slot[:, None], axis=1)
        return gather(tokens.x, jnp.maximum(now, 0), axis=1)[:, 0]
