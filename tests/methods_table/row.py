"""What a method declares of itself, from which every property is tested."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokred.plan import Layout, Reduction

Options = Mapping[str, Any]
# (place of each token in its sequence [B N], length of its prompt [B 1]) -> per-token arrays
Extra = Callable[[Any, Any], Mapping[str, Any]]

NO_TWIN = {
    "training_twin_learns": "it learns nothing",
    "soft_is_packed": "it has no soft twin",
}
CHANCE = {"permuted_batch_permutes_result": "draws belong to the place in the batch, by design"}
TRAINED_PACKED = {"packed_twin_does_not_learn": "it learns through the weights of what enters"}
LAST = {"keep": 0.4, "layers": (3,)}


@dataclass(frozen=True)
class Row:
    """What a method declares of itself on a model.

    easy, hard: options for the models 'odd' and 'even'. left: tokens after the last layer with
    `easy`, prefix included. one, but_one: options that leave one token, or let one enter, and all
    but one, of 'odd'. nothing: options that remove nothing. padding: the reduction for a grid,
    whose choice among the real tokens is the same when the grid has two padded rows more; by
    default what keep = 8 / patches gives. merges: no valid original gets lost. trains: the twin
    that learns. unused: the parameters (a regular expression) that get no gradient. exact: options
    with which the soft twin equals the packed one. decode: those for decoding, by default `easy`.
    bf16: bound on the difference of logits, in standard deviations. extra: per-token arrays that
    the method reads. exempt: reasons by the name of the check. slow: tested by hand, since another
    row tests the same code.
    """

    method: str
    left: int
    model: str = "vit"
    easy: Options = field(default_factory=dict)
    hard: Options = field(default_factory=dict)
    one: Options = field(default_factory=lambda: {"keep": 0.01})
    but_one: Options = field(default_factory=lambda: {"keep": 0.94, "layers": (1,)})
    nothing: Options = field(default_factory=lambda: {"keep": 1.0})
    padding: Callable[[Layout], Reduction] | None = None
    random: bool = False
    merges: bool = False
    learned: bool = False
    trains: str = "soft"
    unused: str = "^$"
    twins: str = "none"
    exact: Options | None = None
    decode: Options | None = None
    bf16: float = 0.1
    extra: Extra | None = None
    exempt: Mapping[str, str] = field(default_factory=lambda: NO_TWIN)
    slow: bool = False

    @property
    def name(self) -> str:
        return self.method if self.model == "vit" else f"{self.method}_{self.model}"
