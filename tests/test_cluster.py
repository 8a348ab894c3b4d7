"""On a running Ray cluster, by Ray's own commands: `serve deploy`, then a training that comes as a job. The new
adapter answers on the server that was there before it.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import free_port, is_up, serve_config
from training.base_models import BaseModel

_BIN = Path(sys.executable).parent
_TOKEN = "a-token-of-this-test"


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a cluster's dashboard: a head node of its own with 4 logical CPUs and token authentication."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", _TOKEN)
    monkeypatch.setenv("PATH", f"{_BIN}:{os.environ['PATH']}")  # a job runs the head's python
    port = free_port()
    own_ports = ("port", "ray-client-server-port", "dashboard-agent-listen-port")  # other tests' Ray has the usual ones
    options: dict[str, int | str] = {name: free_port() for name in own_ports} | {"dashboard-port": port, "num-cpus": 4}
    with tempfile.TemporaryDirectory(prefix="corral-", dir="/tmp") as scratch:  # Ray's sockets need a short path
        options |= {"temp-dir": scratch, "node-ip-address": "127.0.0.1"}
        command = [str(_BIN / "ray"), "start", "--head", "--block", *(f"--{key}={options[key]}" for key in options)]
        with Path(scratch, "ray.log").open("wb") as log:
            head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/version", 60)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(head.pid, signal.SIGKILL)  # on SIGTERM it would drain the node for half a minute
            head.wait(timeout=60)


def _wait_for(url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_up(url, {"Authorization": f"Bearer {_TOKEN}"}):
            return
        time.sleep(0.3)
    raise AssertionError(f"{url} does not answer")


def _run(*command: str, dashboard: str) -> str:
    """One of Ray's commands against the cluster; returns what it printed."""
    done = subprocess.run(
        [str(_BIN / command[0]), *command[1:]],
        env=os.environ | {"RAY_API_SERVER_ADDRESS": dashboard, "RAY_DASHBOARD_ADDRESS": dashboard},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_a_job_trains_what_a_deployed_server_answers_with(dashboard: str, tiny_base: BaseModel, tmp_path: Path) -> None:
    content = serve_config()
    content["applications"][0]["args"] = {"base_model": str(tiny_base.path), "engine": {"max_model_len": 512}}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(content))
    url = f"http://127.0.0.1:{content['http_options']['port']}"
    _run("serve", "deploy", str(tmp_path / "serve.yaml"), dashboard=dashboard)
    _wait_for(f"{url}/readyz", 240)
    _wait_for(f"{url}/ui/", 60)

    changes = [f"base_model={tiny_base.path}", "adapter=from-a-job", "max_steps=3", "max_length=128"]
    recipe = ["--config", "configs/train/quickstart.yaml", *changes]
    printed = _run(
        "ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "training", *recipe, dashboard=dashboard
    )
    assert "tiny-llama:from-a-job@1 is registered" in printed
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json={
            "model": "tiny-llama:from-a-job",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 4,
        },
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "tiny-llama:from-a-job@1"
    _run("serve", "shutdown", "--yes", dashboard=dashboard)
