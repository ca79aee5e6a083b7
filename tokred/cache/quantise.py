"""Cache entries in few bits: groups with one minimum and step, and codes packed into words."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokred.ops.gather import aligned

BITS = (1, 2, 4, 8)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"quantise: bits={bits} must be one of {BITS}; change bits.")


def bits_within(keep: float) -> int:
    """The most bits, 2 to 8, that are at most the share `keep` of 16. Raises ValueError for a share
    below an eighth."""
    fit = [bits for bits in BITS if 2 <= bits <= 16 * keep]
    if not fit:
        raise ValueError(f"keep={keep} of 16 bits is less than 2; raise keep to 0.125.")
    return fit[-1]


def mixed_bits(keep: float) -> tuple[int, int, float]:
    """(high, low, share): the share of entries in `high` bits, others in `low`, with which a mean
    entry has the share `keep` of 16 bits. Raises ValueError for a share outside (1/8, 1/2)."""
    wanted = 16 * keep
    if not 2 < wanted < 8:
        raise ValueError(f"keep={keep} of 16 bits must lie between 2 and 8 bits; change keep.")
    low = 2 if wanted <= 4 else 4
    return 2 * low, low, min((wanted - low) / low, 0.99)


def quantise_rows(
    x: Float[Array, "*B N"], bits: int
) -> tuple[Int[Array, "*B N"], Float[Array, "*B 1"], Float[Array, "*B 1"]]:
    """(codes, least, step): every row in 2^bits equal steps from its least to its greatest value.

    Rounds half to even. A constant row has step 0 and codes 0, so that it comes back exactly.
    Static: bits. Gradient: none. Raises ValueError for other bits than 1, 2, 4 or 8.
    """
    _check_bits(bits)
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    least, top = x.min(-1, keepdims=True), 2**bits - 1
    step = (x.max(-1, keepdims=True) - least) / top
    codes = jnp.round((x - least) / jnp.where(step > 0, step, 1.0))
    return jnp.clip(codes, 0, top).astype(jnp.int32), least, step


def dequantise_rows(codes: Array, least: Array, step: Array) -> Float[Array, "*B N"]:
    """The values that codes stand for."""
    return codes.astype(jnp.float32) * step + least


def pack(codes: Int[Array, "*B N"], bits: int, word: Any = jnp.uint8) -> Array:
    """As many codes in a word as fit, neighbours together, the first in the lowest bits; the last
    word is filled with zeros. Static: bits, word."""
    per = 8 * jnp.dtype(word).itemsize // bits
    more = -codes.shape[-1] % per
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, more)])
    kind = _unsigned(word)
    parts = codes.reshape(*codes.shape[:-1], -1, per).astype(kind)
    shift = _shifts(per, bits, kind, parts.ndim)
    return jax.lax.bitcast_convert_type((parts << shift).sum(-1, dtype=kind), word)


def unpack(packed: Array, bits: int, count: int) -> Int[Array, "*B N"]:
    """The first `count` (static) codes in words of `pack`."""
    per, kind = 8 * packed.dtype.itemsize // bits, _unsigned(packed.dtype)
    words = jax.lax.bitcast_convert_type(packed, kind)[..., None]
    shift = _shifts(per, bits, kind, words.ndim)
    codes = (words >> shift) & kind(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count].astype(jnp.int32)


def _shifts(per: int, bits: int, kind: Any, ndim: int) -> Array:
    """By how much each code of a word is shifted."""
    return aligned((jnp.arange(per) * bits).astype(kind), ndim, ndim - 1)


def _unsigned(word: Any) -> Any:
    return {1: jnp.uint8, 4: jnp.uint32}[jnp.dtype(word).itemsize]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "least", "step"],
    meta_fields=["bits", "axis", "group", "count", "kind"],
)
@dataclass(frozen=True)
class Quantised:
    """An array [*B T E] whose runs of `group` values along `axis` (-2 entries, -1 channels) share
    a least value and a step; `count` values along it.

    codes: packed along that axis · least, step: Float with 1 in the place of a group's values.
    """

    codes: Any
    least: Any
    step: Any
    bits: int
    axis: int
    group: int
    count: int
    kind: Any = jnp.float32

    @property
    def nbytes(self) -> int:
        """Bytes of codes, least values and steps."""
        return sum(a.size * a.dtype.itemsize for a in (self.codes, self.least, self.step))

    def values(self) -> Float[Array, "*B T E"]:
        """The array that is stood for, in its old type."""
        codes = unpack(jnp.moveaxis(self.codes, self.axis, -1), self.bits, self.count)
        shape = codes.shape
        grouped = codes.reshape(*shape[:-1], shape[-1] // self.group, self.group)
        x = dequantise_rows(grouped, self.least, self.step).reshape(shape)
        return jnp.moveaxis(x, -1, self.axis).astype(self.kind)


def quantise(
    x: Float[Array, "*B T E"], bits: int, *, axis: int, group: int, word: Any = jnp.uint8
) -> Quantised:
    """KIVI (Liu et al. 2024): keys by channel in groups of entries (axis=-2), values by entry in
    groups of channels (axis=-1).

    Static: all but x. Raises ValueError where groups do not fit. Source: jy-yuan/KIVI.
    """
    rows = jnp.moveaxis(x, axis, -1)
    n = rows.shape[-1]
    if n % group:
        raise ValueError(
            f"quantise: {n} values along axis {axis} are no groups of {group}; change group."
        )
    codes, least, step = quantise_rows(rows.reshape(*rows.shape[:-1], n // group, group), bits)
    packed = jnp.moveaxis(pack(codes.reshape(rows.shape), bits, word), -1, axis)
    return Quantised(packed, least, step, bits, axis, group, n, x.dtype)


def channel_scale(x: Float[Array, "*B T E"]) -> Float[Array, "*B 1 E"]:
    """The root of each channel's greatest absolute value (ZipCache; He et al. 2024)."""
    scale = jnp.sqrt(jnp.abs(x.astype(jnp.float32)).max(-2, keepdims=True))
    return jnp.where(scale > 0, scale, 1.0)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "scale"], meta_fields=["heads"]
)
@dataclass(frozen=True)
class Scaled:
    """Entries of all heads [*B G T E] as rows [*B T G E] over a scale of each channel."""

    rows: Quantised
    scale: Any
    heads: int

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return self.rows.nbytes + self.scale.size * self.scale.dtype.itemsize

    def values(self) -> Float[Array, "*B G T E"]:
        """The array that is stood for."""
        return _split_heads(self.rows.values() * self.scale, self.heads)


def quantise_scaled(
    x: Float[Array, "*B G T E"], bits: int, scale: Float[Array, "*B 1 C"] | None = None
) -> Scaled:
    """ZipCache's values: one least value and step for an entry of all heads, channels brought to
    one size before. scale: of `channel_scale` over more entries than these; C = G E.

    The official code takes the scale over the whole batch, this over each example. Static: bits.
    Source: ThisisBillhe/ZipCache.
    """
    rows = join_heads(x)
    scale = channel_scale(rows) if scale is None else scale
    stored = quantise(rows / scale, bits, axis=-1, group=rows.shape[-1])
    return Scaled(stored, scale, x.shape[-3])


def join_heads(x: Float[Array, "*B G T E"]) -> Float[Array, "*B T C"]:
    """C = G E channels of every entry."""
    rows = jnp.moveaxis(x, -3, -2)
    return rows.reshape(*rows.shape[:-2], -1)


def _split_heads(rows: Float[Array, "*B T C"], heads: int) -> Float[Array, "*B G T E"]:
    return jnp.moveaxis(rows.reshape(*rows.shape[:-1], heads, -1), -2, -3)
