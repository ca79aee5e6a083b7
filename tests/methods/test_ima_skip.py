"""IMA's skipping: which layers, which branch, which tokens, in which phase."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import around
from tests.methods.around import CONFIG, GENERATED, IDS, VALID, N, Setting, close, forward
from tokred.methods import make_plan
from tokred.methods.ima_skip import MODES, skipped_layers
from tokred.tokens import make_tokens

LAYERS = (1, 2)
ALL = {mode: Setting("ima_skip", {"mode": mode, "interval": 1}) for mode in MODES}
PREFIX = Setting("ima_skip", {"interval": 1, "prefix": 6})
PLACES = {"generated": GENERATED}
PREFILL, DECODE = (
    Setting("ima_skip", {"mode": mode, "interval": 1, "phase": phase}, PLACES)
    for mode, phase in (("skip_attn", "prefill"), ("skip_block", "decode"))
)
PERCEPTION = Setting("ima_skip", {"interval": 1, "prefix": 6, "phase": "prefill"}, PLACES)


def test_layers():
    assert skipped_layers(32, 2) == tuple(range(2, 31, 2))
    assert skipped_layers(32, 4, start=8, end=20) == (12, 16)
    assert skipped_layers(32, [2, 4]) == (*range(2, 16, 2), *range(16, 31, 4))
    assert skipped_layers(8, 1, end=99) == tuple(range(1, 8))
    assert [site.layer for site, _ in ALL["skip_ffn"].plan.steps] == list(LAYERS)


def test_keep_is_a_share_of_layers():
    layers = lambda keep: len(make_plan("ima_skip", CONFIG.layout, keep=keep).steps)  # noqa: E731
    assert [layers(keep) for keep in (0.2, 0.5, 0.7, 0.9, 1.0)] == [2, 1, 0, 0, 0]
    around.check_dense("ima_skip")


@functools.partial(jax.jit, static_argnames="mode")
def by_hand(model, ids, skips, mode):
    """All layers; in `LAYERS` the tokens that skip the branch leave no keys there."""
    place = jnp.broadcast_to(1.0 * jnp.arange(N), ids.shape)[..., None]
    x = model.embed(ids)
    for layer, block in enumerate(model.blocks):
        skip = skips & (layer in LAYERS)
        hidden = skip & (mode != "skip_ffn")
        tokens = make_tokens(x, position=place).replace(valid=VALID & ~hidden)
        y = x + block.attend(*block.project(tokens), tokens, tokens)
        x = jnp.where(hidden[..., None], x, y)
        x = x + block.feed(x) * ~(skip & (mode != "skip_attn"))[..., None]
    return model.embed.attend(model.norm(x))


@pytest.mark.parametrize("mode", MODES)
def test_everything_skips(mode):
    setting = ALL[mode]
    got, report = setting.run("packed")
    close(got[VALID], by_hand(setting.model, IDS, jnp.ones(IDS.shape, bool), mode)[VALID])
    inside = report.counts[2]
    assert (inside.queries, inside.mlp) == {
        "skip_ffn": (N, 0), "skip_attn": (0, N), "skip_block": (0, 0)
    }[mode]  # fmt: skip
    assert setting.plan.counts(CONFIG.layout) == setting.plan.with_twin("causal").counts(
        CONFIG.layout
    )


def test_only_the_prefix_skips():
    got, report = PREFIX.run("packed")
    skips = jnp.broadcast_to(jnp.arange(N)[None] < 6, IDS.shape)
    close(got[VALID], by_hand(PREFIX.model, IDS, skips, "skip_ffn")[VALID])
    assert report.counts[1].mlp == N - 6
    around.check_twins_agree(PREFIX)


def test_padding_changes_nothing():
    around.check_padding(PREFIX)


@pytest.mark.parametrize("setting", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_phases_by_hand(setting):
    mode, phase = setting.options["mode"], setting.options["phase"]
    skips = GENERATED < 0 if phase == "prefill" else GENERATED >= 0
    got, _ = setting.run("causal")
    close(got[VALID], by_hand(setting.model, IDS, skips, mode)[VALID])


@pytest.mark.parametrize(
    ("setting", "prefill"),
    [(PREFILL, "packed"), (DECODE, "causal"), (PERCEPTION, "packed")],
    ids=["prefill", "decode", "perception"],
)
def test_decoding_in_phases(setting, prefill):
    around.check_decoding(setting, prefill, told=True)


def test_a_skipped_attention_holds_no_keys():
    setting = ALL["skip_attn"]
    around.check_decoding(setting)
    cache = setting.model.make_cache(1, N, plan=setting.plan)
    assert [layer.capacity for layer in cache.layers] == [N, 1, 1, N]
    _, cache, _ = around.extend(setting.model, IDS[:1, :5], cache, plan=setting.plan, fresh=True)
    np.testing.assert_array_equal(cache.occupancy(), [[5, 0, 0, 5]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "skip_mlp"}, "mode='skip_mlp' must be one of"),
        ({"phase": "train"}, "phase='train' must be one of"),
        ({"interval": 0}, "interval=0 must be at least 1"),
        ({"interval": [2, 0]}, r"interval=\[2, 0\] must be at least 1"),
        ({"prefix": 0}, "prefix=0 must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan("ima_skip", CONFIG.layout, **options)


def test_phases_need_places():
    plan = PREFILL.plan.with_twin("causal")
    with pytest.raises(ValueError, match="needs the per-token array 'generated'"):
        forward(PREFILL.model, IDS, plan=plan)
