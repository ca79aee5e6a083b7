"""The connector that the guide writes: short, and a whole connector."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tokred.methods import make_plan, registry
from tokred.models import ViT, ViTConfig

GUIDE = Path(__file__).parents[1] / "docs" / "matryoshka.md"
START, END = "<!-- own-connector:start -->", "<!-- own-connector:end -->"
CONFIG = ViTConfig(
    image_size=(16, 24), patch=(4, 4), width=16, depth=2, heads=2, classes=5, pool="mean"
)


@pytest.fixture(scope="module")
def code() -> Iterator[str]:
    """Registers the connector of the guide for this module only."""
    text = GUIDE.read_text()
    assert text.count(START) == text.count(END) == 1, f"{GUIDE.name} needs {START} and {END} once"
    code = text.split(START)[1].split(END)[0].split("```python\n")[1].split("```")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_METHODS", dict(registry._METHODS))
        exec(compile(code, str(GUIDE), "exec"), {"__name__": "own"})
        yield code


def test_it_is_short(code: str):
    assert len(code.strip().splitlines()) <= 30


@pytest.mark.usefixtures("code")
def test_it_learns_and_leaves_a_quarter():
    plan = make_plan("glance", CONFIG.layout, keep=0.25)
    model = ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    images = jax.random.normal(jax.random.key(0), (2, 16, 24, 3))

    def loss(params: Any) -> Any:
        logits, report = nnx.merge(graph, params, rest)(images, plan=plan)
        return jnp.square(logits).mean(), report.tokens.n

    (_, left), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert left == 1 + 6
    for leaf in jax.tree.leaves(gradient["reductions"]):
        assert jnp.isfinite(leaf).all()
        assert leaf.any()
