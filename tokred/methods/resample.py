"""A resampler as a reduction: K queries take the place of an image's tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred import nested
from tokred.maps import Assign, Mix
from tokred.methods import routing
from tokred.methods.connecting import (
    require_grid,
    window_for,
    window_map,
    with_body,
)
from tokred.nn.chain import grown
from tokred.nn.regions import dividing_windows, region_matrix
from tokred.nn.resampler import Resampler
from tokred.nn.resampler_shape import ResamplerShape
from tokred.plan import Ask, Layout, Plan, Reduction, Site, require_module
from tokred.select import share_out
from tokred.tokens import Tokens, move

LEVEL = "level_{}"  # in Tokens.extra: what a layer gave out


@dataclass(frozen=True)
class Remember(Reduction):
    """Stores the features behind a layer as extra['level_{layer}'], which moves with the tokens."""

    layer: int

    def counts(self, n: int, prefix: int) -> int:
        return n

    def __call__(
        self, tokens: Tokens, evidence: Mapping[str, Array], state: Any = None, **how: Any
    ) -> tuple[Tokens, Any, Any, dict[str, Any]]:
        extra = {**tokens.extra, LEVEL.format(self.layer): tokens.x}
        return tokens.replace(extra=extra), None, state, {}


@dataclass(frozen=True)
class Resample(Reduction):
    """The tokens behind the prefix, a whole `grid` of them, become the results of K queries.

    levels: layers whose features (see `Remember`) are the keys, () for the tokens themselves.
    length: of learned queries the first so many are used; None for all. rule, choices: how lengths
    are drawn in training under the soft twin, for each example: all queries are computed, and those
    behind the drawn length are hidden. Without a rule, or without training, the soft twin hides
    those behind `length`. Both twins give the same to the queries that stay. Static: the length.

    The map shares every token out among the queries that look at it, by their weights. A text for
    the queries is asked for as 'text' [*B T].
    Gradient: to the tokens and the module; of a table of queries, to those that stay alone.
    """

    shape: ResamplerShape
    grid: tuple[int, int]
    levels: tuple[int, ...] = ()
    length: int | None = None
    rule: str | None = None
    choices: tuple[int, ...] = ()
    name: str = "resample"
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def __post_init__(self) -> None:
        count = self.shape.queries_of(self.grid)
        if self.length is not None and not 1 <= self.length <= count:
            raise ValueError(
                f"{self.name}: length={self.length} must lie in [1, {count}], its number of "
                "queries; change length."
            )
        if self.length is not None and self.shape.queries != "learned":
            raise ValueError(f"{self.name}: length is for learned queries alone; leave it out.")

    @property
    def asks(self) -> tuple[Ask, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return () if self.shape.text is None else (Ask("given", rows="text"),)

    @property
    def queries(self) -> int:
        """K of the packed twin."""
        return self.shape.queries_of(self.grid) if self.length is None else self.length

    def counts(self, n: int, prefix: int) -> int:
        require_grid(self.name, self.grid, n, prefix)
        return prefix + self.queries

    def slots(self, n: int, prefix: int, twin: str) -> int:
        require_grid(self.name, self.grid, n, prefix)
        return prefix + (self.shape.queries_of(self.grid) if twin == "soft" else self.queries)

    def idle(self, n: int, prefix: int) -> bool:
        return False

    def out_width(self, width: int) -> int:
        s = self.shape
        start = grown(s.source, width, s.width) if s.pooled else s.width
        return s.out_width or grown(s.query, start, s.width)

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> Resampler:
        return Resampler(self.shape, width, keys=self._keys_width(width), rngs=rngs)

    def macs(self, n: int, layout: Layout) -> int:
        keys = self._keys_width(layout.width)
        return self.shape.macs(layout.width, self.grid, self.queries, keys)

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
        p, soft = tokens.prefix, twin == "soft"
        require_grid(self.name, self.grid, tokens.n, p)
        body = jax.tree.map(lambda a: a[..., p:, :], (tokens.x, self._keys(tokens)))
        valid = None if tokens.valid is None else tokens.valid[..., p:]
        y, weights = require_module(self, module)(
            body[0],
            grid=self.grid,
            keys=body[1],
            text=evidence.get("given_text"),
            valid=valid,
            length=None if soft else self.length,
        )
        map_ = self._map(tokens, weights)
        moved = move(tokens.replace(extra=_without_levels(tokens)), map_)
        moved = with_body(self.name, moved, y)
        if not soft:
            return moved, map_, state, {}
        length = self._lengths(moved, key, train)
        return nested.hide_tail(moved, p + length), map_, state, {"length": length}

    def expected_count(self, n: Any, prefix: int, aux: Mapping[str, Any]) -> Any:
        return prefix + aux["length"].astype(jnp.float32).mean()

    def _keys_width(self, width: int) -> int:
        return width * max(1, len(self.levels))

    def _keys(self, tokens: Tokens) -> Array | None:
        if not self.levels:
            return None
        return jnp.concatenate([tokens.extra[LEVEL.format(i)] for i in self.levels], axis=-1)

    def _lengths(self, tokens: Tokens, key: Any, train: bool) -> Array:
        count = tokens.n - tokens.prefix
        if self.rule is None or not train:
            return jnp.full(tokens.batch, self.length or count, jnp.int32)
        if key is None:
            raise ValueError(f"{self.name}: rule={self.rule!r} draws lengths; pass Call(key=...).")
        how = {"values": self.choices} if self.choices else {}
        return nested.sample_length(key, count, self.rule, shape=tokens.batch, **how)

    def _map(self, tokens: Tokens, weights: Float[Array, "*B H K P"]) -> Assign | Mix:
        """For the books: where the original tokens went, and what they get back."""
        s, p = self.shape, tokens.prefix
        if s.region == "window":
            return window_map(tokens, self.grid, s.window)
        share = weights.mean(-3)
        if s.region == "matrix":
            side = round(s.count**0.5)
            bins = jnp.asarray(region_matrix(self.grid, (side, side), s.bins), jnp.float32)
            share = jnp.einsum("...kp,kpm->...km", share, bins)
        return share_out(
            share, prefix=p, valid=None if tokens.valid is None else tokens.valid[..., p:]
        )


def _without_levels(tokens: Tokens) -> dict[str, Any]:
    return {k: v for k, v in tokens.extra.items() if not k.startswith("level_")}


def connector(
    name: str, layout: Layout, shape: ResamplerShape, levels: tuple[int, ...] = (), **how: Any
) -> Plan:
    """The Plan of a resampler at the model's output, with what it needs of earlier layers."""
    reduction = Resample(shape, layout.grid, levels, name=name, **how)
    stores = tuple((Site("after", layer), Remember(layer)) for layer in levels)
    return Plan((*stores, (Site("output"), reduction)), name=name)


def levels_of(layout: Layout, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Layers at these shares of the depth, 1 the last; each once."""
    return tuple(sorted({max(0, round(share * layout.depth) - 1) for share in shares}))


def count_of(layout: Layout, keep: float) -> int:
    """How many queries are at most keep * tokens; one at least."""
    return max(1, routing.share_of(layout.patches, keep))


def side_of(layout: Layout, keep: float) -> int:
    """The side of the largest square of queries that is at most keep * tokens."""
    return math.isqrt(count_of(layout, keep))


def window_of(name: str, layout: Layout, keep: float) -> int:
    """The smallest window that divides the grid and leaves at most keep of the tokens."""
    return window_for(name, layout.grid, keep, dividing_windows(layout.grid))


def heads_of(width: int, heads: int | None) -> int:
    """As given, or one for every 128 channels."""
    return heads or max(1, width // 128)
