"""The decoder without any method, against a plain one; padding, documents, mistakes."""

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.models import plain_decoder
from tokred.methods import make_plan
from tokred.models import Decoder, DecoderConfig, decoder_config
from tokred.nn import decoder_block
from tokred.nn.skeleton import path_name
from tokred.ops import attention
from tokred.plan import Plan

TINY = DecoderConfig(vocab=11, width=12, depth=2, heads=4, head_dim=6, hidden=10, context=16)
B, N = 2, 7
IDS = jax.random.randint(jax.random.key(3), (B, N), 0, 11)
IN_DOCUMENTS = (
    jnp.array([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 0]]),  # places
    jnp.array([[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 7]]),
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
GEMMA = {
    "activation": "gelu_tanh", "norm_offset": 1.0, "scale_embed": True, "kv_heads": 1,
    "post_norm": True, "window": 3, "global_every": 2, "logit_cap": 3.0, "attention_cap": 2.0,
}  # fmt: skip
LLAMA = {"kv_heads": 2, "tie": False, "rope_theta": 500.0}
QWEN = {"kv_heads": 2, "qkv_bias": True}


class Tiny:
    """A model with random parameters everywhere, its weights by path, and a compiled call."""

    def __init__(self, **changes: Any):
        self.config = dataclasses.replace(TINY, **changes)
        shapes = nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
        self.graph, shapes = nnx.split(shapes)
        self.state = jax.tree_util.tree_map_with_path(_draw, shapes)
        leaves = jax.tree_util.tree_flatten_with_path(self.state)[0]
        self.weights = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
        self._jitted = jax.jit(lambda s, x, how: nnx.merge(self.graph, s)(x, **how)[0])

    def __call__(self, ids: Any = IDS, **how: Any) -> np.ndarray:
        return np.asarray(self._jitted(self.state, ids, how))

    def plain(self, row: Any, place: Any = None) -> np.ndarray:
        return plain_decoder.logits(self.weights, self.config, np.asarray(row), place)


def _draw(path: Any, leaf: Any) -> jax.Array:
    name = path_name(path)
    draws = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.5, leaf.shape)
    return jnp.asarray(draws, leaf.dtype)


@functools.cache
def tiny() -> Tiny:
    return Tiny(kv_heads=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 1, "activation": "gelu"},
        {"window": 2, "qk_norm": True},
        {"experts": 3},
        {"scan": True, "attention": "reference"},
        LLAMA,
        QWEN,
        GEMMA,
    ],
    ids=str,
)
def test_logits_are_those_of_the_plain_decoder(changes: dict):
    model = Tiny(**changes)
    found = model()
    assert found.shape == (B, N, 11) and found.dtype == np.float32
    close(found, np.stack([model.plain(row) for row in IDS]))


def test_places_may_have_gaps():
    place = np.array([[0, 1, 4, 5, 6, 9, 12], [2, 3, 4, 5, 6, 7, 8]])
    expected = [tiny().plain(row, at) for row, at in zip(IDS, place, strict=True)]
    close(tiny()(position=jnp.asarray(place)), np.stack(expected))


def test_only_the_distance_of_places_matters():
    late = jnp.broadcast_to(jnp.arange(N) + 8, (B, N))
    close(tiny()(position=late), tiny()())


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_any_length(side: str):
    valid = jnp.arange(N)[None] < jnp.array([[4], [7]])
    valid = valid if side == "right" else valid[:, ::-1]
    found = tiny()(jnp.where(valid, IDS, 0), valid=valid)
    for row, alive, out in zip(IDS, np.asarray(valid), found, strict=True):
        close(out[alive], tiny().plain(np.asarray(row)[alive]))
    other = tiny()(jnp.where(valid, IDS, 9), valid=valid)
    np.testing.assert_array_equal(other[valid], found[valid])


def test_documents_are_separate_sequences():
    place, document = IN_DOCUMENTS
    found = tiny()(position=place, document=document)
    for row, own, out in zip(IDS, np.asarray(document), found, strict=True):
        for number in np.unique(own):
            inside = own == number
            close(out[inside], tiny().plain(np.asarray(row)[inside]))


