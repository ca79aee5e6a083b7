"""Every mistake gets one sentence that names the field and what to change."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import pytest
from flax import nnx

from tokred.methods import get_method, make_plan
from tokred.methods.topk import TopK
from tokred.models import ViT, ViTConfig, vit_config
from tokred.plan import Ask, Plan, Site

CONFIG = ViTConfig(image_size=(8, 12), patch=(4, 4), width=16, depth=4, heads=2, classes=3)
LAYOUT = CONFIG.layout
NO_CLASS = dataclasses.replace(CONFIG, class_token=False, pool="mean").layout
MODEL = nnx.jit(lambda: ViT(CONFIG, rngs=nnx.Rngs(0)))()
IMAGES = jnp.zeros((2, 8, 12, 3))


def steps(*counts: int) -> Plan:
    return Plan(tuple((Site("mid", i), TopK(k)) for i, k in enumerate(counts)), name="mine")


def learned() -> Plan:
    return make_plan("dynamicvit", LAYOUT)


# (what is done, words that must be there: the field, what was got, the fix)
CASES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "method": (lambda: get_method("topkk"), ("method 'topkk'", "did you mean 'topk'")),
    "plan_method": (lambda: make_plan("diffrat", LAYOUT), ("did you mean 'diffrate'",)),
    "option": (
        lambda: make_plan("evit", LAYOUT, fused=True),
        ("'evit'", "'fused'", "did you mean 'fuse'", "keep, layers, fuse"),
    ),
    "keep_0": (lambda: make_plan("topk", LAYOUT, keep=0.0), ("keep=0.0", "(0, 1]")),
    "keep_2": (lambda: make_plan("tome", LAYOUT, keep=2), ("keep=2", "(0, 1]")),
    "keep_nan": (lambda: make_plan("evit", LAYOUT, keep=float("nan")), ("keep=nan", "(0, 1]")),
    "dense_keep": (lambda: make_plan("dense", LAYOUT, keep=0.5), ("keep=0.5", "another method")),
    "no_token_left": (lambda: steps(0).counts(LAYOUT), ("mid_0", "leave 1 of 7", "[2, 7]")),
    "more_than_left": (lambda: steps(3, 4).counts(LAYOUT), ("mid_1", "leave 5 of 4", "[2, 4]")),
    "rates_more_than_left": (
        lambda: make_plan("diffrate", LAYOUT, prune=[7, 7, 7, 0], merge=[7, 7, 7, 0]),
        ("mid_3", "leave 0 of 7"),
    ),
    "long_schedule": (
        lambda: make_plan("tome", LAYOUT, r=[1, 1, 1, 1, 1]),
        ("5 entries", "4 layers", "shorten"),
    ),
    "long_rates": (
        lambda: make_plan("diffrate", LAYOUT, prune=[7] * 5, merge=[7] * 5),
        ("prune and merge", "4 counts"),
    ),
    "layer_outside": (
        lambda: make_plan("topk", LAYOUT, layers=(1, 9)),
        ("mid_9", "4 layers", "0..3"),
    ),
    "preset": (lambda: make_plan("diffrate", LAYOUT, preset="deit_x"), ("preset='deit_x'",)),
    "patch": (
        lambda: ViTConfig(image_size=(30, 32), patch=(16, 16)),
        ("image_size=(30, 32)", "patch=(16, 16)", "change"),
    ),
    "class_token": (
        lambda: make_plan("topk", NO_CLASS),
        ("'topk'", "class token", "class_token=True"),
    ),
    "class_row": (
        lambda: steps(3).counts(NO_CLASS),
        ("mine", "class token", "class_token=True"),
    ),
    "shape": (
        lambda: MODEL(jnp.zeros((2, 9, 12, 3))),
        ("(B, 8, 12, 3)", "(2, 9, 12, 3)", "image_size"),
    ),
    "rank": (lambda: MODEL(IMAGES[0]), ("(B, 8, 12, 3)", "(8, 12, 3)")),
    "nan": (lambda: MODEL(IMAGES.at[0, 0].set(jnp.nan)), ("images", "NaN", "clean")),
    "no_module": (
        lambda: MODEL(IMAGES, plan=learned()),
        ("DynamicViT", "no module", "plan="),
    ),
    "no_key": (
        lambda: MODEL(IMAGES, plan=make_plan("random", LAYOUT)),
        ("'random'", "key", "Call(key="),
    ),
    "size": (lambda: vit_config("vit_m16"), ("'vit_m16'", "vit_s16", "did you mean")),
    "field": (
        lambda: vit_config("vit_s16", widht=3),
        ("'widht'", "did you mean 'width'"),
    ),
    "position": (lambda: ViTConfig(position="sincoss"), ("position='sincoss'", "'sincos'")),
    "pool": (lambda: ViTConfig(class_token=False), ("pool='class'", "pool='mean'")),
    "heads": (
        lambda: ViT(dataclasses.replace(CONFIG, heads=3), rngs=nnx.Rngs(0)),
        ("width=16", "heads=3", "multiple"),
    ),
    "site": (lambda: Site("midd", 1), ("'midd'", "did you mean 'mid'")),
    "site_layer": (lambda: Site("input", 1), ("'input'", "layer=1")),
    "ask": (lambda: Ask("row"), ("'row'", "did you mean 'rows'")),
    "twin": (lambda: Plan(twin="hard"), ("twin='hard'", "'soft'")),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", CASES)
def test_one_sentence(case: str):
    act, words = CASES[case]
    with pytest.raises(ValueError) as error:
        act()
    _is_one_sentence(str(error.value), words)


@pytest.mark.usefixtures("unchecked")
def test_integer_pixels():
    with pytest.raises(TypeError) as error:
        MODEL(jnp.zeros((2, 8, 12, 3), jnp.uint8))
    _is_one_sentence(str(error.value), ("images", "uint8", "255"))


def _is_one_sentence(text: str, words: tuple[str, ...]) -> None:
    assert "\n" not in text and len(text) < 400, text
    assert [word for word in words if word not in text] == [], text
