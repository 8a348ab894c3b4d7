"""On a running Ray cluster, by Ray's own commands: `serve deploy`, then a training job. The new
adapter answers on the server that was there before it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import ray_head, serve_config, wait_until_up
from training.base_models.resolve import BaseCheckpoint

_BIN = Path(sys.executable).parent


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of the dashboard of a cluster with token authentication."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-this-test")
    with ray_head(dict(os.environ)) as address:
        yield address


def _run(*command: str, dashboard: str) -> str:
    """Runs one of Ray's commands against the cluster; returns its output."""
    result = subprocess.run(
        [str(_BIN / command[0]), *command[1:]],
        env=os.environ | {"RAY_API_SERVER_ADDRESS": dashboard, "RAY_DASHBOARD_ADDRESS": dashboard},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


@pytest.mark.slow
def test_a_job_trains_what_a_deployed_server_answers_with(
    dashboard: str, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    content = serve_config()
    content["applications"][0]["args"] = {"base_model": str(tiny_base.path), "engine": {"max_model_len": 512}}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(content))
    url = f"http://127.0.0.1:{content['http_options']['port']}"
    _run("serve", "deploy", str(tmp_path / "serve.yaml"), dashboard=dashboard)
    wait_until_up(f"{url}/readyz", 300)
    wait_until_up(f"{url}/ui/", 300)

    changes = [f"base_model={tiny_base.path}", "adapter=from-a-job", "max_steps=3", "max_length=128"]
    recipe = ["--config", "configs/train/quickstart.yaml", *changes]
    output = _run(
        "ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "training", *recipe, dashboard=dashboard
    )
    assert "tiny-llama:from-a-job@1 is registered" in output
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json={
            "model": "tiny-llama:from-a-job",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 4,
        },
        timeout=300,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "tiny-llama:from-a-job@1"
    _run("serve", "shutdown", "--yes", dashboard=dashboard)
