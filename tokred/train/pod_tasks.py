"""What is compiled for TPU pods: slices of them, models, and the plans they run under."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tokred.cost import solve_keep
from tokred.methods import make_plan
from tokred.models.decoder import decoder_config
from tokred.models.encoder_decoder_config import encoder_decoder_config
from tokred.models.vit import vit_config
from tokred.models.vlm_sizes import vlm_config
from tokred.plan import Layout, Plan


@dataclass(frozen=True)
class Pod:
    """A slice of TPUs. hbm: per chip, in 10^9 bytes."""

    topology: str
    hbm: int


PODS: Mapping[str, Pod] = {
    "v5e-8": Pod("v5e:2x4", 16),
    "v5e-16": Pod("v5e:4x4", 16),
    "v5e-256": Pod("v5e:16x16", 16),
    "v5p-512": Pod("v5p:8x8x4", 95),  # named after its cores: 256 chips
    "v6e-256": Pod("v6e:16x16", 32),
}


@dataclass(frozen=True)
class Task:
    """A model and what it does under each of some plans.

    step: 'train', 'apply', the answers alone, 'decode' one token of every sequence, the cache being
    made for seven eighths of the context as a prompt, or 'buckets', logits of a target given a
    source of which the gate keeps what it wants.
    batch: global. meshes: sizes of axes by pod. remat: how many layers are computed twice; the next
    number is tried where a step does not fit.
    """

    model: str
    step: str
    config: Any
    batch: int
    plans: Mapping[str, Callable[[Layout], Plan]]
    meshes: Mapping[str, Mapping[str, int]]
    remat: tuple[int, ...] = (0,)

    def label(self, pod: str, plan: str) -> str:
        return f"{pod}/{self.model}/{self.step}/{plan}"


def dense(layout: Layout) -> Plan:
    return make_plan("dense", layout)


def mod(layout: Layout) -> Plan:
    """Half of the layers take an eighth of the tokens; what decides in decoding is trained too."""
    return make_plan("mod", layout, keep=0.125, gate="predictor")


VIT = Task(
    "vit_b16",
    "train",
    vit_config("vit_b16", dtype=jnp.bfloat16, drop_path=0.1),
    batch=4096,
    plans={
        "dense": dense,
        "diffrate": lambda layout: make_plan("diffrate", layout).with_twin("soft"),
        "evit": lambda layout: make_plan("evit", layout, keep=0.7),
        "tome": lambda layout: make_plan("tome", layout, r=13),
    },
    meshes={
        "v5e-256": {"data": 16, "fsdp": 16},
        "v5p-512": {"data": 32, "fsdp": 8},
        "v6e-256": {"data": 16, "fsdp": 16},
    },
    remat=(0, 12),
)
LM = Task(
    "lm_1b",
    "train",
    decoder_config("lm_1b", dtype=jnp.bfloat16),
    batch=256,
    plans={"dense": dense, "mod": mod},
    meshes={"v5e-256": {"data": 8, "fsdp": 8, "tensor": 4}},
    remat=(0, 20),
)
DECODING = Task(
    "lm_1b",
    "decode",
    decoder_config("lm_1b", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    batch=256,
    plans={"dense": dense, "mod": lambda layout: mod(layout).with_twin("causal")},
    meshes={"v5e-256": {"data": 64, "tensor": 4}},
)
PAIRS = Task(
    "byt5_small",
    "train",
    encoder_decoder_config("byt5_small", dtype=jnp.bfloat16),
    batch=256,
    plans={"dense": dense, "mrt5": lambda layout: make_plan("mrt5", layout).with_twin("soft")},
    meshes={"v5e-16": {"data": 16}},
    remat=(0, 12),
)
BUCKETS = Task(
    "byt5_small",
    "buckets",
    encoder_decoder_config("byt5_small", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    batch=256,
    plans={"mrt5": lambda layout: make_plan("mrt5", layout)},
    meshes={"v5e-16": {"data": 16}},
)
TALK = Task(
    "vlm_120m",
    "train",
    vlm_config(
        "vlm_120m",
        vision={"dtype": jnp.bfloat16},
        decoder={"dtype": jnp.bfloat16, "context": 512},
    ),
    batch=256,
    plans={"dense": dense, "mqt": lambda layout: make_plan("mqt", layout).with_twin("soft")},
    meshes={"v5e-16": {"data": 16}},
    remat=(0, 12),
)
APPLIED = (  # to a whole ViT, at the same share of its multiply-accumulates
    *("topk", "evit", "ats", "tokencut", "zero_tprune", "dynamicvit", "tome", "tome_kth", "tomesd"),
    *("mctf", "pitome", "diffrate", "clca", "dpc_knn", "k_medoids", "expedit", "patchmerger"),
    *("sinkhorn", "sit", "tokenlearner", "lookupvit", "mod", "duo_llm", "acm", "mrt5", "karl"),
    *("avit", "pooling"),
)
CACHES = (
    *("streaming_llm", "h2o", "observed_attention", "tova", "snapkv", "pyramidkv", "knorm"),
    *("expected_attention", "keydiff", "cur", "lagkv", "adakv", "quest", "kivi", "zipcache"),
)
IN_HALF = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
WHOLE = vit_config("vit_b16", **IN_HALF)


def at_two_thirds(name: str) -> Callable[[Layout], Plan]:
    """The method with the `keep` at which `WHOLE` costs at most two thirds."""
    return lambda layout: solve_keep(WHOLE, name, 2 / 3)[0]


def of_a_fifth(name: str) -> Callable[[Layout], Plan]:
    """The method with a fifth of the cache's entries, or of their bits."""
    return lambda layout: make_plan(name, layout, keep=0.2)


APPLYING = Task(
    "vit_b16",
    "apply",
    WHOLE,
    batch=256,
    plans={"dense": dense, **{name: at_two_thirds(name) for name in APPLIED}},
    meshes={"v5e-8": {"data": 8}},
)
CACHED = Task(
    "lm_1b",
    "decode",
    decoder_config("lm_1b", context=4096, **IN_HALF),
    batch=64,
    plans={"dense": dense, **{name: of_a_fifth(name) for name in CACHES}},
    meshes={"v5e-8": {"data": 8}},
)
TASKS = (VIT, LM, DECODING, PAIRS, BUCKETS, TALK, APPLYING, CACHED)
