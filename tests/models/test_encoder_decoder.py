"""The encoder-decoder: its positions, padding, decoding with a cache, scans, costs, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred import cost
from tokred.models import (
    Conditioned,
    EncoderDecoder,
    EncoderDecoderConfig,
    encoder_decoder_config,
)
from tokred.models.generate import generate
from tokred.models.sizes import BYTE_T5
from tokred.nn.t5_block import RelativeBias, T5Shape, distance_buckets

CONFIG = EncoderDecoderConfig(
    vocab=40, width=32, depth=4, decoder_depth=2, heads=2, head_dim=8, hidden=48, context=32,
    target_context=12,
)  # fmt: skip
B, N, M = 3, 20, 8
IDS = jax.random.randint(jax.random.key(0), (B, N), 3, CONFIG.vocab)
TARGET = jax.random.randint(jax.random.key(1), (B, M), 3, CONFIG.vocab).at[:, 0].set(0)
LENGTHS = jnp.array([N, 13, 1])
RIGHT = jnp.arange(N)[None] < LENGTHS[:, None]


def build(**changes) -> EncoderDecoder:
    return EncoderDecoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


@jax.jit
def forward(model, ids, target, valid=None):
    return model(ids, target, valid=valid)[0]


def close(got, want, atol=2e-5):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("sink", [False, True])
def test_padding_on_either_side_changes_nothing(sink: bool):
    model = build(sink=sink)
    want = jnp.concatenate([
        forward(model, IDS[b : b + 1, : int(n)], TARGET[b : b + 1])
        for b, n in enumerate(LENGTHS)
    ])  # fmt: skip
    close(forward(model, IDS, TARGET, RIGHT), want)
    left = jnp.stack([jnp.roll(row, N - int(n)) for row, n in zip(IDS, LENGTHS, strict=True)])
    close(forward(model, left, TARGET, RIGHT[:, ::-1]), want)


def test_target_tokens_see_no_later_ones():
    model = build()
    other = TARGET.at[:, 5:].set(7)
    close(forward(model, IDS, TARGET)[:, :5], forward(model, IDS, other)[:, :5])


@pytest.mark.parametrize("sink", [False, True])
def test_steps_with_a_cache_are_the_full_pass(sink: bool):
    model = build(sink=sink)

    @jax.jit
    def sample(model, ids, valid):
        memory, _ = model.encode(ids, valid=valid)
        start = jnp.zeros((B, 1), jnp.int32)
        return generate(Conditioned(model, model.remember(memory)), start, steps=M)

    out = sample(model, IDS, RIGHT)
    read = jnp.concatenate([jnp.zeros((B, 1), jnp.int32), out.ids[:, :-1]], axis=1)
    close(out.logits, forward(model, IDS, read, RIGHT))
    assert (out.ids == out.logits.argmax(-1)).all()


def test_scanned_layers_are_the_same():
    plain, scanned = build(), build(scan=True)
    close(forward(scanned, IDS, TARGET, RIGHT), forward(plain, IDS, TARGET, RIGHT))
    loss = lambda model: (forward(model, IDS, TARGET, RIGHT) ** 2).mean()  # noqa: E731
    got, want = nnx.grad(loss)(scanned), nnx.grad(loss)(plain)
    jax.tree.map(close, nnx.state(got), nnx.state(want))


def test_a_stack_has_one_table_of_distances():
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(build()))]
    tables = [path for path in paths if path.endswith("table")]
    assert tables == ["decoder/blocks/0/relative/table", "encoder/blocks/0/relative/table"]


def test_buckets_of_distances():
    both = distance_buckets(32, 128, causal=False)
    middle = len(both) // 2
    assert both[middle] == 0 and list(both[middle - 3 : middle]) == [3, 2, 1]
    assert list(both[middle + 1 : middle + 8]) == [17, 18, 19, 20, 21, 22, 23]
    assert both[0] == 15 and both[-1] == 31  # as far as it goes, and beyond
    assert both[middle - 16] == 10 and both[middle - 64] == 14  # borders of logarithmic ones
    causal = distance_buckets(32, 128, causal=True)
    assert (causal[middle:] == 0).all() and causal[middle - 15] == 15 and causal[0] == 31


def test_relative_bias_of_slots_is_that_of_positions():
    shape = T5Shape(16, 2, 8, 24, causal=True, buckets=8, max_distance=16)
    relative = RelativeBias(shape, rngs=nnx.Rngs(0))
    queries, keys = jnp.array([[5.0, 30.0]]), jnp.array([[4.0, 0.0, 29.0]])
    own = relative.per_head(queries[:, None], jnp.stack([keys, keys], 1))
    close(own, relative(queries, keys))


def test_macs_are_the_compilers():
    model = build()
    ids, target = jnp.zeros((1, CONFIG.context), int), jnp.zeros((1, CONFIG.target_context), int)
    step = jax.jit(lambda m, i, t: m(i, t)[0]).lower(model, ids, target).compile()
    flops = dict(step.cost_analysis() or {})["flops"]
    assert cost.macs(CONFIG) == pytest.approx(flops / 2, rel=0.08)


@pytest.mark.parametrize("name", ["byt5_tiny", "byt5_small", "byt5_large"])
def test_sizes(name: str):
    config = encoder_decoder_config(name)
    shapes = nnx.eval_shape(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)))
    millions = sum(x.size for x in jax.tree.leaves(nnx.state(shapes))) / 1e6
    wanted = {"byt5_tiny": 1.36, "byt5_small": 300, "byt5_large": 1230}[name]
    assert millions == pytest.approx(wanted, rel=0.02)


def test_tied_tables_shrink_features_first():
    model = build(tie=True)
    assert model.head is None and forward(model, IDS, TARGET).shape == (B, M, CONFIG.vocab)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m(jnp.zeros((1, 33), int), TARGET[:1]), "context of 32"),
        (lambda m: m(IDS[:1], jnp.zeros((1, 13), int)), "context of 12"),
        (lambda m: m(IDS + 40, TARGET), "vocabulary of 40"),
        (lambda m: encoder_decoder_config("byt5_tyni"), "did you mean 'byt5_tiny'"),
        (lambda m: encoder_decoder_config("byt5_tiny", deth=3), "did you mean 'depth'"),
        (lambda m: EncoderDecoderConfig(activation="gelu_tanhh"), "did you mean 'gelu_tanh'"),
        (lambda m: m.encoder.blocks[0].remember(m.tokens(IDS)), r"T5Shape\.cross"),
    ],
)
def test_bad_input(call, match: str):
    with pytest.raises(ValueError, match=match) as error:
        call(build())
    assert "\n" not in str(error.value)


def test_every_size_is_listed():
    assert all(encoder_decoder_config(name).depth for name in BYTE_T5)
