"""Where the cache is, also for users without a home."""

from __future__ import annotations

from pathlib import Path

import pytest

from mc_runtime.cache import cache_root, compiled_cache
from mc_runtime.errors import OutputError


def test_places_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_RUNTIME_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("MC_RUNTIME_CACHE")
    assert cache_root() == tmp_path / "shared" / "mc-runtime"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "mc-runtime"


def test_a_user_without_a_home_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MC_RUNTIME_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert compiled_cache() is None
    with pytest.raises(OutputError, match="set MC_RUNTIME_CACHE"):
        cache_root()
