"""Sentences as vectors: which pairs are alike, with all tokens and with fewer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from tokred.cost import macs
from tokred.fidelity.agreement import cosine, pair_cosines, rank_correlation
from tokred.fidelity.choose import Candidate, at_macs, candidates, choose_methods
from tokred.fidelity.times import side_by_side
from tokred.models import TextEncoder, TextEncoderConfig
from tokred.plan import Plan
from tokred.report import Call

Row = dict[str, Any]
BASELINES = ("random", "uniform", "pooling")
FIELDS = ("spearman", "cosine", "macs_ratio", "ms", "ms_low", "ms_high", "ms_ratio")


def compare_sentences(
    model: TextEncoder,
    ids: Int[np.ndarray, "B N"],
    methods: Sequence[str],
    budgets: Sequence[float],
    *,
    rounds: int = 5,
) -> list[Row]:
    """One row per method and budget, the dense model first.

    ids: sentences of equal length, so that nothing is saved on padding. budgets: shares of the MACs
    at that length. Row: method, budget, why (it is out of reach, the rest is None then), spearman
    (rank correlation of the cosines of all pairs with the dense ones), cosine (of each vector with
    the dense one), macs_ratio, ms (of one sentence), ms_low, ms_high, ms_ratio.

    Raises:
      ValueError: methods or budgets that do not fit.
    """
    config = of_length(model.config, ids.shape[1])
    names = choose_methods(model, methods, BASELINES)
    found = candidates(lambda name, b: at_macs(config, name, b), names, budgets)
    measured = side_by_side(model, found, read, ids, _agree, rounds)
    return [_row(config, c) | measured.get(c, {}) for c in found]


def of_length(config: TextEncoderConfig, tokens: int) -> TextEncoderConfig:
    """The same for sentences of so many tokens: for plans and their costs."""
    trunk = dataclasses.replace(config.trunk, context=tokens)
    return dataclasses.replace(config, trunk=trunk)


def read(model: TextEncoder, ids: Array, *, plan: Plan, call: Call) -> Float[Array, "B D"]:
    """One vector each."""
    return model(ids, plan=plan, call=call)[0]


def _agree(seen: np.ndarray, dense: np.ndarray) -> Row:
    ranks = rank_correlation(pair_cosines(seen), pair_cosines(dense))
    return {"spearman": ranks, "cosine": cosine(seen, dense)}


def _row(config: TextEncoderConfig, found: Candidate) -> Row:
    row = {**found.about, **dict.fromkeys(FIELDS)}
    if found.plan is None:
        return row
    return row | {"macs_ratio": macs(config, found.plan) / macs(config)}