def test_tokens_know_no_future():
    changed = tiny()(IDS.at[:, 4:].set(1))
    np.testing.assert_array_equal(changed[:, :4], tiny()()[:, :4])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every attention whether it was told to be causal; if not it got a mask."""
    told: list[bool] = []

    def spy(*args: Any, causal: bool, mask: Any, **how: Any) -> Any:
        told.append(causal)
        assert causal == (mask is None)
        return attention(*args, causal=causal, mask=mask, **how)

    monkeypatch.setattr(decoder_block, "attention", spy)
    return told


def planned(name: str) -> tuple[Decoder, Plan]:
    plan = make_plan(name, TINY.layout, **({"keep": 0.5} if name == "mod" else {}))
    return Decoder(TINY, plan=plan, rngs=nnx.Rngs(0)), plan


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["dense", "mod"])
def test_counted_places_need_no_mask(name: str, side: str, asked: list[bool]):
    """Then kernels are told that attention is causal; places that are given make a mask of it."""
    model, plan = planned(name)
    lengths = jnp.array([[4], [N]])
    slots = jnp.arange(N)[None]
    valid = slots < lengths if side == "right" else slots >= N - lengths
    place = jnp.cumsum(valid, axis=-1) - 1
    counted = model(IDS, plan=plan, valid=valid)[0]
    assert asked == [True] * TINY.depth
    given = model(IDS, plan=plan, valid=valid, position=place)[0]
    assert asked[TINY.depth :] == [False] * TINY.depth
    close(np.where(valid[..., None], counted, 0), np.where(valid[..., None], given, 0))


@pytest.mark.parametrize("name", ["dense", "mod"])
def test_documents_in_order_need_no_mask(name: str, asked: list[bool]):
    """Kernels hear of places in order and of documents, also where some tokens left."""
    model, plan = planned(name)
    where = dict(zip(("position", "document"), IN_DOCUMENTS, strict=True))
    told = model(IDS, plan=plan, ordered=True, **where)[0]
    assert asked == [True] * TINY.depth
    masked = model(IDS, plan=plan, **where)[0]
    assert asked[TINY.depth :] == [False] * TINY.depth
    close(told, masked)


def test_ids_may_be_constants_of_a_compiled_function():
    model = tiny()
    found = jax.jit(lambda state: nnx.merge(model.graph, state)(IDS)[0])(model.state)
    close(found, model())


def test_half_precision_gives_single_precision_logits():
    half = Tiny(kv_heads=2, dtype=jnp.bfloat16)()
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, tiny()(), atol=0.15 * float(tiny()().std()), rtol=0.1)


# As published, or as transformers counts them.
SIZES = {
    "smollm2_135m": 134_515_008,
    "qwen2_0.5b": 494_032_768,
    "gemma2_2b": 2_614_341_888,
    "gemma_2b": 2_506_172_416,
    "mistral_7b": 7_241_732_096,
    "llama3_8b": 8_030_261_248,
    "qwen2_7b": 7_615_616_512,
    "mixtral_8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_by_name(name: str):
    """Counted with one and two layers, and continued to all."""
    one, two = (_parameters(decoder_config(name, depth=depth)) for depth in (1, 2))
    assert one + (two - one) * (decoder_config(name).depth - 1) == SIZES[name]


def _parameters(config: DecoderConfig) -> int:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_defaults_follow_the_width():
    config = DecoderConfig(width=192, heads=3)
    assert (config.head_dim, config.hidden, config.groups) == (64, 512, 3)
    layout = config.layout
    assert (layout.tokens, layout.prefix, layout.class_token) == (2048, 0, False)
    windows = [
        dataclasses.replace(TINY, window=4, global_every=3).shape(i).window for i in range(3)
    ]
    assert windows == [4, 4, None]


def sharded_sequence() -> jax.Array:
    mesh = jax.make_mesh((8,), ("sequence",))
    split = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    return jax.device_put(jnp.zeros((2, 8), jnp.int32), split)


def call(ids: Any, **how: Any) -> Any:
    return lambda: nnx.merge(tiny().graph, tiny().state)(ids, **how)


def mistakes() -> dict[str, tuple[Any, type, tuple[str, ...]]]:
    routed = make_plan("mod", TINY.layout, keep=0.5)
    return {
        "vocabulary": (call(jnp.array([[1, 11]])), ValueError, ("11", "vocabulary of 11", "vocab")),
        "negative": (call(jnp.array([[1, -2]])), ValueError, ("-2", "vocabulary")),
        "floats": (call(jnp.ones((1, 2))), TypeError, ("integers", "float32", "tokenise")),
        "length": (
            call(jnp.ones((1, 17), jnp.int32)), ValueError, ("17", "context of 16", "shorten"),
        ),
        "axes": (call(jnp.ones((2,), jnp.int32)), ValueError, ("(B, N)", "(2,)")),
        "sharded": (
            call(sharded_sequence(), plan=routed), ValueError, ("'sequence'", "'mod'", "batch"),
        ),
        "layers": (
            call(IDS, plan=make_plan("mod", decoder_config("lm_3m").layout)),
            ValueError, ("around_3", "2 layers"),
        ),
        "heads": (
            lambda: dataclasses.replace(TINY, kv_heads=3), ValueError, ("heads=4", "kv_heads=3"),
        ),
        "head_dim": (lambda: dataclasses.replace(TINY, head_dim=5), ValueError, ("head_dim=5",)),
        "activation": (
            lambda: dataclasses.replace(TINY, activation="swish"), ValueError, ("'swish'",),
        ),
        "size": (lambda: decoder_config("llama3_7b"), ValueError, ("did you mean 'llama3_8b'",)),
        "field": (
            lambda: decoder_config("lm_3m", widht=4), ValueError, ("did you mean 'width'",),
        ),
    }  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", list(mistakes()))
def test_mistakes_get_one_sentence(name: str):
    do, kind, words = mistakes()[name]
    with pytest.raises(kind) as error:
        do()
    message = str(error.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message and ". " not in message
