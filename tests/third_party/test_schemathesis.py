"""schemathesis over /openapi.json on the running server: 2,000 examples or more, no 500, every answer as documented."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.auth.keys import KeyStore
from tests.conftest import RunningServer

HERE = Path(__file__).parent


@pytest.fixture
def key(server: RunningServer) -> Iterator[str]:
    """A key with every scope; without it no route may answer (C1)."""
    store = KeyStore()
    _, key = store.create("schemathesis", ("admin",))
    yield key
    store.path.unlink()


@pytest.mark.promise("C1")
def test_b_schemathesis_finds_nothing(server: RunningServer, key: str, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        f"--config-file={HERE / 'schemathesis.toml'}",
        "run",
        f"{server.url}/openapi.json",
        f"--header=Authorization: Bearer {key}",
        "--max-examples=250",
        "--continue-on-failure",
        "--seed=1",
        "--no-color",
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.third_party.schemathesis_hooks", "SERVED_MODEL": server.base_model}
    result = subprocess.run(
        command, env=os.environ | hooks, capture_output=True, text=True, timeout=900, cwd=HERE.parents[1]
    )
    (tmp_path / "schemathesis.log").write_text(result.stdout + result.stderr)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    counted = re.search(r"(\d[\d,]*) generated", result.stdout)
    assert counted is not None, result.stdout[-2000:]
    print(f"\nschemathesis: {counted[1]} examples")
    assert int(counted[1].replace(",", "")) >= 2000
