"""Adapters of methods that cut a sequence or let tokens halt: KARL, H-Net, BLT."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden_adapters.case import Adapter, Case, Output
from tests.golden_adapters.weights import fill
from tokred import boundary
from tokred.gates import Boundary, Halting, one_through
from tokred.methods.blt import ends_by_entropy, ends_by_rank, ends_by_space, entropies
from tokred.methods.hnet import CLIP, Dechunk
from tokred.methods.karl import bin_up, blocked_pairs
from tokred.nn.routers import BoundaryRouter, HaltingHead

HEAD = {"halt.0": "fc1", "halt.2": "fc2", "ln_halt": "norm"}
LENGTHS = (2.0, 2.5, 6.0)  # of chunks, in the name of the loss
SPECIAL = 4  # ids before the bytes


def head_of(case: Case, names: dict[str, str]) -> HaltingHead:
    """The halting head; names: official ones and ours."""
    weights = {
        f"{ours}.{part}": case.params[f"{name}.{part}"]
        for name, ours in names.items()
        for part in ("weight", "bias")
    }
    hidden, width = weights["fc1.weight"].shape
    return fill(lambda: HaltingHead(width, hidden, rngs=nnx.Rngs(0)), weights)


def factorized(case: Case, norm: str, linear: str) -> jax.Array:
    """What the quantiser would read: a linear layer on normalised latents."""
    p = case.params
    out, width = p[f"{linear}.weight"].shape
    x = fill(
        lambda: nnx.LayerNorm(width, epsilon=1e-5, rngs=nnx.Rngs(0)),
        {"scale": p[f"{norm}.weight"], "bias": p[f"{norm}.bias"]},
    )(case.inputs["latents"])
    return fill(
        lambda: nnx.Linear(width, out, rngs=nnx.Rngs(0)),
        {"kernel": p[f"{linear}.weight"].T, "bias": p[f"{linear}.bias"]},
    )(x)


def halting(case: Case, names: dict[str, str], threshold: float, others: int) -> dict[str, Any]:
    """others: tokens of the decoder that never halt."""
    logits = head_of(case, names)(case.inputs["latents"])
    _, _, told = Halting(threshold).update(logits)
    halted = jnp.pad(told["halted"], ((0, 0), (others, 0)))
    return {
        "halt_logits": logits[..., None],
        "halt_prob": jax.nn.sigmoid(logits)[..., None],
        "mask": blocked_pairs(halted),
    }


def binned(error: Any, levels: Any, table: Any) -> tuple[jax.Array, jax.Array]:
    level = bin_up(jnp.asarray(error), jnp.asarray(levels))
    return jnp.asarray(levels)[level][..., None], jnp.asarray(table)[level][:, :, None]


def karl_halt(case: Case) -> dict[str, Any]:
    s = case.settings
    found = halting(case, HEAD, s["halt_threshold"], s["num_img_tokens"])
    levels = np.asarray(s["bins"], np.float32)
    loss, embedding = binned(case.inputs["loss"], levels, case.inputs["embeddings"])
    return {
        **found,
        "decoder_attn_mask": found["mask"],
        "binned_loss": loss,
        "binned_embed": embedding,
        "factorized": factorized(case, "ln_post", "prequant"),
    }


def karl_mask(case: Case) -> dict[str, Any]:
    s = case.settings
    names = {"halting_mlp.0": "fc1", "halting_mlp.2": "fc2", "encoder_ln_post_halt": "norm"}
    others = s["num_img_tokens_incl_condition"] - 1
    found = halting(case, names, s["halting_prob"], others)
    return {
        **found,
        "attn_mask_true_means_blocked": found["mask"],
        "factorized": factorized(case, "encoder_ln_post", "pre_quantizer_mlp"),
    }


def karl_bins(case: Case) -> dict[str, Any]:
    names = ("rec_loss_bins", "rec_loss_embeddings")
    loss, embedding = binned(case.inputs["rec_loss"], *(case.params[name] for name in names))
    return {"binned": loss, "embedding": embedding}


def hnet(case: Case) -> dict[str, Any]:
    """Padding counts in the released chances and loss."""
    x, valid = case.inputs["h"], case.inputs["mask"]
    y = case.inputs["main_network_output"]
    width = x.shape[-1]
    weights = {"query.weight": case.params["q"], "key.weight": case.params["k"]}
    zeros = {"residual.weight": jnp.zeros((width, width)), "residual.bias": jnp.zeros(width)}
    router = fill(lambda: BoundaryRouter(width, rngs=nnx.Rngs(0)), weights | zeros)
    previous = boundary.previous_slots(valid.shape)
    chance = router(x, previous, previous < 0)
    confidence, _, told = Boundary().update(chance)
    starts = told["starts"] & valid
    map_ = boundary.keep_starts(starts, y.shape[1])
    weight = map_.apply(jnp.clip(chance, CLIP, 1 - CLIP))
    dechunk = Dechunk(weight, None, boundary.segments(starts), confidence)
    losses = [boundary.ratio_loss(starts, chance, length) for length in LENGTHS]
    return {
        "boundary_prob": chance,
        "step_boundary_prob": chance,
        "boundary_mask": starts,
        "selected_prob": jnp.where(told["starts"], chance, 1 - chance)[..., None],
        "chunk_h": map_.apply(x),
        "chunk_mask": map_.valid,
        "dechunked": dechunk.restore(y),
        "load_balancing_loss_N2_N2p5_N6": jnp.stack(losses),
    }


def hnet_ste(case: Case) -> dict[str, Any]:
    x = jnp.asarray(case.inputs["x"])
    return {"y": one_through(x), "grad": jax.grad(lambda x: one_through(x).sum())(x)}


def start_ids(ends: jax.Array, counted: bool = False) -> jax.Array:
    """Where patches begin, the byte after the last included; as wide as the row with most. counted:
    by a rule that does not officially leave room for all where there are but two."""
    starts = jnp.pad(ends, ((0, 0), (1, 0)), constant_values=True)
    most = int(starts.sum(-1).max())
    return boundary.start_slots(starts, most if counted or most > 2 else starts.shape[1])


def lengths(ids: jax.Array, n: int) -> jax.Array:
    return jnp.diff(ids, axis=1, append=jnp.full((len(ids), 1), n + 1))


def blt(case: Case) -> dict[str, Any]:
    s, logits = case.settings, jnp.asarray(case.inputs["logits"])
    byte = jnp.asarray(case.inputs["byte_tokens_offset4"], jnp.int32) - SPECIAL
    n, shape = byte.shape[1], byte.shape
    entropy = entropies(logits)
    previous = boundary.previous_slots(shape)
    place = boundary.places(previous < 0)
    threshold = s["threshold"] * (1 + 2e-6)  # it is one of the entropies, and not above itself
    by_entropy = {
        "global": {"rule": "global", "threshold": threshold},
        "monotonic": {"rule": "monotonic", "threshold": s["mono_threshold"]},
        "global_and_mono": {
            "rule": "both", "threshold": threshold, "threshold_add": s["threshold_add"]
        },
    }  # fmt: skip
    ends = {
        rule: ends_by_entropy(entropy, previous, place, **how) for rule, how in by_entropy.items()
    }
    ends["topk"] = ends_by_rank(entropy, place, s["patch_size"])
    outputs = {
        "entropy": entropy,
        "space_start_ids": start_ids(ends_by_space(byte, previous, place), counted=True),
    }
    for rule, mask in ends.items():
        ids = start_ids(mask, counted=rule == "topk")
        outputs |= {f"start_ids_{rule}": ids, f"lengths_{rule}": lengths(ids, n)}
    return outputs


def where_kept(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows behind the last chunk are whatever they are."""
    return (np.where(got == 0, 0, want), got) if want.shape == got.shape else (want, got)


CLOSE = Output(1e-5, 1e-5)
BOUNDARIES = {
    "core": {"karl__halt": Adapter(karl_halt)},
    "gen": {
        "karl__halting_mask": Adapter(karl_mask, {"*": CLOSE}),
        "karl__loss_bins": Adapter(karl_bins, {"*": Output(0, 0)}),
        "hnet__route_chunk_dechunk": Adapter(
            hnet, {"chunk_h": Output(0, 0, where_kept), "*": CLOSE}
        ),
        "hnet__ste": Adapter(hnet_ste, {"*": Output(0, 0)}),
        "blt__entropy_patching": Adapter(blt, {"*": CLOSE}, jit=False),
    },
}
