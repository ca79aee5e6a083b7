"""One process, eight virtual CPU devices, checked shapes and types, a warm compile cache."""

import gc
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

# XLA reads these when jax is first imported. Tests compile far longer than they run, and half as
# long without fusion emitters.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # an XLA that does not know the flag would abort
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

import beartype
import hypothesis
import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

hypothesis.settings.register_profile(
    "tokred", deadline=None, max_examples=25, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("tokred")

_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """Checks the arguments and the result of a function, but not those of a constructor.

    A pytree dataclass is rebuilt by calling its constructor with whatever a transformation put in
    the leaves (None, a sharding, a ShapeDtypeStruct, an object()), so a checked one would break
    `jax.tree.map`. An int passes for a float, as for static checkers.
    """
    return function if function.__name__ == "__init__" else _beartype(function)


# Must come before the first import of tokred.
jaxtyping.install_import_hook("tokred", f"{__name__}.check")


# What was imported lives as long as the tests do, and traces leave much that is young.
gc.freeze()
gc.set_threshold(200_000, 20, 100)

MAPS = Path("/proc/self/maps")
MANY = 20_000  # Linux allows a process 65 530 mappings, then compiling aborts


@pytest.fixture(autouse=True)
def few_mappings() -> Iterator[None]:
    """Every program that XLA compiled holds mappings of memory: forgets them in time."""
    yield
    if MAPS.exists():
        with MAPS.open() as lines:
            many = sum(1 for _ in lines) > MANY
        if many:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def uncached() -> Iterator[None]:
    """Compiles anew: XLA's CPU programs that permute between devices crash when they are loaded
    from the persistent cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Runs a test without shape and type checks, as users do: for tokred's own error messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
