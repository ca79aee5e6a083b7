"""Compiled programs, kept for the next run."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

CONFIG: Any = jax.config  # its fields are not declared


def keep_programs(mesh: Mesh) -> Path | None:
    """Where programs are kept that took a second or more to compile: jax_compilation_cache_dir if
    it is set, else tokred/xla-MACHINE in the user's cache. JAX_ENABLE_COMPILATION_CACHE=0 keeps
    none.

    None for several CPU devices, as in tests of sharding: XLA reads such programs back wrongly.
    """
    several = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    if several or not CONFIG.jax_enable_compilation_cache:
        return None
    where = CONFIG.jax_compilation_cache_dir
    if where is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        where = str(cache / "tokred" / f"xla-{_machine()}")
        jax.config.update("jax_compilation_cache_dir", where)
        compilation_cache.reset_cache()  # else what was compiled before has settled it
    return Path(where)


def _machine() -> str:
    """Of machines that share a home, each kind of processor runs its own programs."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else [platform.processor()]
    told = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return hashlib.sha256(told.encode()).hexdigest()[:8]
