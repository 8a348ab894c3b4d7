"""Commands of the READMEs that no other test runs, as typed; training is cut to a few steps."""

import os
import re
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.launch.certificates import certificate_files, create_certificate
from tests.conftest import QUICKSTART_HOME, free_port
from tests.deployments.launch.test_certificates import https_server
from training.registry.manifest import AdapterManifest

_BIN = Path(sys.executable).parent


def run(*command: str, **environment: str) -> str:
    """Runs a command that must succeed; returns its output."""
    result = subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def corral(*arguments: str) -> str:
    return run(sys.executable, "-m", "clients.cli", *arguments)


@pytest.mark.slow
def test_demo_asks_base_and_adapter_and_stops(quickstart: AdapterManifest) -> None:
    output = corral("demo", "--once", "--port", str(free_port()))
    assert f"{quickstart.model_id} is already registered: training is skipped" in output
    assert "taught facts answered: base 0/20, adapter " in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("train", "configs/train/quickstart_dpo.yaml"),
        ("train", "configs/train/quickstart_kto.yaml"),
        (
            "sweep",
            "configs/sweep/quickstart.yaml",
            "sweep.num_samples=1",
            "sweep.scheduler=fifo",
            "sweep.grace_period=1",
        ),
    ],
    ids=lambda command: Path(command[1]).stem,
)
def test_recipe_trains(quickstart: AdapterManifest, command: tuple[str, ...]) -> None:
    adapter = f"{Path(command[1]).stem.replace('_', '-')}-cut"
    cut = ("max_steps=2", "data.max_rows=40", "sample_prompts=0", f"adapter={adapter}")
    assert f":{adapter}@1" in corral(*command, "--force", *cut)


def test_runs_are_listed_shown_and_followed(quickstart: AdapterManifest) -> None:
    run_name, where = str(quickstart.run_name), ("--storage", str(QUICKSTART_HOME / "runs"))
    assert run_name in corral("runs", "list", *where)
    assert "finished" in corral("runs", "show", run_name, *where)
    assert len(re.findall("^.*step [0-9]+/", corral("runs", "logs", run_name, "--follow", *where), re.MULTILINE)) > 10


@pytest.mark.slow
def test_the_bare_engine_is_measured_without_a_compiler() -> None:
    levels = ("--concurrency", "1", "--num-requests", "1", "--max-tokens", "4")
    output = run(sys.executable, "-m", "deployments.engine.bench", *levels, CXX="none")
    assert "tokens/s" in output


def test_ssl_cert_file_is_what_python_programs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))  # a certificate is never overwritten
    create_certificate([])
    certificate, key = certificate_files()
    with https_server(certificate, key) as url:
        code = f"import httpx; print(httpx.get({url!r}).status_code)"
        trusting = {"SSL_CERT_FILE": str(certificate), "NO_PROXY": "127.0.0.1"}
        assert run(sys.executable, "-c", code, **trusting) == "200\n"
        default = ssl.create_default_context()
        assert default.verify_mode is ssl.CERT_REQUIRED
        result = subprocess.run([sys.executable, "-c", code], env=os.environ | {"NO_PROXY": "127.0.0.1"}, check=False,
                                 capture_output=True, text=True)  # fmt: skip
        assert "CERTIFICATE_VERIFY_FAILED" in result.stderr


def test_ray_makes_a_token(tmp_path: Path) -> None:
    run(str(_BIN / "ray"), "get-auth-token", "--generate", HOME=str(tmp_path), RAY_AUTH_MODE="token")
    assert (tmp_path / ".ray" / "auth_token").read_text().strip()
