"""How learners are distilled from a pretrained layer and gates pre-trained (Wojcik et al. 2023).

Pure functions of one layer; what the layer saw and gave is the caller's. Released recipe:
1. `distill_loss` of `Learners.all` to the layer's output, learners alone, Adam 1e-3, 2 epochs;
2. `gate_loss` of `count_labels`, gates alone, Adam 1e-2, 1 epoch;
3. all of it under `make_plan('acm', ...)` with twin='soft', Adam 1e-4, 97 epochs.
Official code: bartwojcik/adaptive_computation_modules (MIT).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LABELS = ("official", "correct")


def distill_loss(
    outputs: Float[Array, "*B N k D"], target: Float[Array, "*B N D"]
) -> Float[Array, ""]:
    """Mean squared error, float32, of the outputs of all counts to the layer's own.

    With `Learners.all(x, own_gradient=True)`, as released, each learner fits what those before it
    left over. Gradient: to outputs only.
    """
    return jnp.square(_gap(outputs, target)).mean()


def count_errors(
    outputs: Float[Array, "*B N k D"], target: Float[Array, "*B N D"]
) -> Float[Array, "*B N k"]:
    """Euclidean distance to the layer's output per count, float32."""
    return jnp.linalg.norm(_gap(outputs, target), axis=-1)


def _gap(outputs: Array, target: Array) -> Array:
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    return outputs.astype(jnp.float32) - target[..., None, :]


def count_labels(
    errors: Float[Array, "*B N k"], *, factor: float = 1.2, rule: str = "official"
) -> Int[Array, "*B N"]:
    """The count from which one more learner does not help: 1 + the first c with
    error_c < factor * error_{c+1}, or the largest count where there is none.

    rule: 'official' takes c = 0 for none, so that tokens which the first learner does not help get
    the largest count; 'correct' gives them count 1. Neither labels a token 0.

    Raises:
      ValueError: an unknown rule.
    """
    if rule not in LABELS:
        raise ValueError(f"count_labels: rule={rule!r} must be one of {LABELS}; change rule.")
    flat = errors[..., :-1] < factor * errors[..., 1:]
    first = jnp.argmax(flat, axis=-1)
    none = first == 0 if rule == "official" else ~flat.any(-1)
    return jnp.where(none, errors.shape[-1] - 1, first + 1)


def gate_loss(logits: Float[Array, "*B N k"], labels: Int[Array, "*B N"]) -> Float[Array, ""]:
    """Mean negative log-likelihood of the labels. Gradient: to logits.

    Without the noise of the released script, which takes the logarithm of hard samples.
    """
    chance = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(chance, labels[..., None], axis=-1).mean()
