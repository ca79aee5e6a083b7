"""Batches from a random-access source: Grain for order, randomness, threads and checkpoints.

A source has `len` and `[index]` and holds raw examples; a transform turns one of them and a
Generator into numpy arrays: 'image' float32 [H, W, C], 'label' int32 [], perhaps 'mask' bool
[H, W]. Batches are dicts of these with a leading B, and of 'id' int32 [B], the examples' indices
in the source.

With several processes, process `shard` of `count` gets the rows [shard * L, (shard + 1) * L) of
every global batch, L = batch // count: the shards, concatenated, are the same global batch for
every number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator], Example]


@runtime_checkable
class Source(Protocol):
    """Random access to raw examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@runtime_checkable
class Batches(Iterator[Example], Protocol):
    """An iterator whose place can be stored, in memory or by grain.checkpoint."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any], /) -> None: ...


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch: int,
    seed: int,
    shard: int = 0,
    count: int = 1,
    num_threads: int = 1,
    prefetch: int = 2,
) -> Batches:
    """Endless shuffled batches of batch // count rows; every epoch has its own order and draws.

    batch: global batch size; batches run on across the ends of epochs, so that nothing is dropped.
    The state ('next_index', the number of global batches drawn) is the same in every process and
    fits any count; grain.checkpoint.CheckpointSave(iterator) stores it.
    num_threads: of the reader, 0 reads in the caller's thread. prefetch: batches held ready.
    Raises ValueError for numbers that do not fit each other or the source.
    """
    import grain

    _check(source, batch, seed, shard, count, num_threads, prefetch)
    _expect(batch <= len(source), "batch", f"at most the {len(source)} examples", batch)

    def draw(index: int, rng: np.random.Generator) -> Example:
        return {**transform(source[index], rng), "id": np.int32(index)}

    stream = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().random_map(draw)
    parts = stream.batch(batch // count, drop_remainder=True)[shard::count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(parts.to_iter_dataset(options))


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch: int,
    seed: int,
    shard: int = 0,
    count: int = 1,
    num_threads: int = 1,
    prefetch: int = 2,
) -> Iterable[Example]:
    """Every example once, in order, in ceil(len(source) / batch) batches of batch // count rows.

    Each has a bool 'valid' [B], false in the rows that only fill up the last global batch (they
    repeat the last example). What is drawn depends on seed and the example's index alone. Each
    `iter` of the result starts anew; arguments and errors as in train_batches.
    """
    import grain

    _check(source, batch, seed, shard, count, num_threads, prefetch)
    size = len(source)
    _expect(size >= 1, "source", "at least one example long", size)

    def draw(row: int) -> Example:
        index = min(row, size - 1)
        example = transform(source[index], np.random.default_rng((seed, index)))
        return {**example, "id": np.int32(index), "valid": np.bool_(row < size)}

    padded = -(-size // batch) * batch
    parts = grain.MapDataset.range(padded).map(draw).batch(batch // count)[shard::count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return parts.to_iter_dataset(options)


def _check(
    source: Source,
    batch: int,
    seed: int,
    shard: int,
    count: int,
    num_threads: int,
    prefetch: int,
) -> None:
    if not isinstance(source, Source):
        raise TypeError(
            f"source must have len and [index], got {type(source).__name__}: change source."
        )
    _expect(batch >= 1, "batch", "at least 1", batch)
    _expect(0 <= seed < 2**32, "seed", "in 0..2**32 - 1", seed)
    _expect(count >= 1, "count", "at least 1", count)
    _expect(0 <= shard < count, "shard", f"in 0..{count - 1}", shard)
    _expect(batch % count == 0, "batch", f"a multiple of count={count}", batch)
    _expect(num_threads >= 0, "num_threads", "at least 0", num_threads)
    _expect(prefetch >= num_threads, "prefetch", f"at least num_threads={num_threads}", prefetch)


def _expect(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {got!r}: change {name}.")
