"""The token of a Ray that Corral starts (C3): created before Ray could write it world-readable, and never disabled."""

import os
import stat
from pathlib import Path

import pytest

from training.local_ray.start import require_token


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".ray" / "auth_token"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.promise("C3")
def test_the_token_is_its_owners_alone_and_the_environment_cannot_turn_it_off(token: Path) -> None:
    before = os.umask(0)
    try:
        require_token()
    finally:
        os.umask(before)
    assert mode(token) == 0o600
    assert len(bytes.fromhex(token.read_text())) == 32
    assert "RAY_AUTH_MODE" not in os.environ  # then Ray's default for a local cluster is the token


@pytest.mark.promise("C3")
def test_a_token_that_is_there_is_kept_and_closed_to_others(token: Path) -> None:
    token.parent.mkdir()
    token.write_text("a-token")
    token.chmod(0o644)
    require_token()
    assert (token.read_text(), mode(token)) == ("a-token", 0o600)


def test_a_token_of_the_environment_needs_no_file(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
    require_token()
    assert not token.exists()
