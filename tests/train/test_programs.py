"""Where compiled programs are kept."""

from pathlib import Path

import jax
import pytest

from tokred.train.mesh import make_mesh
from tokred.train.programs import CONFIG, keep_programs

ONE = make_mesh((1,), ("data",), jax.devices()[:1])


@pytest.fixture
def unset():
    """No directory is configured; what was is put back."""
    before = CONFIG.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_in_the_users_cache(unset, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = keep_programs(ONE)
    assert found is not None and found.parent == tmp_path / "tokred"
    assert found.name.startswith("xla-") and keep_programs(ONE) == found
    assert CONFIG.jax_compilation_cache_dir == str(found)


def test_where_it_is_configured():
    assert keep_programs(ONE) == Path(CONFIG.jax_compilation_cache_dir)


def test_not_those_of_several_cpu_devices(unset):
    assert keep_programs(make_mesh((2,), ("data",), jax.devices()[:2])) is None
    assert CONFIG.jax_compilation_cache_dir is None


def test_none_where_caching_is_off(unset):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert keep_programs(ONE) is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
