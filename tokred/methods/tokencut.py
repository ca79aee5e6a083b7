"""TokenCut (Wang et al. 2022, arXiv 2202.11539): the normalised cut of a graph of similar keys
tells the image's main object from the rest; here it also says which tokens stay.

Official code: YangtaoWANG95/TokenCut (MIT), which finds objects with the last layer's keys of DINO
and removes no token; keeping the tokens deepest on the object's side is ours. `find_object` goes on
from the score as the code does: the connected part of that side around the seed, and its box. The
code solves the eigenproblem mostly in float64, we in float32.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Keep
from tokred.methods.registry import register
from tokred.methods.topk import stage_counts
from tokred.plan import Ask, Layout, Plan, Reduction, Site
from tokred.score import score_by_normalised_cut
from tokred.select import keep_top_k
from tokred.tokens import Tokens

KEYS = Ask("keys", heads="all")


class Found(NamedTuple):
    """An object: its cells [*B h w], the raster index of its seed [*B], its box [*B 4] in cells
    (top, left, bottom and right, the last two exclusive), and all connected parts of its side
    [*B h w], numbered from 1 in raster order, 0 outside."""

    mask: Array
    seed: Array
    box: Array
    parts: Array


def find_object(score: Float[Array, "*B P"], grid: tuple[int, int]) -> Found:
    """The connected cells of above-mean score around the one of largest magnitude.

    score: of `score_by_normalised_cut`, all tokens of the grid in raster order. Static: grid.
    """
    seed = jnp.argmax(jnp.abs(score), axis=-1)
    side = (score > score.mean(-1, keepdims=True)).reshape(*score.shape[:-1], *grid)
    parts = number_parts(side)
    flat = parts.reshape(score.shape)
    mask = flat == jnp.take_along_axis(flat, seed[..., None], axis=-1)
    mask = mask.reshape(side.shape) & side
    return Found(mask, seed, _box(mask), parts)


def number_parts(side: Bool[Array, "*B h w"]) -> Int[Array, "*B h w"]:
    """The parts of `side` that are connected through 4 neighbours, from 1 on in raster order of
    their first cells; 0 outside. Takes h w steps: each cell learns the first one of its part."""
    cells = side.shape[-2] * side.shape[-1]
    raster = jnp.arange(cells, dtype=jnp.int32).reshape((1,) * (side.ndim - 2) + side.shape[-2:])
    own = jnp.where(side, raster, cells)
    step = lambda _, first: jnp.where(side, _lowest_around(first, cells), cells)  # noqa: E731
    first = jax.lax.fori_loop(0, cells, step, own)
    line = (*side.shape[:-2], cells)
    number = jnp.cumsum((side & (first == raster)).reshape(line), axis=-1)
    of = jnp.take_along_axis(number, jnp.minimum(first, cells - 1).reshape(line), axis=-1)
    return jnp.where(side, of.reshape(side.shape), 0)


def _lowest_around(first: Int[Array, "*B h w"], most: int) -> Int[Array, "*B h w"]:
    """Of a cell and its four neighbours."""
    edges = [(0, 0)] * (first.ndim - 2) + [(1, 1), (1, 1)]
    around = jnp.pad(first, edges, constant_values=most)
    beside = (
        around[..., :-2, 1:-1], around[..., 2:, 1:-1], around[..., 1:-1, :-2],
        around[..., 1:-1, 2:],
    )  # fmt: skip
    return functools.reduce(jnp.minimum, beside, first)


def _box(mask: Bool[Array, "*B h w"]) -> Int[Array, "*B 4"]:
    rows, columns = mask.any(-1), mask.any(-2)
    first = lambda line: jnp.argmax(line, axis=-1)  # noqa: E731
    behind = lambda line: line.shape[-1] - jnp.argmax(line[..., ::-1], axis=-1)  # noqa: E731
    return jnp.stack([first(rows), first(columns), behind(rows), behind(columns)], axis=-1)


@dataclass(frozen=True)
class TokenCut(Reduction):
    """Keeps the `k` tokens deepest on the object's side of the normalised cut of this layer's keys,
    all heads side by side. tau, eps, weighted: of the graph, see `score_by_normalised_cut`."""

    k: int
    tau: float = 0.2
    eps: float = 1e-5
    weighted: bool = False
    asks: ClassVar[tuple[Ask, ...]] = (KEYS,)

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.k

    def macs(self, n: int, layout: Layout) -> int:
        return n * n * layout.width  # the eigenvectors, O(n^3), are no matrix product

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Keep:
        keys = evidence[KEYS.name]
        how = {"prefix": tokens.prefix, "valid": tokens.valid}
        scores = score_by_normalised_cut(
            keys.reshape(*keys.shape[:-2], -1),
            tau=self.tau,
            eps=self.eps,
            weighted=self.weighted,
            **how,
        )
        return keep_top_k(_without_noise(scores), self.k, **how)


def _without_noise(scores: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
    """Rounded to 1e-4 of the largest: tokens with the same neighbours have the same entry of the
    eigenvector up to the solver's noise, and equal ones shall keep their order."""
    largest = jnp.abs(scores).max(-1, keepdims=True)
    return jnp.round(1e4 * scores / jnp.where(largest > 0, largest, 1.0))


@register(
    "tokencut",
    family="prune",
    site="mid",
    paper="TokenCut 2022",
    golden=("vit/tokencut",),
)
def tokencut(
    layout: Layout,
    *,
    keep: float = 0.7,
    layers: Sequence[int] | None = None,
    tau: float = 0.2,
    eps: float = 1e-5,
    weighted: bool = False,
) -> Plan:
    """The tokens of the main object, by the normalised cut of similar keys, in stages.

    keep: ratio per stage. layers: where, default at a quarter, half, three quarters of the depth;
    each solves an eigenproblem of all tokens. Other options: see `TokenCut`.
    """
    steps = [
        (Site("mid", i), TokenCut(k, tau, eps, weighted))
        for i, k in stage_counts(layout, keep, layers)
    ]
    return Plan(tuple(steps), name="tokencut")
