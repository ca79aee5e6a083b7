"""The one noun: a TokenMap turns N tokens into K, per example, by a mostly sparse linear map.

`Keep` chooses tokens, `Assign` sends each token to a group (or several), `Mix` is any matrix.
All three: `apply`, `restore`, `sizes`, `source`, `lift`, `dense`, and `compose(first, second)`.

Leading axes `*B` of a map align, as in numpy, with the axes of an array immediately before its
token axis; `lift` adds a leading axis of length 1. Nothing here has parameters or randomness.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokred.ops import gather, segment_max, segment_sum
from tokred.ops.gather import aligned

HOWS = ("keep", "sum", "mean", "weighted", "weighted_sum", "max")
Tree = TypeVar("Tree")
register = jax.tree_util.register_dataclass


class _Map:
    """What the three maps share; a subclass brings its fields, `_apply`, `_target` and `dense`."""

    batch: Any  # the leading axes *B
    n: Any
    k: Any
    valid: Any

    def _apply(self, x: Array, how: str, weight: Array | None, axis: int) -> Array:
        raise NotImplementedError

    def _target(self) -> Int[Array, "*B N"]:
        """The output that each token goes to; -1 = none."""
        raise NotImplementedError

    @property
    def source(self) -> Int[Array, "*B N"]:
        """Where each token is now; -1 = gone, also when its output is invalid."""
        where = self._target()
        if self.valid is None:
            return where
        lands = gather(self.valid, jnp.maximum(where, 0), axis=len(self.batch))
        return jnp.where(lands, where, -1)

    def apply(
        self,
        x: Tree,
        how: str | None = None,
        *,
        weight: Float[Array, "*B N"] | None = None,
        axis: int | None = None,
    ) -> Tree:
        """Every array of the pytree `x` moved along its token axis.

        how: 'keep' the chosen or representative row · 'sum' · 'mean' · 'weighted' mean by
        `weight` · 'weighted_sum' by `weight` · 'max'. Default: 'keep' for Keep, 'mean' else.
        axis: the token axis, by default the one after the map's own leading axes.
        Rows of invalid outputs are 0. Gradient: to x and weight.

        Raises:
          ValueError: unknown `how`, a missing or needless `weight`, another token count or axis.
        """
        how = how or ("keep" if isinstance(self, Keep) else "mean")
        if how not in HOWS:
            raise ValueError(f"TokenMap.apply: how={how!r} is unknown; choose one of {HOWS}.")
        if (weight is not None) != how.startswith("weighted"):
            verb = "needs" if weight is None else "takes no"
            raise ValueError(f"TokenMap.apply: how={how!r} {verb} weight=; change one of the two.")
        return jax.tree.map(lambda leaf: self._moved(leaf, how, weight, axis), x)

    def _moved(self, x: Array, how: str, weight: Array | None, axis: int | None) -> Array:
        axis = self._axis(x, axis, self.n)
        return self._masked(self._apply(x, how, weight, axis), axis)

    def _axis(self, x: Array, axis: int | None, count: int) -> int:
        """The token axis of `x`, from the front; it must hold `count` tokens."""
        lead = len(self.batch)
        axis = lead if axis is None else axis + x.ndim * (axis < 0)
        if not (lead <= axis < x.ndim and x.shape[axis] == count):
            raise ValueError(
                f"TokenMap: a map with leading axes {self.batch} and {count} tokens does not fit "
                f"token axis {axis} of the array {x.shape}; pass axis=, the token axis."
            )
        return axis

    def _masked(self, y: Array, axis: int) -> Array:
        if self.valid is None:
            return y
        return jnp.where(aligned(self.valid, y.ndim, axis), y, jnp.zeros_like(y))

    def restore(self, y: Array, fill: Any = 0, *, axis: int | None = None) -> Array:
        """[.. K ..] back to [.. N ..]: kept rows return, merged rows are copied to their members.

        fill: what a token gets that went nowhere: a number, or an array shaped like the result
        (Mixture-of-Depths is fill=x). Gradient: to y and fill.
        """
        axis = self._axis(y, axis, self.k)
        source = self.source
        back = gather(y, jnp.maximum(source, 0), axis=axis)
        return jnp.where(aligned(source, y.ndim, axis) >= 0, back, jnp.asarray(fill, y.dtype))

    def sizes(self, size: Float[Array, "*B N"] | None = None) -> Float[Array, "*B K"]:
        """How many tokens (or, given `size`, originals) each output stands for."""
        return self.apply(jnp.ones((*self.batch, self.n)) if size is None else size, "sum")

    def lift(self, axis: int = -1):
        """The same map with a leading axis of length 1 that will broadcast: at `axis` of the
        leading ones of the result, by default just before tokens."""
        where = axis % (len(self.batch) + 1)
        return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, where), self)


@functools.partial(register, data_fields=["index", "valid"], meta_fields=["n", "ordered"])
@dataclass(frozen=True)
class Keep(_Map):
    """Prune, drop, evict, sample, route: output k is token index[k].

    index: Int[*B K], distinct within a row wherever valid · valid: Bool[*B K] or None (all)
    · n: tokens in · ordered: valid ones stay in their order; both static.
    """

    index: Any
    n: int
    valid: Any = None
    ordered: bool = False

    @property
    def batch(self) -> tuple[int, ...]:
        return self.index.shape[:-1]

    @property
    def k(self) -> int:
        return self.index.shape[-1]

    def _target(self) -> Int[Array, "*B N"]:
        slots = jnp.broadcast_to(jnp.arange(self.k, dtype=jnp.int32), self.index.shape)
        index = self.index if self.valid is None else jnp.where(self.valid, self.index, self.n)
        return segment_sum(slots + 1, index, self.n, axis=len(self.batch)) - 1

    def _apply(self, x: Array, how: str, weight: Array | None, axis: int) -> Array:
        if weight is not None and how == "weighted_sum":
            x = _like(x.astype(jnp.float32) * aligned(weight, x.ndim, axis), x)
        return gather(x, self.index, axis=axis)

    def dense(self) -> Float[Array, "*B K N"]:
        """The matrix of 'sum': the reference for tests."""
        return self._masked(jax.nn.one_hot(self.index, self.n), len(self.batch))

    def masked(self) -> "Keep":
        """The same choice with every token in its own slot, valid where it was kept."""
        every = jnp.broadcast_to(jnp.arange(self.n, dtype=jnp.int32), (*self.batch, self.n))
        return Keep(every, self.n, self.source >= 0, ordered=True)

    def as_assign(self) -> "Assign":
        """The same map as groups of one."""
        gone = jnp.where(self.source < 0, self.k, self.source)
        return Assign(gone, self.k, index=self.index, valid=self.valid)


@functools.partial(
    register,
    data_fields=["target", "weight", "index", "valid", "joining"],
    meta_fields=["k", "several"],
)
@dataclass(frozen=True)
class Assign(_Map):
    """Merge, fuse, cluster, pool, window, chunk: token n goes to group target[n].

    target: Int[*B N], or [*B N J] for several groups; the value k means nobody
    · k: groups, static · weight: Float like target or None (ones), multiplies in every sum
    · index: Int[*B K] or None, the member that stands for its group under how='keep'
    · valid: Bool[*B K] or None · joining: Int[*B J] or None, all members that `index` does not
    name, each in one group: sums then copy those that it names, and add J rows instead of N.
    """

    target: Any
    k: int
    weight: Any = None
    index: Any = None
    valid: Any = None
    several: bool = False
    joining: Any = None

    @property
    def batch(self) -> tuple[int, ...]:
        return self.target.shape[: -2 if self.several else -1]

    @property
    def n(self) -> int:
        return self.target.shape[len(self.batch)]

    def _target(self) -> Int[Array, "*B N"]:
        target = self.target
        if self.several:
            weight = jnp.ones(target.shape) if self.weight is None else self.weight
            heaviest = jnp.argmax(jnp.where(target < self.k, weight, -jnp.inf), -1, keepdims=True)
            target = jnp.take_along_axis(target, heaviest, axis=-1)[..., 0]
        return jnp.where(target < self.k, target, -1).astype(jnp.int32)

    def _columns(self) -> list[tuple[Array, Array | None]]:
        if not self.several:
            return [(self.target, self.weight)]
        columns = lambda a: [a[..., j] for j in range(a.shape[-1])]  # noqa: E731
        targets = columns(self.target)
        weights = [None] * len(targets) if self.weight is None else columns(self.weight)
        return list(zip(targets, weights, strict=True))

    def _sum(self, x: Array, weight: Array | None, axis: int) -> Array:
        """Float32 sums over members of x · map weight · `weight`."""
        total = jnp.zeros((), jnp.float32)
        for target, own in self._columns():
            factors = [aligned(w, x.ndim, axis) for w in (own, weight) if w is not None]
            scaled = functools.reduce(jnp.multiply, factors, x.astype(jnp.float32))
            total = total + self._added(scaled, target, axis)
        return total

    def _added(self, x: Array, target: Array, axis: int) -> Array:
        if self.joining is None:
            return segment_sum(x, target, self.k, axis=axis)
        rows = gather(x, self.joining, axis=axis)
        into = gather(target, self.joining, axis=target.ndim - 1)
        return segment_sum(rows, into, self.k, axis=axis, onto=gather(x, self.index, axis=axis))

    def _apply(self, x: Array, how: str, weight: Array | None, axis: int) -> Array:
        if how == "keep":
            if self.index is None:
                raise ValueError("Assign.apply: how='keep' needs index=, one member of each group.")
            return gather(x, self.index, axis=axis)
        if how == "max":
            return self._max(x, axis)
        total = self._sum(x, weight, axis)
        if how in ("mean", "weighted"):
            ones = jnp.ones(x.shape[: axis + 1] + (1,) * (x.ndim - axis - 1), jnp.float32)
            mass = self._sum(ones, weight, axis)
            total = total / jnp.where(mass == 0, 1.0, mass)
        count = how == "sum" and self.weight is None and x.dtype != jnp.bool_
        return total.astype(x.dtype) if count else _like(total, x)

    def _max(self, x: Array, axis: int) -> Array:
        alive = [t if w is None else jnp.where(w > 0, t, self.k) for t, w in self._columns()]
        rows = jnp.concatenate([x] * len(alive), axis)
        return segment_max(rows, jnp.concatenate(alive, -1), self.k, axis=axis)

    def dense(self) -> Float[Array, "*B K N"]:
        """The matrix of 'sum': the reference for tests."""
        matrix = jnp.zeros((), jnp.float32)
        for target, own in self._columns():
            hot = jax.nn.one_hot(target, self.k)  # [*B N K]
            matrix = matrix + (hot if own is None else hot * own[..., None])
        return self._masked(jnp.swapaxes(matrix, -1, -2), len(self.batch))


@functools.partial(register, data_fields=["matrix", "valid", "back"], meta_fields=[])
@dataclass(frozen=True)
class Mix(_Map):
    """Slim, resample, query, soft cluster: y = matrix x.

    matrix: Float[*B K N] · valid: Bool[*B K] or None · back: Float[*B N K] or None, the map's
    own restore, never guessed.
    """

    matrix: Any
    valid: Any = None
    back: Any = None

    @property
    def batch(self) -> tuple[int, ...]:
        return self.matrix.shape[:-2]

    @property
    def n(self) -> int:
        return self.matrix.shape[-1]

    @property
    def k(self) -> int:
        return self.matrix.shape[-2]

    def _target(self) -> Int[Array, "*B N"]:
        matrix = self.dense()
        best = jnp.argmax(matrix, axis=-2).astype(jnp.int32)
        return jnp.where(matrix.max(-2) > 0, best, -1)

    def _apply(self, x: Array, how: str, weight: Array | None, axis: int) -> Array:
        if how in ("keep", "max"):
            raise ValueError(f"Mix.apply: how={how!r} has no meaning for a matrix; use 'sum'.")
        matrix = self.matrix if weight is None else self.matrix * weight[..., None, :]
        if how in ("mean", "weighted"):
            mass = matrix.sum(-1, keepdims=True)
            matrix = matrix / jnp.where(mass == 0, 1.0, mass)
        return _product(matrix, x, axis)

    def restore(self, y: Array, fill: Any = 0, *, axis: int | None = None) -> Array:
        """`back` y; `fill` is not used: a matrix leaves no token out. Raises ValueError without
        `back`."""
        if self.back is None:
            raise ValueError("Mix.restore: this map has no back= matrix; give it the one you mean.")
        return _product(self.back, y, self._axis(y, axis, self.k))

    def dense(self) -> Float[Array, "*B K N"]:
        """The matrix, rows of invalid outputs 0."""
        return self._masked(self.matrix, len(self.batch))


TokenMap = Keep | Assign | Mix


def _like(y: Array, x: Array) -> Array:
    """`y` in the type of `x`, but never rounded to integers."""
    return y.astype(x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32)


def _product(matrix: Array, x: Array, axis: int) -> Array:
    """matrix [*I K N] times x along `axis`, accumulated in float32."""
    lead, tail = axis - (matrix.ndim - 2), x.ndim - axis - 1
    rows = jnp.moveaxis(x, axis, -1)  # [*L *T N]
    shape = (1,) * lead + matrix.shape[:-2] + (1,) * tail + matrix.shape[-2:]
    matrix = matrix.reshape(shape)
    y = jnp.einsum("...kn,...n->...k", matrix, rows, preferred_element_type=jnp.float32)
    return _like(jnp.moveaxis(y, -1, axis), x)


def compose(first: TokenMap, second: TokenMap) -> TokenMap:
    """One map that does `first`, then `second`; exact for how='sum' (and 'keep' of Keeps).

    Shapes: first N -> M, second M -> K, both with the same leading axes.

    Raises:
      ValueError: `second` does not take as many tokens as `first` gives.
    """
    if first.k != second.n:
        raise ValueError(
            f"compose: the first map gives {first.k} tokens, the second takes {second.n}; "
            "compose maps in the order in which they acted."
        )
    if isinstance(first, Keep) and isinstance(second, Keep):
        valid = second.valid if first.valid is None else second.apply(first.valid)
        return Keep(gather(first.index, second.index, axis=len(first.batch)), first.n, valid)
    if isinstance(first, Mix) or isinstance(second, Mix):
        return Mix(_product(second.dense(), first.dense(), len(first.batch)), second.valid)
    both = [m.as_assign() if isinstance(m, Keep) else m for m in (first, second)]
    return _compose_assign(*both)


def _compose_assign(first: Assign, second: Assign) -> Assign:
    columns = itertools.product(first._columns(), second._columns())
    pairs = [_chain(*one, *two, first, second) for one, two in columns]
    index = None
    if first.index is not None and second.index is not None:
        index = gather(first.index, second.index, axis=len(first.batch))
    several = len(pairs) > 1
    target, weight = jax.tree.map(lambda *a: jnp.stack(a, -1), *pairs) if several else pairs[0]
    return Assign(target, second.k, weight, index, second.valid, several)


def _chain(t1: Array, w1: Any, t2: Array, w2: Any, first: Assign, second: Assign):
    """Targets and weights of one column of `first` followed by one of `second`."""
    via, alive = jnp.minimum(t1, first.k - 1), t1 < first.k
    through = functools.partial(gather, index=via, axis=len(first.batch))
    if first.valid is not None:
        alive &= through(first.valid)
    target = jnp.where(alive, through(t2), second.k)
    if w2 is None:
        return target, w1
    return target, through(w2) if w1 is None else w1 * through(w2)


def follow(source: Int[Array, "*B S"], map_: TokenMap) -> Int[Array, "*B S"]:
    """`source` after one more map: original -> where it is now, -1 = gone."""
    where = gather(map_.source, jnp.maximum(source, 0), axis=len(map_.batch))
    return jnp.where(source < 0, -1, where)
