"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): a batch blended with its reverse."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


@dataclass(frozen=True)
class Mixing:
    """Image i is mixed with image B - 1 - i, their targets alike; static and hashable.

    mixup, cutmix: alpha of the Beta(alpha, alpha) that lambda is drawn from, 0 switches that kind
    off. share: probability that a batch is mixed at all. switch: of CutMix, where both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    share: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        for field, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            _check(field, alpha, 0 <= alpha < float("inf"), "an alpha of at least 0, finite")
        for field, chance in (("mix_share", self.share), ("mix_switch", self.switch)):
            _check(field, chance, 0 <= chance <= 1, "a probability in [0, 1]")

    @property
    def active(self) -> bool:
        """Whether any batch is ever mixed."""
        return self.share > 0 and (self.mixup > 0 or self.cutmix > 0)

    def __call__(
        self, key: PRNGKeyArray, images: Float[Array, "B Y X C"], targets: Float[Array, "B K"]
    ) -> tuple[Float[Array, "B Y X C"], Float[Array, "B K"]]:
        """(images, targets) of the same dtypes; the inputs themselves where not `active`.

        One kind, one lambda and one box per batch, so the result depends on the whole batch and
        not on how it is split over devices. Blended in float32.
        """
        if not self.active:
            return images, targets
        own = self._own(key, images.shape[1], images.shape[2])
        return _blend(images, own[None, ..., None]), _blend(targets, own.mean())

    def _own(self, key: PRNGKeyArray, height: int, width: int) -> Float[Array, "Y X"]:
        """What each pixel keeps of its own image; the mean is what the target keeps."""
        mix, kind, draw, place = jax.random.split(key, 4)
        chance = self.switch if self.mixup > 0 and self.cutmix > 0 else self.cutmix > 0
        cut = jax.random.bernoulli(kind, float(chance))
        alpha = jnp.where(cut, jnp.float32(self.cutmix), jnp.float32(self.mixup))
        kept = jax.random.beta(draw, alpha, alpha, dtype=jnp.float32)
        own = jnp.where(cut, _outside_box(place, kept, height, width), kept)
        return jnp.where(jax.random.bernoulli(mix, float(self.share)), own, 1.0)


def _check(field: str, value: Any, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"config.loss.{field}={value!r} must be {wanted}; change it.")


def _outside_box(
    key: PRNGKeyArray, kept: Float[Array, ""], height: int, width: int
) -> Float[Array, "Y X"]:
    """0 in a box of (1 - kept) of the area, uniformly centred and cut off at the border; 1 else."""
    half = jnp.sqrt(1 - kept) / 2
    centre = jax.random.uniform(key, (2,), jnp.float32)
    rows, columns = ((jnp.arange(n, dtype=jnp.float32) + 0.5) / n for n in (height, width))
    inside = jnp.abs(rows - centre[0]) < half, jnp.abs(columns - centre[1]) < half
    return 1.0 - (inside[0][:, None] & inside[1][None, :])


def _blend(a: Array, own: Array) -> Array:
    partner = jnp.flip(a, axis=0)
    return (own * a.astype(jnp.float32) + (1 - own) * partner.astype(jnp.float32)).astype(a.dtype)
