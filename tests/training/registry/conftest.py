"""An empty registry, and a CORRAL_HOME of the test's own."""

from pathlib import Path

import pytest

from training.base_models.resolve import BaseCheckpoint
from training.registry.registry import AdapterRegistry


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: BaseCheckpoint) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "registry")
