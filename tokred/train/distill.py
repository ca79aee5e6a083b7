"""Knowledge distillation: a student's logits and final tokens against a teacher's."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokred.ops import segment_sum
from tokred.tokens import Tokens


def match_logits(
    student: Float[Array, "B K"], teacher: Float[Array, "B K"], *, temperature: float = 1.0
) -> Float[Array, ""]:
    """temperature^2 * KL(teacher || student) of softened classes, mean over the batch, float32.

    Gradient: to the student only.

    Raises:
      ValueError: other classes than the teacher's, or a temperature that is not positive.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"config.distill.logits: the teacher's logits {teacher.shape} must have the shape of "
            f"the student's {student.shape}; name a teacher of the same classes."
        )
    if not temperature > 0:
        raise ValueError(f"config.distill.temperature={temperature} must be positive; change it.")
    wanted = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    given = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return temperature**2 * (jnp.exp(wanted) * (wanted - given)).sum(-1).mean()


def match_features(student: Tokens, teacher: Float[Array, "*B S D"]) -> Float[Array, ""]:
    """Mean squared error of the student's final tokens [*B N D] to the teacher's, float32.

    A token is compared with the mean of the teacher's features over the originals that it stands
    for (`Tokens.sources`), be it kept, merged or pooled. The mean is over D and over all tokens of
    the batch that are valid, stand for an original and have a policy of at least 0.5 if any; 0 if
    none is left. As in DynamicViT's own loss, prefix tokens (class token, registers) do not count.
    Gradient: to the student's features only.

    Raises:
      ValueError: the teacher has another width or other patches.
    """
    source, axis = student.sources(), len(student.batch)
    wanted = (*source.shape, student.x.shape[-1])
    if teacher.shape != wanted:
        raise ValueError(
            f"config.distill.features needs a teacher of the same width and the same patches, "
            f"features {wanted}, but got {teacher.shape}; name such a teacher or set it to 0."
        )
    target = jnp.where(source < 0, student.n, source)  # n: nobody
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    total = segment_sum(teacher, target, student.n, axis=axis)
    members = segment_sum(jnp.ones(source.shape, jnp.float32), target, student.n, axis=axis)
    counts = _counts(student, members)
    gap = student.x.astype(jnp.float32) - total / jnp.maximum(members, 1)[..., None]
    error = jnp.square(jnp.where(counts[..., None], gap, 0.0)).mean(-1)
    return error.sum() / jnp.maximum(counts.sum(), 1)


def match_layers(
    student: Sequence[Float[Array, "*B N D"]], teacher: Sequence[Float[Array, "*B N D"]]
) -> Float[Array, ""]:
    """Mean squared error of the student's tokens to the teacher's, layer by layer, float32: SiT's
    distillation of what its reversing modules recover. Gradient: to the student only.

    Raises:
      ValueError: another number of layers, or tokens of another shape.
    """
    ours, theirs = ([layer.shape for layer in side] for side in (student, teacher))
    if ours != theirs or not ours:
        raise ValueError(
            f"match_layers: the teacher's layers {theirs} must have the shapes of the student's "
            f"{ours}; name the same layers of both."
        )
    error = lambda a, b: jnp.square(  # noqa: E731
        a.astype(jnp.float32) - jax.lax.stop_gradient(b).astype(jnp.float32)
    ).mean()
    return jnp.stack([error(a, b) for a, b in zip(student, teacher, strict=True)]).mean()


def _counts(student: Tokens, members: Float[Array, "*B N"]) -> Array:
    """Bool[*B N]: the tokens that are compared."""
    counts = (members > 0).at[..., : student.prefix].set(False)
    if student.valid is not None:
        counts &= student.valid
    if student.policy is not None:
        counts &= student.policy >= 0.5
    return counts
