"""The state that travels: tokens and all that belongs to each of them."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Assign, Keep, Mix, TokenMap, follow
from tokred.ops.gather import aligned


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "valid", "size", "position", "source", "bias", "policy", "extra", "memo"],
    meta_fields=["prefix", "proportional", "policy_eps", "ordered"],
)
@dataclass(frozen=True)
class Tokens:
    """Features and their book-keeping; a field that is None costs nothing.

    x: Float[*B N D] · valid: Bool[*B N] · size: Float[*B N], originals that each stands for
    · position: Float[*#B N C] coordinates, -1 where invalid; one row may stand for all examples
    · source: Int[*B S], original -> where it is now, -1 = gone
    · bias: Float[*B N], added to attention logits per key, in log space
    · policy: Float[*B N], multiplies attention's exponentials per key
    · extra: named per-token running quantities [*B N ...]
    · memo: named quantities of an example [*B ...] that no map moves, such as a cache across layers
    · prefix: protected tokens in front, static · proportional: attention adds log(size), static
    · policy_eps: epsilon of the policy softmax, static · ordered: positions rise from slot to slot
    among valid tokens of a document, so that no query may see behind its slot, static; other
    positions end it.
    """

    x: Any
    valid: Any = None
    size: Any = None
    position: Any = None
    source: Any = None
    bias: Any = None
    policy: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    memo: Mapping[str, Any] = field(default_factory=dict)
    prefix: int = 0
    proportional: bool = False
    policy_eps: float = 1e-6
    ordered: bool = False

    @property
    def batch(self) -> tuple[int, ...]:
        return self.x.shape[:-2]

    @property
    def n(self) -> int:
        """N, the static number of slots."""
        return self.x.shape[-2]

    def replace(self, **changes: Any) -> "Tokens":
        if "position" in changes:
            changes.setdefault("ordered", False)
        return dataclasses.replace(self, **changes)

    def sizes(self) -> Float[Array, "*B N"]:
        """`size`, or ones where tokens are still original (0 where invalid)."""
        if self.size is not None:
            return self.size
        ones = jnp.ones((*self.batch, self.n), jnp.float32)
        return ones if self.valid is None else ones * self.valid

    def positions(self) -> Float[Array, "*B N C"]:
        """`position` with a row for every example; there must be one."""
        return jnp.broadcast_to(self.position, (*self.batch, *self.position.shape[-2:]))

    def last_slot(self) -> Int[Array, "*B 1"]:
        """Where the last valid token is, 0 without any."""
        if self.valid is None:
            return jnp.full((*self.batch, 1), self.n - 1)
        return last_of(self.valid)

    def key_bias(self) -> Float[Array, "*B N"] | None:
        """What attention adds per key: `bias`, and log(size) where attention is proportional."""
        if not self.proportional or self.size is None:
            return self.bias
        log_size = jnp.log(jnp.maximum(self.size, 1e-6))
        return log_size if self.bias is None else self.bias + log_size

    def sources(self) -> Int[Array, "*B S"]:
        """`source`, or the identity where no token has moved yet."""
        if self.source is not None:
            return self.source
        slots = jnp.broadcast_to(jnp.arange(self.n, dtype=jnp.int32), (*self.batch, self.n))
        return slots if self.valid is None else jnp.where(self.valid, slots, -1)


def last_of(valid: Bool[Array, "*B N"]) -> Int[Array, "*B 1"]:
    """The slot of the last valid token, 0 without any."""
    slots = jnp.arange(valid.shape[-1]).reshape((1,) * (valid.ndim - 1) + (-1,))
    return jnp.where(valid, slots, 0).max(-1, keepdims=True)


def make_tokens(
    x: Float[Array, "*B N D"],
    *,
    valid: Bool[Array, "*B N"] | None = None,
    position: Float[Array, "*B N C"] | None = None,
    prefix: int = 0,
    **fields: Any,
) -> Tokens:
    """Tokens at the start of a model. Padding rows of `x` become 0 and their position -1.

    Raises:
      ValueError: more protected tokens than tokens.
    """
    if not 0 <= prefix <= x.shape[-2]:
        raise ValueError(f"make_tokens: prefix={prefix} exceeds N={x.shape[-2]}; lower prefix.")
    if valid is not None:
        x = jnp.where(valid[..., None], x, jnp.zeros_like(x))
        position = None if position is None else jnp.where(valid[..., None], position, -1)
    return Tokens(x, valid=valid, position=position, prefix=prefix, **fields)


def move(
    tokens: Tokens,
    map_: TokenMap,
    *,
    how: str | None = None,
    weight: Float[Array, "*B N"] | None = None,
    position: str = "mean",
) -> Tokens:
    """All of `tokens` through one map, each field by its own rule.

    x: `how` with `weight`; by default the chosen row (Keep), the size-weighted mean (Assign) or
    the product (Mix). Sizes add up, positions take the size-weighted mean or, with
    position='keep', the representative's; bias and extra the size-weighted mean, policy the
    maximum; source follows.
    """
    if tokens.position is not None:
        tokens = tokens.replace(position=tokens.positions(), ordered=tokens.ordered)
    if isinstance(map_, Keep):
        return _kept(tokens, map_, map_.apply(tokens.x, how, weight=weight))
    by_size = how is None and weight is None
    if by_size and isinstance(map_, Mix):
        how, by_size = "sum", False
    size = tokens.sizes()
    new_size = map_.sizes(size)
    average = lambda a: None if a is None else _mean(map_, a, size, new_size)  # noqa: E731
    valid = map_.valid
    if valid is None and tokens.valid is not None:
        valid = new_size > 0
    return tokens.replace(
        x=average(tokens.x) if by_size else map_.apply(tokens.x, how, weight=weight),
        valid=valid,
        size=new_size,
        position=_positions(tokens, map_, position, average, valid),
        source=follow(tokens.sources(), map_),
        bias=average(tokens.bias),
        policy=_policy(tokens, map_),
        extra={name: average(value) for name, value in tokens.extra.items()},
    )


def append(tokens: Tokens, rows: Float[Array, "*B M D"]) -> tuple[Tokens, Assign]:
    """`tokens` with M valid ones behind, which stand for no original: size 0, position -1, an open
    policy and 0 for all else. Returns them and the map. Gradient: to both."""
    n, m, batch = tokens.n, rows.shape[-2], tokens.batch
    own = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (*batch, n))

    def longer(a: Array, value: Any) -> Array:
        new = jnp.full((*batch, m, *a.shape[len(batch) + 1 :]), value, a.dtype)
        return jnp.concatenate([a, new], axis=len(batch))

    pad = lambda a, value: None if a is None else longer(a, value)  # noqa: E731
    valid = pad(tokens.valid, True)
    target = own if tokens.valid is None else jnp.where(tokens.valid, own, n + m)
    return tokens.replace(
        x=jnp.concatenate([tokens.x, rows.astype(tokens.x.dtype)], axis=-2),
        valid=valid,
        size=longer(tokens.sizes(), 0),
        position=None if tokens.position is None else longer(tokens.positions(), -1),
        source=tokens.sources(),
        bias=pad(tokens.bias, 0),
        policy=pad(tokens.policy, 1),
        extra={name: longer(a, 0) for name, a in tokens.extra.items()},
    ), Assign(target, n + m, valid=valid)


def _kept(tokens: Tokens, map_: Keep, x: Array) -> Tokens:
    per_token = (tokens.size, tokens.position, tokens.bias, tokens.policy, tokens.extra)
    size, position, bias, policy, extra = map_.apply(per_token)
    valid = map_.valid if tokens.valid is None else map_.apply(tokens.valid)
    if valid is not None and position is not None:
        position = jnp.where(valid[..., None], position, -1)
    source = follow(tokens.sources(), map_)
    return tokens.replace(
        x=x, valid=valid, size=size, position=position, source=source, bias=bias, policy=policy,
        extra=extra, ordered=tokens.ordered and map_.ordered,
    )  # fmt: skip


def _mean(map_: TokenMap, a: Array, size: Array, new_size: Array) -> Array:
    """The size-weighted mean: map_.apply(a, 'weighted', weight=size), the sizes summed once."""
    axis = size.ndim - 1
    total = map_.apply(a.astype(jnp.float32) * aligned(size, a.ndim, axis), "sum")
    mean = total / aligned(jnp.where(new_size == 0, 1.0, new_size), a.ndim, axis)
    return mean.astype(a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else mean


def _positions(tokens: Tokens, map_: TokenMap, rule: str, average: Any, valid: Any) -> Any:
    if rule not in ("mean", "keep"):
        raise ValueError(f"move: position={rule!r} must be 'mean' or 'keep'.")
    if tokens.position is None:
        return None
    new = map_.apply(tokens.position, "keep") if rule == "keep" else average(tokens.position)
    return new if valid is None else jnp.where(valid[..., None], new, -1)


def _policy(tokens: Tokens, map_: TokenMap) -> Any:
    if tokens.policy is None:
        return None
    if isinstance(map_, Mix):
        return map_.apply(tokens.policy, "mean")
    return map_.apply(tokens.policy, "max")
