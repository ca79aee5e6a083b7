"""Text to one vector: BERT, MiniLM, and the text towers of CLIP and SigLIP."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokred.models.decoder import Decoder, DecoderConfig
from tokred.ops import gather
from tokred.plan import Layout, Plan, nearest
from tokred.report import Call, Report
from tokred.tokens import Tokens

DENSE = Plan()
POOLS = ("first", "last", "mean", "size_mean", "end")


@dataclass(frozen=True)
class TextEncoderConfig:
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
    def depth(self) -> int:
        return self.trunk.depth

    @property
    def layout(self) -> Layout:
        return self.trunk.layout

    def layout_of(self, tokens: int) -> Layout:
        """The layout for so many tokens."""
        return self.trunk.layout_of(tokens)

    @property
    def projection_macs(self) -> tuple[int, int, int]:
        """Of one token's query, key and value."""
        return self.trunk.projection_macs

    @property
    def pair_macs(self) -> int:
        """Of one query's logits or values with one key, all heads."""
        return self.trunk.pair_macs

    def layer_macs(self, projected: Any, queries: Any, keys: Any, mlp: Any) -> Any:
        """Of one layer, at these token counts."""
        return self.trunk.layer_macs(projected, queries, keys, mlp)

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
            return _mean(tokens, pool == "size_mean")
        if valid is None:
            valid = jnp.ones(ids.shape, bool)
        if pool == "end":
            end = self.config.end_id
            slot = jnp.argmax(ids if end is None else (ids == end) & valid, axis=-1)
        else:
            slot = jnp.argmax(valid, -1) if pool == "first" else tokens_last(valid)
        now = gather(tokens.sources(), slot[:, None], axis=1)
        return gather(tokens.x, jnp.maximum(now, 0), axis=1)[:, 0]


def tokens_last(valid: Bool[Array, "B N"]) -> Int[Array, " B"]:
    """The slot of the last valid token."""
    return valid.shape[-1] - 1 - jnp.argmax(valid[..., ::-1], axis=-1)


def _mean(tokens: Tokens, by_size: bool) -> Float[Array, "B D"]:
    weight = jnp.ones(tokens.x.shape[:-1]) if tokens.valid is None else tokens.valid
    weight = (tokens.sizes() * weight if by_size else weight)[..., None].astype(jnp.float32)
    total = (tokens.x.astype(jnp.float32) * weight).sum(-2)
    return total / jnp.maximum(weight.sum(-2), 1e-9)


def normalised(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Rows of length 1."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True))
