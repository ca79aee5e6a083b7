"""How many, where, when: schedules as Python ints over layers and training steps."""

import math
from collections.abc import Callable, Sequence


def stage_layers(depth: int) -> tuple[int, ...]:
    """A quarter, half and three quarters of the depth: 3, 6, 9 of 12."""
    return tuple(sorted({max(1, depth * i // 4) for i in (1, 2, 3)} & set(range(depth))))


def round_up(count: int, round_to: int = 1) -> int:
    """The next multiple of a hardware tile edge."""
    return -(-count // round_to) * round_to


def constant(n: int, keep: float, layers: Sequence[int]) -> tuple[int, ...]:
    """keep * n at every layer."""
    return tuple(max(1, int(keep * n)) for _ in layers)


def stages(n: int, keep: float, layers: Sequence[int]) -> tuple[int, ...]:
    """int(n * keep^(i+1)) at the i-th layer: the field's usual three-stage pruning."""
    return tuple(max(1, int(n * keep ** (i + 1))) for i in range(len(layers)))


def linear(n: int, keep: float, layers: Sequence[int]) -> tuple[int, ...]:
    """Equal removals, from n to keep * n after the last layer."""
    steps = len(layers)
    return tuple(max(1, round(n * (1 - (1 - keep) * (i + 1) / steps))) for i in range(steps))


def geometric(n: int, keep: float, layers: Sequence[int]) -> tuple[int, ...]:
    """The same share leaves at every layer, from n to keep * n after the last one."""
    steps = len(layers)
    return tuple(max(1, round(n * keep ** ((i + 1) / steps))) for i in range(steps))


def cosine(n: int, keep: float, layers: Sequence[int]) -> tuple[int, ...]:
    """Half a cosine from n to keep * n after the last layer: slow, fast, slow."""
    wave = lambda t: keep + (1 - keep) * (math.cos(math.pi * t) + 1) / 2  # noqa: E731
    return tuple(max(1, round(n * wave((i + 1) / len(layers)))) for i in range(len(layers)))


def sigmoid(
    n: int, keep: float, layers: Sequence[int], *, steepness: float = 0.5
) -> tuple[int, ...]:
    """Kept ratios 1 / (1 + exp(steepness (i - midpoint))) whose mean over layers is `keep`."""
    count = len(layers)
    rates = lambda a: [1 / (1 + math.exp(steepness * (i - a))) for i in range(count)]  # noqa: E731
    low, high = -100.0, 100.0 + count
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(rates(middle)) / count < keep else (low, middle)
    return tuple(max(1, round(n * rate)) for rate in rates(high))


SCHEDULES: dict[str, Callable[..., tuple[int, ...]]] = {
    "constant": constant,
    "stages": stages,
    "linear": linear,
    "geometric": geometric,
    "cosine": cosine,
    "sigmoid": sigmoid,
}


def ramp(depth: int, r: int | Sequence[int] | tuple[int, float]) -> tuple[int, ...]:
    """ToMe's little language: an int for every layer, a list padded with 0, or (r, inflection).

    inflection -1 removes most in the first layers, 1 in the last, 0 is constant.
    Source: facebookresearch/ToMe `parse_r`. Raises ValueError for a list longer than the model.
    """
    inflection = 0.0
    if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
        r, inflection = int(r[0]), r[1]
    elif not isinstance(r, int):
        if len(r) > depth:
            raise ValueError(
                f"r has {len(r)} entries for a model of {depth} layers; shorten the schedule."
            )
        return (*map(int, r), *([0] * (depth - len(r))))
    low = int(r * (1.0 - inflection))
    step = (2 * r - 2 * low) / (depth - 1) if depth > 1 else 0.0
    return tuple(int(low + step * i) for i in range(depth))


def warm_keep_rate(
    iteration: int,
    epoch: int,
    *,
    warm: int,
    total: int,
    per_epoch: int,
    base: float,
    top: float = 1.0,
) -> float:
    """EViT's keep rate in training: 1 for `warm` epochs, half a cosine from `top` to `base` until
    epoch `total`, then `base`. Source: youweiliang/evit `adjust_keep_rate`.
    """
    if epoch < warm:
        return 1.0
    if epoch >= total:
        return base
    span = per_epoch * (total - warm)
    done = iteration - per_epoch * warm
    return base + (top - base) * (math.cos(math.pi * done / span) + 1) / 2


DECAYS = ("cosine", "linear", "interleave")


def shifted_decay(depth: int, average: float, kind: str = "cosine") -> tuple[float, ...]:
    """From average + 1/2 in the first layer to average - 1/2 in the last, for p-MoD.

    kind: 'cosine' half a cosine · 'linear' · 'interleave' as 'cosine'.
    Source: MCG-NJU/p-MoD, whose divisor 31 is here the number of layers less one.
    """
    check_decay(kind)
    place = [layer / max(depth - 1, 1) for layer in range(depth)]
    if kind == "linear":
        return tuple(0.5 - t + average for t in place)
    return tuple(math.cos(math.pi * t) / 2 + average for t in place)


def decaying_ratios(
    depth: int,
    average: float,
    *,
    kind: str = "cosine",
    highest: float = 0.85,
    lowest: float = 0.15,
) -> tuple[float, ...]:
    """p-MoD's progressive ratio decay: the share of vision tokens that enter each layer.

    A layer above `highest` is dense (1.0), none falls below `lowest`; kind='interleave' gives
    every second layer the share `average` instead. An average of 1 is dense throughout.
    """
    check_decay(kind)
    if average >= 1:
        return (1.0,) * depth
    if kind == "interleave":
        return tuple(average if layer % 2 else 1.0 for layer in range(depth))
    decay = shifted_decay(depth, average, kind)
    return tuple(1.0 if raw > highest else max(raw, lowest) for raw in decay)


def check_decay(kind: str) -> None:
    """Raises ValueError for a kind of decay that does not exist."""
    if kind not in DECAYS:
        raise ValueError(f"schedule: kind={kind!r} must be one of {DECAYS}; change kind.")
