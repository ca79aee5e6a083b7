"""RazorAttention: which heads look far back, what the others fold, and what it weighs."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.cache import HeadScores, Look, cache_reduction, choose_heads, hold, score_heads
from tokred.methods.razor import razor
from tokred.models import Decoder, DecoderConfig
from tokred.ops import attention_probs
from tokred.plan import Plan

B, N, STEPS, SINKS = 2, 9, 6, 2
CONFIG = DecoderConfig(
    vocab=13, width=16, depth=1, heads=6, kv_heads=3, head_dim=4, hidden=24, context=32
)  # fmt: skip
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
IDS = jax.random.randint(jax.random.key(1), (B, N + STEPS), 0, 13)
VALID = jnp.arange(N)[None] >= jnp.array([0, 3])[:, None]  # the second has six tokens
HEADS = ((False, True, False),)
PERIOD = 65
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@functools.cache
def read(plan: Plan):
    """Caches after the prompt and after every further token, which are given."""
    cache = MODEL.make_cache(B, N + STEPS, plan=plan, prompt=N)
    extend = functools.partial(MODEL.extend, plan=plan.with_twin("causal"))
    first = jax.jit(functools.partial(extend, fresh=True))
    _, cache, _ = first(IDS[:, :N], cache, valid=VALID)
    found, step = [cache.layers[0]], jax.jit(extend)
    for t in range(N, N + STEPS):
        _, cache, _ = step(IDS[:, t : t + 1], cache)
        found.append(cache.layers[0])
    return found


def rows(cache, example: int, head: int):
    """(positions, keys, values, biases) of one head's entries in the order of the text."""
    mine = np.asarray(cache.valid[example, 0] & (cache.owner[example, 0] == head))
    order = np.argsort(np.where(mine, cache.position[example, 0], np.inf))[: mine.sum()]
    take = lambda x: np.asarray(x)[example, 0, order]  # noqa: E731
    return take(cache.position), take(cache.k), take(cache.v), take(cache.bias)


def folded(x: np.ndarray, left: int) -> np.ndarray:
    """The rows that are left, by the definition."""
    if len(x) <= left:
        return x
    recent = len(x) - (left - SINKS - 1)
    return np.concatenate([x[:SINKS], x[SINKS:recent].mean(0, keepdims=True), x[recent:]])


@pytest.mark.parametrize("spare", [1, 3])
def test_folds_by_the_definition(spare: int):
    """Keys of the first layer depend on their own tokens alone."""
    found = read(razor(CONFIG.layout, budget=5, heads=HEADS, sinks=SINKS, spare=spare))
    wanted = read(Plan())
    for step, (mine, full) in enumerate(zip(found, wanted, strict=True)):
        for example, length in enumerate((N + step, N - 3 + step)):
            prompt = (N, N - 3)[example]
            late = max(0, length - max(prompt, 5))  # since what is left of the prompt
            left = min(length, 5 + late % spare)
            for head in range(3):
                place, k, v, bias = rows(mine, example, head)
                keys = np.asarray(full.k[example, head, :length])
                values = np.asarray(full.v[example, head, :length])
                if head == 1:
                    close(place, np.arange(length))
                    close(k, keys)
                    continue
                assert len(place) == left
                close(k, folded(keys, left))
                close(v, folded(values, left))
                count = np.ones(left)
                if length > left:
                    count[SINKS] = length - left + 1
                    assert place[SINKS] == SINKS
                close(bias, np.log(count))


