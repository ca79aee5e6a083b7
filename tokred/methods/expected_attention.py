"""ExpectedAttention (Devoto et al. 2025): what queries to come will look at.

Official code: NVIDIA/kvpress (Apache-2.0).
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tokred.cache import Eviction, Look, expect_queries, query_statistics, score_by_expectation
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Site
from tokred.rotary import rotate_by


@dataclass(frozen=True)
class ExpectedAttention(Eviction):
    """Entries by the attention that Gaussian queries with the prompt's mean and covariance would
    give from the next `future` positions, times the value's norm; the sinks stay. It asks for no
    window at the end of the prompt. With `spare` the last `asked` queries stand for the prompt's
    while decoding, as in kvpress's decoding wrapper."""

    spare: int | None = None
    sinks: int = 4
    future: int = 512
    covariance: bool = True
    norms: bool = True
    asked: int = 256

    @property
    def recalled(self) -> int:
        return self.asked

    def score(self, cache: Any, look: Look) -> Array:
        if look.rates is None:
            raise ValueError(
                "expected_attention: this model has no rotary positions; choose another eviction."
            )
        plain = rotate_by(look.q, -look.position[..., None], look.rates)
        free = (look.position >= self.sinks).astype(jnp.float32)
        mean, spread = query_statistics(plain, free)
        mean, spread = expect_queries(mean, spread, look.newest + 1, look.rates, future=self.future)
        alone = lambda x: x.reshape(*cache.k.shape[:2], -1, *x.shape[2:])  # noqa: E731
        return score_by_expectation(  # every key head for itself
            cache.k[:, :, None],
            cache.v[:, :, None],
            alone(mean),
            alone(spread) if self.covariance else None,
            protected=cache.position < self.sinks,
            valid=cache.valid,
            norms=self.norms,
        )[:, :, 0]


@register(
    "expected_attention",
    family="evict",
    site="cache",
    paper="ExpectedAttention 2025",
    golden=("kv/expected_attention",),
)
def expected_attention(
    layout: Layout,
    *,
    keep: float = 0.2,
    budget: int | None = None,
    sinks: int = 4,
    future: int = 512,
    covariance: bool = True,
    norms: bool = True,
    spare: int | None = None,
    asked: int = 256,
    positions: str = "keep",
) -> Plan:
    """Cache entries that future queries are expected to look at stay.

    keep: share of a prompt's entries; budget: their number instead. spare, positions: see
    `Eviction`; other options: see `ExpectedAttention`.
    """
    how = ExpectedAttention(
        budget or keep, spare, sinks, positions=positions,
        future=future, covariance=covariance, norms=norms, asked=asked,
    )  # fmt: skip
    return Plan(((Site("cache"), how),), name="expected_attention")
