"""What compiled programs let devices say to each other."""

import math
import re
from collections import Counter
from dataclasses import dataclass

import jax

from tokred.nn.skeleton import Weights

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One of the compiled text. shapes: of what comes out."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    place: str


def count_collectives(text: str) -> dict[str, int]:
    """How often each of `KINDS` stands in compiled HLO; kinds that are absent are left out.

    What stands in the body of a loop counts once.
    """
    counts = Counter(found.kind for found in find_collectives(text))
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def count_activation_gathers(text: str, weights: Weights, parts: int = 1) -> int:
    """All-gathers of which a result is as large as no parameter, whole or split into `parts`."""
    whole = [math.prod(x.shape) for x in jax.tree.leaves(weights)]
    sizes = {*whole, *(size // parts for size in whole)}
    gathers = [found for found in find_collectives(text) if found.kind == "all-gather"]
    return sum(any(math.prod(shape) not in sizes for shape in g.shapes) for g in gathers)


_HEAD = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_COLLECTIVE = re.compile(rf"\s+(?:ROOT )?%(\S+) = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)")
_SHAPE = re.compile(r"\b[a-z]+\d+\w*\[([\d,]*)\]")


def find_collectives(text: str) -> set[Collective]:
    """The collectives of compiled HLO, asynchronous ones once.

    TPUs write a reduce-scatter as an all-reduce within a computation 'all-reduce-scatter', and an
    asynchronous collective as parts in several fused computations that share its channel.
    """
    computation, found = "", set()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            computation = head[1]
        elif match := _COLLECTIVE.match(line):
            name, result, kind, start, rest = match.groups()
            shapes = [tuple(map(int, s.split(","))) if s else () for s in _SHAPE.findall(result)]
            shapes = (
                shapes[len(shapes) // 2 :] if start else shapes
            )  # a start gives its operands too
            channel = re.search(r"channel_id=\d+", rest)
            fused = re.match(r"async_collective|fused_computation", computation)
            place = channel[0] if fused and channel else name
            kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind
            found.add(Collective(kind, tuple(shapes), place))
    return found
