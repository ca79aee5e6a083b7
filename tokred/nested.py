"""Nested tokens: an order and a length. Of tokens in their order the first `length` count, and the
tail is cut off (`keep_first`), hidden (`hide_tail`) or replaced by a mask token (`replace_tail`).
What the first ones hold is the same in all three.

The first `prefix` tokens, by default none, are not of the nested set: they stay, and no length
counts them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokred.maps import Assign, Keep
from tokred.ops.gather import aligned
from tokred.select import keep_static
from tokred.tokens import Tokens, move


def _round_to_power(count: np.ndarray) -> np.ndarray:
    """Up to the next power of two."""
    return 1 << np.ceil(np.log2(count)).astype(int)


_LENGTHS: Mapping[str, Callable[[int], np.ndarray]] = {
    "uniform": lambda n: np.arange(1, n + 1),
    "even": lambda n: np.arange(2, n + 1, 2),
    "pow2": lambda n: 1 << np.arange(n.bit_length()),
    "uniform_pow2": lambda n: np.minimum(_round_to_power(np.arange(1, n + 1)), n),
}
RULES = (*_LENGTHS, "choices")
HOWS = ("nested", "average")


def lengths_of(
    maximum: int, rule: str = "uniform", values: Sequence[int] | None = None
) -> Int[np.ndarray, " V"]:
    """The lengths that a rule draws from, all equally likely; one may be there several times.

    rule: 'uniform' 1, 2, ..., maximum · 'even' 2, 4, ... · 'pow2' the powers of two up to maximum
    · 'uniform_pow2' uniform, then rounded up to a power of two, so that half of the mass lies on
    the largest; it is clipped to maximum where that is no power of two · 'choices' `values`.

    Raises:
      ValueError: an unknown rule, a maximum without such a length, or values that are none.
    """
    if rule not in RULES:
        raise ValueError(f"nested: rule={rule!r} must be one of {RULES}; change rule.")
    if (values is not None) != (rule == "choices"):
        verb = "needs" if values is None else "takes no"
        raise ValueError(f"nested: rule={rule!r} {verb} values=; change one of the two.")
    lengths = np.asarray(_LENGTHS[rule](maximum) if values is None else values)
    whole = lengths.size and lengths.dtype.kind == "i"
    if not (whole and lengths.min() >= 1 and lengths.max() <= maximum):
        raise ValueError(
            f"nested: rule={rule!r} draws from {tuple(lengths.tolist())}, which must be integers "
            f"in [1, {maximum}]; change values or raise maximum."
        )
    return lengths.astype(np.int32)


def sample_length(
    key: PRNGKeyArray,
    maximum: int,
    rule: str = "uniform",
    *,
    shape: tuple[int, ...] = (),
    values: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Int[Array, "*shape"]:
    """Lengths in [1, maximum] by a rule of `lengths_of`.

    shape: () one for all examples, (B,) one for each. weights: chances of the entries of
    `lengths_of`, which need not sum to 1; None for equal ones. The same key gives the same lengths
    on every host, so that a step may be compiled for int(sample_length(key, ...)). Static: all but
    key.

    Raises:
      ValueError: what `lengths_of` raises, or weights that do not fit it.
    """
    lengths = lengths_of(maximum, rule, values)
    chances = None if weights is None else _chances(weights, lengths)
    return jax.random.choice(key, jnp.asarray(lengths), shape, p=chances)


def _chances(weights: Sequence[float], lengths: np.ndarray) -> Array:
    chances = np.asarray(weights, np.float32)
    if chances.shape != lengths.shape or (chances < 0).any() or not chances.any():
        raise ValueError(
            f"nested: weights={tuple(weights)} must be {len(lengths)} numbers from 0 on, not "
            "all 0, one for each length; change weights."
        )
    return jnp.asarray(chances)


def round_up_to(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length` tokens: compile for it and hide the rest.

    Raises:
      ValueError: no bucket is as large.
    """
    fitting = [size for size in buckets if size >= length]
    if not fitting:
        raise ValueError(
            f"round_up_to: length={length} exceeds all buckets={tuple(buckets)}; add a larger one."
        )
    return min(fitting)


def keep_first(
    n: int,
    k: int,
    batch: tuple[int, ...],
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Keep:
    """The prefix and the first `k` of the other tokens: the tail is cut off. Static: all counts.

    Raises:
      ValueError: more tokens than there are, or none.
    """
    if not 1 <= k <= n - prefix:
        raise ValueError(
            f"keep_first: k={k} must lie in [1, {n - prefix}], of {n} tokens with prefix={prefix}; "
            "change k."
        )
    map_ = keep_static(range(prefix + k), n, batch)
    return map_ if valid is None else dataclasses.replace(map_, valid=valid[..., : prefix + k])


def keep_within(
    length: Int[Array, "*B"],
    n: int,
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Keep:
    """`keep_first` with every token in its own slot, valid within the `length` of its example."""
    inside = _inside(length, n, prefix)
    every = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), inside.shape)
    return Keep(every, n, inside if valid is None else inside & valid)


def _inside(length: Int[Array, "*B"], n: int, prefix: int) -> Bool[Array, "*B N"]:
    slot = aligned(jnp.arange(n), length.ndim + 1, length.ndim)
    return slot < prefix + length[..., None]


def hide_tail(tokens: Tokens, length: Int[Array, "*#B"] | int, *, prefix: int = 0) -> Tokens:
    """`tokens` in their slots, invalid from `length` behind the prefix on."""
    length = jnp.broadcast_to(length, tokens.batch)
    return move(tokens, keep_within(length, tokens.n, prefix=prefix, valid=tokens.valid))


def replace_tail(
    x: Float[Array, "*B N D"],
    length: Int[Array, "*#B"] | int,
    mask_token: Float[Array, " D"],
    *,
    prefix: int = 0,
) -> Float[Array, "*B N D"]:
    """Features with `mask_token` from `length` behind the prefix on.

    Gradient: to the features that stay, and to mask_token.
    """
    inside = _inside(jnp.broadcast_to(length, x.shape[:-2]), x.shape[-2], prefix)
    return jnp.where(inside[..., None], x, aligned(mask_token.astype(x.dtype), x.ndim, x.ndim - 1))


def registers_of(table: Float[Array, "N D"], k: int, how: str = "nested") -> Float[Array, "{k} D"]:
    """`k` tokens from a table of N: its first ones, or averages of near-equal stretches.

    how: 'nested' | 'average': stretch i is rows floor(i N / k) to ceil((i + 1) N / k), as in
    torch's adaptive average pooling; neighbours may share a row. Static: k. Gradient: to table.

    Raises:
      ValueError: an unknown way, more tokens than rows, or none.
    """
    n = table.shape[0]
    if how not in HOWS:
        raise ValueError(f"registers_of: how={how!r} must be one of {HOWS}; change how.")
    if not 1 <= k <= n:
        raise ValueError(f"registers_of: k={k} must lie in [1, {n}], the rows; change k.")
    if how == "nested":
        return table[:k]
    row = np.arange(n)
    first, last = row * k // n, -(-(row + 1) * k // n) - 1
    target = jnp.asarray(np.stack([first, np.where(last > first, last, k)], -1), jnp.int32)
    return Assign(target, k, several=True).apply(table, "mean")
