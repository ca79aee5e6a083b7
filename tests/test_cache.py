"""The key-value cache: slots, overflow, eviction, and who sees what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.cache import LayerCache, make_cache, make_layer_cache
from tokred.maps import Keep
from tokred.models import Decoder, DecoderConfig

B, G, C, E = 2, 2, 4, 3
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


def rows(*numbers: float) -> jax.Array:
    """[1 N G E] of which every entry tells its token."""
    return jnp.broadcast_to(jnp.asarray(numbers)[None, :, None, None], (1, len(numbers), G, E))


def add(cache: LayerCache, places: list[int], write: list[bool] | None = None) -> LayerCache:
    """Tokens that carry ten times their place as key and twenty times as value."""
    place = jnp.asarray([places], jnp.float32)
    k, v = rows(*(10.0 * p for p in places)), rows(*(20.0 * p for p in places))
    return cache.append(k, v, place, None if write is None else jnp.asarray([write]))


def empty() -> LayerCache:
    return make_layer_cache(1, G, C, E)


def test_an_empty_cache_holds_nothing():
    cache = make_cache(B, G, (3, 5), E, jnp.bfloat16)
    assert [layer.capacity for layer in cache.layers] == [3, 5]
    assert cache.occupancy().tolist() == [[0, 0]] * B and cache.seen.tolist() == [0] * B
    assert cache.nbytes() == 2 * B * G * (3 + 5) * E * 2
    assert not any(layer.valid.any() for layer in cache.layers)


def test_entries_follow_one_another():
    cache = add(add(empty(), [0, 1]), [2])
    assert cache.position[0].tolist() == [[0, 1, 2, -1]] * G
    assert cache.k[0, :, :, 0].tolist() == [[0, 10, 20, 0]] * G
    assert cache.v[0, :, :, 1].tolist() == [[0, 20, 40, 0]] * G
    assert cache.length.tolist() == [[3] * G] and cache.dropped.tolist() == [0]


def test_what_is_not_written_takes_no_slot():
    cache = add(add(empty(), [0, 1, 2], [True, False, True]), [3, 4], [False, True])
    assert cache.position[0, 0].tolist() == [0, 2, 4, -1]
    assert cache.length.tolist() == [[3] * G]


def test_what_finds_no_slot_is_dropped_and_counted():
    cache = add(add(empty(), [0, 1, 2]), [3, 4, 5], [True, False, True])
    assert cache.position[0, 0].tolist() == [0, 1, 2, 3]
    assert cache.length.tolist() == [[C] * G] and cache.dropped.tolist() == [1]
    again = add(cache, [6, 7])
    assert again.dropped.tolist() == [3]
    np.testing.assert_array_equal(again.k, cache.k)


def test_examples_fill_at_their_own_pace():
    cache = make_layer_cache(B, G, C, E)
    write = jnp.array([[True, True, False], [False, True, False]])
    place = jnp.broadcast_to(jnp.arange(3.0), (B, 3))
    x = jnp.ones((B, 3, G, E))
    cache = cache.append(x, x, place, write)
    assert cache.length.tolist() == [[2] * G, [1] * G]
    assert cache.position[:, 0].tolist() == [[0, 1, -1, -1], [1, -1, -1, -1]]


def test_eviction_keeps_other_tokens_in_every_head():
    cache = add(empty(), [0, 1, 2, 3])
    index = jnp.array([[[3, 1], [0, 2]]])
    kept = cache.keep(Keep(index, C))
    assert kept.capacity == 2 and kept.length.tolist() == [[2, 2]]
    assert kept.position[0].tolist() == [[3, 1], [0, 2]]
    assert kept.k[0, :, :, 0].tolist() == [[30, 10], [0, 20]]
    fewer = cache.keep(Keep(index, C, jnp.array([[[True, False], [True, True]]])))
    assert fewer.length.tolist() == [[1, 2]] and fewer.position[0, 0].tolist() == [3, -1]
    assert fewer.valid[0].tolist() == [[True, False], [True, True]]


def test_after_an_eviction_there_is_room_again():
    cache = add(empty(), [0, 1, 2, 3])
    alive = jnp.array([[[True, True, False, False]] * G])
    index = jnp.array([[[3, 1, 0, 2]] * G])
    cache = add(cache.keep(Keep(index, C, alive)), [4])
    assert cache.position[0, 0].tolist() == [3, 1, 4, -1]


def test_scores_and_biases_move_with_their_slots():
    cache = add(empty(), [0, 1, 2, 3])
    score = jnp.broadcast_to(jnp.arange(4.0), (1, G, C))
    cache = dataclasses.replace(cache, score=score, bias=-score)
    kept = cache.keep(Keep(jnp.array([[[2, 0]] * G]), C))
    assert kept.score[0, 0].tolist() == [2, 0] and kept.bias[0, 0].tolist() == [-2, 0]


def test_occupancy_is_per_example_and_layer():
    cache = make_cache(1, G, (C, C), E)
    first, second = add(cache.layers[0], [0, 1, 2]), add(cache.layers[1], [2])
    assert dataclasses.replace(cache, layers=(first, second)).occupancy().tolist() == [[3, 1]]


def test_queries_see_what_is_not_after_them():
    cache = add(empty(), [0, 2, 5])
    seen = cache.mask(jnp.array([[[2.0], [6.0]]]))
    assert seen[0, 0].tolist() == [[True, True, False, False], [True, True, True, False]]
    near = cache.mask(jnp.array([[[2.0], [6.0]]]), window=2)
    assert near[0, 0].tolist() == [[False, True, False, False], [False, False, True, False]]


def test_a_layer_without_slots_is_an_error():
    with pytest.raises(ValueError, match="layer 1 has 0 slots"):
        make_cache(1, G, (2, 0), E)


CONFIG = DecoderConfig(
    vocab=11, width=16, depth=2, heads=4, kv_heads=2, hidden=16, context=12, window=3,
    global_every=2, attention_cap=5.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Decoder:
    return nnx.jit(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))()


def test_decoding_with_windows_is_the_full_pass(model: Decoder):
    graph, state = nnx.split(model)
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
    full = jax.jit(lambda s, x: nnx.merge(graph, s)(x)[0])(state, ids)
    extend = jax.jit(lambda s, x, cache: nnx.merge(graph, s).extend(x, cache)[:2])
    logits, cache = extend(state, ids[:, :5], model.make_cache(2, 9))
    close(logits, full[:, :5])
    for t in range(5, 9):
        logits, cache = extend(state, ids[:, t : t + 1], cache)
        close(logits, full[:, t : t + 1])
    assert cache.seen.tolist() == [9, 9] and cache.occupancy().tolist() == [[9, 9]] * 2


def test_a_cache_that_is_too_short_tells(model: Decoder):
    ids = jax.random.randint(jax.random.key(0), (2, 5), 0, 11)
    cache = model.make_cache(2, 3)
    cache = jax.jit(lambda x, c: model.extend(x, c)[1])(ids, cache)
    assert [layer.dropped.tolist() for layer in cache.layers] == [[2, 2]] * 2
    assert cache.seen.tolist() == [5, 5]
