"""Every site of the model, and the evidence it gives, with toy reductions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.combine import Combine
from tokred.maps import Assign, Keep
from tokred.models import ViT, ViTConfig
from tokred.nn.run import Here, run_block
from tokred.plan import ATTENTION, Ask, LayerCount, Plan, Reduction, Site
from tokred.report import Call, Report
from tokred.tokens import Tokens

CONFIG = ViTConfig(image_size=(8, 12), patch=(4, 4), width=16, depth=3, heads=2, classes=3)
N, B = 7, 2
MODEL = nnx.jit(lambda: ViT(CONFIG, rngs=nnx.Rngs(0)))()
IMAGES = jax.random.normal(jax.random.key(0), (B, 8, 12, 3))
KEPT = (0, 5, 2, 4)


@dataclasses.dataclass(frozen=True)
class Pick(Reduction):
    """Keeps `index`; what it asked for is in the report."""

    asks: tuple[Ask, ...] = ()  # type: ignore[misc]
    index: tuple[int, ...] = KEPT

    def counts(self, n: int, prefix: int) -> int:
        return len(self.index)

    def select(self, tokens, evidence, *, key):
        index = jnp.broadcast_to(
            jnp.asarray(self.index, jnp.int32), (*tokens.batch, len(self.index))
        )
        return Keep(index, tokens.n)


@dataclasses.dataclass(frozen=True)
class Pairs(Reduction):
    """Merges tokens 1, 2 and tokens 3, 4."""

    def counts(self, n: int, prefix: int) -> int:
        return n - 2

    def select(self, tokens, evidence, *, key):
        target = jnp.array([0, 1, 1, 2, 2, *range(3, tokens.n - 2)], jnp.int32)
        return Assign(jnp.broadcast_to(target, (*tokens.batch, tokens.n)), tokens.n - 2)


@dataclasses.dataclass(frozen=True)
class Look(Reduction):
    """Changes nothing; reads evidence."""

    asks: tuple[Ask, ...] = ()  # type: ignore[misc]

    def counts(self, n: int, prefix: int) -> int:
        return n


@dataclasses.dataclass(frozen=True)
class Known(Look):
    """Gives the next attention twice the probabilities that it asked for."""

    asks: tuple[Ask, ...] = (Ask("probs"),)

    def __call__(self, tokens, evidence, state=None, **_: Any):
        twice = 2.0 * jnp.swapaxes(evidence["probs"], 1, 2)
        return tokens.replace(extra={ATTENTION: twice}), None, state, {}


@dataclasses.dataclass(frozen=True)
class Weighted(Pick):
    """Around: halves the update of kept tokens, doubles the features of skipped ones."""

    def __call__(self, tokens, evidence, state=None, **_: Any):
        map_ = self.select(tokens, evidence, key=None)
        half, twice = jnp.full((B, map_.k), 0.5), 2.0
        return self.move(tokens, map_, evidence), map_, state, {
            "combine": Combine(half, twice * tokens.x)
        }  # fmt: skip


def run(*steps: tuple[Site, Reduction]) -> Report:
    plan = Plan(steps)
    graph, state = nnx.split(MODEL)
    return jax.jit(lambda s: nnx.merge(graph, s)(IMAGES, plan=plan)[1])(state)


def by_hand(change: Callable[[str, int, Any], Any]) -> np.ndarray:
    """The model spelled out; change(site, layer, value) may move q, (k, v) or x."""
    x = change("input", 0, MODEL.tokens(IMAGES).x)
    for i, block in enumerate(MODEL.blocks):
        x = change("before", i, x)
        q, k, v = block.project(Tokens(x))
        k, v = change("keys", i, (k, v))
        q, x = change("inside", i, (q, x))
        weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(8.0), axis=-1)
        y = jnp.einsum("bhqk,bkhe->bqhe", weights, v)
        x = change("mid", i, x + block.attn.out(y.reshape(*y.shape[:2], -1)))
        x = change("after", i, x + block.feed(x))
    return np.asarray(change("output", 0, MODEL.norm(x)))


def at(kind: str, layer: int, how: Callable) -> Callable[[str, int, Any], Any]:
    return lambda site, i, value: jax.tree.map(how, value) if (site, i) == (kind, layer) else value


def pick(a):
    return a[:, np.array(KEPT)]


def pairs(a):
    middle = (a[:, 1:5].reshape(B, 2, 2, *a.shape[2:])).mean(2)
    return jnp.concatenate([a[:, :1], middle, a[:, 5:]], 1)


@pytest.mark.parametrize("kind", ["input", "before", "keys", "inside", "mid", "after", "output"])
@pytest.mark.parametrize(("reduction", "how"), [(Pick(), pick), (Pairs(), pairs)])
def test_site(kind: str, reduction: Reduction, how: Callable):
    layer = None if kind in ("input", "output") else 1
    if kind == "inside" and how is pairs:
        pytest.skip("merged queries are no part of the family")
    report = run((Site(kind, layer), reduction))
    expected = by_hand(at(kind, layer or 0, how))
    np.testing.assert_allclose(report.tokens.x, expected, rtol=1e-3, atol=1e-4)
    moved = kind != "keys"
    assert (report.tokens.source is not None) == moved
    k = reduction.counts(N, 1)
    counts = {
        "input": (k, k, k, k), "before": (k, k, k, k), "keys": (N, k, N, N),
        "inside": (k, N, k, k), "mid": (N, N, k, k), "after": (N, N, N, k), "output": (N,) * 4,
    }[kind]  # fmt: skip
    assert report.counts[1] == LayerCount(*counts)


def _layer(x, block, attention=True, mlp=True):
    if attention:
        y = _attend(x, block)
        x = x + y
    return x + block.feed(x) if mlp else x


def _attend(x, block):
    q, k, v = block.project(Tokens(x))
    weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(8.0), axis=-1)
    y = jnp.einsum("bhqk,bkhe->bqhe", weights, v)
    return block.attn.out(y.reshape(*y.shape[:2], -1))


@pytest.mark.parametrize("kind", ["around", "around_attention", "around_mlp"])
@pytest.mark.parametrize("weigh", [False, True])
def test_around_puts_the_update_back(kind: str, weigh: bool):
    reduction = Weighted() if weigh else Pick()
    report = run((Site(kind, 2), reduction))
    first, second, last = MODEL.blocks
    x = _layer(_layer(MODEL.tokens(IMAGES).x, first), second)
    parts = {"around": (True, True), "around_attention": (True, False), "around_mlp": (False, True)}
    if kind == "around_mlp":
        x = x + _attend(x, last)
    kept = pick(x)
    update = _layer(kept, last, *parts[kind]) - kept
    out = (2.0 * x if weigh else x).at[:, np.array(KEPT)].set(kept + update * (0.5 if weigh else 1))
    out = out + last.feed(out) if kind == "around_attention" else out
    np.testing.assert_allclose(report.tokens.x, MODEL.norm(out), rtol=1e-3, atol=1e-4)
    assert report.counts[2].out == N and report.tokens.source is None


def test_attention_that_is_known_beforehand():
    """It acts in one layer and is gone then."""
    report = run((Site("before", 1), Known()))
    x = layer_input(1)
    block, last = MODEL.blocks[1], MODEL.blocks[2]
    _, _, v = block.project(Tokens(x))
    y = jnp.einsum("bhqk,bkhe->bqhe", 2.0 * probabilities(x, block), v)
    x = x + block.attn.out(y.reshape(*y.shape[:2], -1))
    expected = MODEL.norm(_layer(x + block.feed(x), last))
    np.testing.assert_allclose(report.tokens.x, expected, rtol=1e-3, atol=1e-4)
    assert ATTENTION not in report.tokens.extra


def test_skipped_tokens_are_unchanged():
    tokens = MODEL.tokens(IMAGES)
    plan = Plan(((Site("around", 0), Pick()),))
    from_block = jax.jit(lambda x: _run_first(tokens.replace(x=x), plan))(tokens.x)
    skipped = np.setdiff1d(np.arange(N), KEPT)
    np.testing.assert_array_equal(from_block[:, skipped], tokens.x[:, skipped])
    assert (np.asarray(from_block[:, KEPT]) != np.asarray(tokens.x[:, KEPT])).any()


def _run_first(tokens, plan):
    return run_block(Here(dict(enumerate(MODEL.blocks)), 0, plan, Call()), tokens).tokens.x


def layer_input(layer: int):
    x = MODEL.tokens(IMAGES).x
    for block in list(MODEL.blocks)[:layer]:
        x = _layer(x, block)
    return x


def probabilities(x, block):
    q, k, _ = block.project(Tokens(x))
    return jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(8.0), axis=-1)


@pytest.mark.parametrize("site", ["mid", "before", "keys"])
def test_evidence_of_this_layer(site: str):
    asks = (
        Ask("rows"), Ask("rows", heads="all"), Ask("rows", rows="last"), Ask("column_mean"),
        Ask("probs"), Ask("keys"), Ask("values", heads="all"), Ask("qkv"), Ask("input"),
        Ask("hidden"),
    )  # fmt: skip
    found = run((Site(site, 1), Look(asks))).evidence[f"{site}_1"]
    x, block = layer_input(1), MODEL.blocks[1]
    q, k, v = block.project(Tokens(x))
    probs = probabilities(x, block)
    expected = {
        "rows_cls": probs[:, :, 0].mean(1),
        "rows_cls_all": jnp.swapaxes(probs[:, :, 0], 1, 2),
        "rows_last": probs[:, :, -1].mean(1),
        "column_mean": probs.mean((1, 2)),
        "probs": probs,
        "keys": k.mean(2),
        "values_all": v,
        "qkv": jnp.stack([q, k, v], 2),
        "input": x,
        "hidden": x + _attend(x, block) if site == "mid" else x,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_rows_of_a_mask_in_extra():
    mask = jnp.zeros((B, N)).at[:, 3:5].set(1.0)
    tokens = MODEL.tokens(IMAGES).replace(extra={"text": mask})
    plan = Plan(((Site("mid", 0), Look((Ask("rows", rows="text"),))),))
    _, report = jax.jit(lambda t: MODEL.encode(t, plan=plan))(tokens)
    expected = probabilities(layer_input(0), MODEL.blocks[0])[:, :, 3:5].mean((1, 2))
    found = report.evidence["mid_0"]["rows_text"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_evidence_of_an_earlier_layer_moves_with_the_tokens():
    ask = Ask("column_mean", layer=-1)
    steps = (Site("after", 0), Pick()), (Site("mid", 1), Look((ask,)))
    found = run(*steps).evidence["mid_1"][ask.name]
    expected = pick(probabilities(layer_input(0), MODEL.blocks[0]).mean((1, 2)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_evidence_of_an_earlier_layer_is_averaged_by_merging():
    ask = Ask("keys", layer=-1)
    steps = (Site("after", 0), Pairs()), (Site("before", 1), Look((ask,)))
    found = run(*steps).evidence["before_1"][ask.name]
    keys = MODEL.blocks[0].project(Tokens(layer_input(0)))[1].mean(2)
    np.testing.assert_allclose(found, pairs(keys), rtol=1e-4, atol=1e-5)


def test_projections_of_a_later_layer():
    ask = Ask("keys", heads="all", layer=1)
    found = run((Site("after", 0), Look((ask,)))).evidence["after_0"][ask.name]
    expected = MODEL.blocks[1].project(Tokens(layer_input(1)))[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_two_reductions_at_one_site_share_moved_evidence():
    ask = Ask("rows")
    found = run((Site("mid", 1), Pick((ask,))), (Site("mid", 1), Look((ask,))))
    expected = pick(probabilities(layer_input(1), MODEL.blocks[1])[:, :, 0].mean(1))
    np.testing.assert_allclose(found.evidence["mid_1"][ask.name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "match"),
    [
        ((Site("before", 0), Look((Ask("keys", layer=-1),))), "did not store it"),
        ((Site("after", 2), Look((Ask("keys", layer=1),))), "the model has 3 layers"),
        ((Site("input"), Look((Ask("keys"),))), "gives 'hidden' or 'given'"),
        ((Site("mid", 0), Look((Ask("rows", rows="text"),))), "name of a mask"),
        ((Site("mid", 0), Look((Ask("column_mean", heads="all"),))), "heads='mean'"),
    ],
)
def test_evidence_that_is_not_there(step, match: str):
    with pytest.raises(ValueError, match=match) as error:
        run(step)
    assert "\n" not in str(error.value)