def test_the_shared_slot_weighs_as_much_as_its_entries():
    """Its exponential counts as often as there are entries, above and below the line."""
    cache = read(razor(CONFIG.layout, budget=5, heads=HEADS, sinks=SINKS))[-1]
    attend, length = MODEL.blocks[0].attn, N + STEPS
    q = jax.random.normal(jax.random.key(3), (B, 1, 6, 4))
    place = jnp.full((B, 1), 40.0)
    got = np.asarray(attend.weigh(q, place, cache)[0, :, 0])
    for head in range(6):
        _, k, _, _ = rows(cache, 0, head // 2)
        weight = np.exp(k @ np.asarray(q)[0, 0, head] / 2.0)
        if head // 2 != 1:
            weight[SINKS] *= length - 4
        mine = np.asarray(cache.valid[0, 0] & (cache.owner[0, 0] == head // 2))
        order = np.argsort(np.where(mine, cache.position[0, 0], np.inf))[: mine.sum()]
        close(got[head, order], weight / weight.sum())
        close(got[head][~mine], 0.0)


def test_as_the_vendor_has_it():
    """One fold after the prompt, no weight."""
    plan = razor(CONFIG.layout, budget=5, heads=HEADS, sinks=SINKS, spare=None, weighted=False)
    cache = read(plan)[-1]
    assert cache.bias is None and not cache.dropped.any()
    held = [int((cache.valid & (cache.owner == g))[0].sum()) for g in range(3)]
    assert held == [5 + STEPS, N + STEPS, 5 + STEPS]


def test_bytes_fall_by_what_folding_heads_drop():
    """Slots: two heads of 5 + 1, one of 15; dense three of 15."""
    plan = razor(CONFIG.layout, budget=5, heads=HEADS, sinks=SINKS)
    cache = MODEL.make_cache(B, N + STEPS, plan=plan, prompt=N)
    assert cache.layers[0].capacity == 27 and cache.nbytes() == 27 * 2 * B * 4 * 4
    assert MODEL.make_cache(B, N + STEPS).nbytes() == 45 * 2 * B * 4 * 4
    share = razor(CONFIG.layout, keep=0.5, heads=HEADS, sinks=1, least=6)
    assert MODEL.make_cache(B, N + STEPS, plan=share, prompt=N).layers[0].capacity == 30


class Repeating:
    """Stands for a model: head 0 looks at an earlier copy of its token, head 1 at what followed the
    copy, head 2 at itself and head 3 at the token before, if there is one."""

    config = SimpleNamespace(vocab=50)

    def make_cache(self, batch: int, length: int, *, plan: Plan):
        return None

    def extend(self, ids, cache, *, plan: Plan, fresh: bool):
        n = ids.shape[1]
        probs = np.zeros((1, 4, n, n), np.float32)
        for t in range(n):
            for head, back in enumerate((PERIOD, PERIOD - 1, 0, 1)):
                probs[0, head, t, max(t - back, 0)] = 1.0
        place = jnp.arange(n, dtype=jnp.float32)[None]
        weigh = lambda q, position, cache: jnp.asarray(probs)[  # noqa: E731
            :, :, position[0].astype(jnp.int32)
        ]
        none = jnp.zeros((1, n, 1, 2))
        look = Look(jnp.zeros((1, n, 4, 2)), place, weigh)
        left = cache_reduction(plan).begin(hold(none, none, place), look)
        return None, SimpleNamespace(layers=(left,)), None


def test_finds_echo_and_induction_heads():
    """195 tokens, whose queries come in two blocks."""
    scores = score_heads(Repeating(), key=jax.random.key(0), length=PERIOD, copies=3)
    np.testing.assert_array_equal(scores.echo, [[1.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(scores.induction, [[0.0, 1.0, 0.0, 0.0]])


def test_scores_are_of_the_models_own_attention():
    got = score_heads(MODEL, key=jax.random.key(5), length=5, copies=3, batch=2)
    ids = jnp.tile(jax.random.randint(jax.random.key(5), (2, 5), 0, 13), (1, 3))
    tokens = MODEL.tokens(ids, None, jnp.broadcast_to(jnp.arange(15.0), (2, 15)))
    q, k, _ = MODEL.blocks[0].project(tokens)
    probs = np.asarray(attention_probs(q, k, mask=jnp.tril(jnp.ones((1, 15, 15), bool))))
    t = np.arange(5, 15)
    for told, shift in ((got.echo, 0), (got.induction, 1)):
        once, twice = (probs[:, :, t, t - 5 * m + shift] * (t >= 5 * m) for m in (1, 2))
        close(told[0], (once + twice).mean((0, 2)))


def test_chooses_among_all_layers():
    """Ten key heads of two query heads: a tenth by echo, three by induction, one of them both."""
    echo = np.zeros((5, 4))
    echo[3, 2] = 0.9
    induction = np.zeros((5, 4))
    induction[3, 3], induction[0, 1], induction[4, 0], induction[2, 2] = 0.8, 0.7, 0.6, 0.1
    scores = HeadScores(jnp.asarray(echo), jnp.asarray(induction))
    table = choose_heads(scores, 2, echo=0.1, induction=0.3)
    assert table == (
        (True, False), (False, False), (False, False), (False, True), (True, False),
    )  # fmt: skip
    assert sum(map(sum, choose_heads(scores, 2, induction=0.0))) == 1


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="needs heads="):
        razor(CONFIG.layout)
    with pytest.raises(ValueError, match="budget of 5 entries must exceed the 4"):
        razor(CONFIG.layout, budget=5, heads=HEADS)
    with pytest.raises(ValueError, match="as many key heads"):
        razor(CONFIG.layout, heads=((True,), (True, False)))
    with pytest.raises(ValueError, match="spare=0"):
        razor(CONFIG.layout, heads=HEADS, spare=0)
    with pytest.raises(ValueError, match="2 layers, and the model has 1"):
        MODEL.make_cache(B, N, plan=razor(CONFIG.layout, budget=6, heads=HEADS * 2))
    plan = razor(CONFIG.layout, budget=6, heads=((True, False),))
    with pytest.raises(ValueError, match="rows of 2 key heads, and the model has 3"):
        cache = MODEL.make_cache(B, N, plan=plan)
        MODEL.extend(IDS[:, :N], cache, plan=plan.with_twin("causal"), fresh=True)
    plan = razor(CONFIG.layout, budget=6, heads=HEADS)
    with pytest.raises(ValueError, match="3 tokens at once find 1 free"):
        cache = MODEL.make_cache(B, N, plan=plan)
        MODEL.extend(IDS[:, :3], cache, plan=plan.with_twin("causal"))
    with pytest.raises(ValueError, match="length=1"):
        score_heads(MODEL, key=jax.random.key(0), length=1)
    with pytest.raises(ValueError, match="6 query heads do not share 4"):
        choose_heads(HeadScores(jnp.zeros((1, 6)), jnp.zeros((1, 6))), 4)
