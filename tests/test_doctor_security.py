"""The safety checks of `corral doctor` on real files, sockets and processes: what is open is found, and has a fix."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients import doctor_security as security
from clients.doctor import examine
from deployments.certificates import certificate_files, create_certificate

# A process that says which port of which address it listens on, then waits for the end of its input.
_LISTEN = """
import socket, sys
listening = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
listening.bind((sys.argv[1], 0))
listening.listen()
print(listening.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "corral"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "corral").mkdir(mode=0o700)
    return tmp_path / "corral"


@contextlib.contextmanager
def process_named(name: str, host: str = "127.0.0.1", **environment: str) -> Iterator[tuple[int, int]]:
    """A process that `ps` shows as `name`, listening at `host`; yields its id and port."""
    with subprocess.Popen(
        [name, "-c", _LISTEN, host], executable=sys.executable, env=os.environ | environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())


@pytest.mark.parametrize("name", ["keys.json", "usage.db", "audit.jsonl", "certs/key.pem"])
def test_a_secret_that_others_can_read_is_named_with_the_fix(home: Path, name: str) -> None:
    path = home / name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch(mode=0o600)
    assert security.secret_files().status == "ok"
    path.chmod(0o640)
    check = security.secret_files()
    assert (check.status, check.fix) == ("broken", f"chmod go-rwx {path}")
    assert f"{path}, mode 0640" in check.found
    subprocess.run(check.fix.split(), check=True)
    assert security.secret_files().status == "ok"


def test_rays_token_and_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert security.ray_token().status == "ok"
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch(mode=0o600)
    assert security.ray_token().found == f"{token}, mode 0600"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert security.ray_token().status == "note"
    assert "RAY_AUTH_MODE" in security.ray_token().fix
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert security.ray_token().status == "ok"
    token.chmod(0o644)
    assert security.ray_token().fix == f"chmod 600 {token}"


@pytest.mark.parametrize("mode", [{}, {"RAY_AUTH_MODE": "disabled"}])
def test_a_head_that_asks_for_no_token_is_broken(mode: dict[str, str]) -> None:
    with process_named("/opt/ray/gcs_server", **mode) as (pid, _):
        check = security.clusters()
    assert check.status == "broken"
    assert str(pid) in check.found
    assert "RAY_AUTH_MODE=token ray start" in check.fix


def test_a_head_that_asks_for_a_token_is_fine() -> None:
    with process_named("gcs_server", RAY_AUTH_MODE="token") as (pid, _):
        assert str(pid) not in security.clusters().found


@pytest.mark.parametrize(
    ("name", "host", "loopback"),
    [
        ("gcs_server", "0.0.0.0", False),
        ("gcs_server", "::", False),
        ("ray::ServeReplica:corral:LlamaModel", "0.0.0.0", False),
        ("haproxy", "0.0.0.0", False),
        ("raylet", "127.0.0.1", True),
        ("haproxy", "::1", True),
        ("ray::ProxyActor", "::ffff:127.0.0.1", True),
    ],
)
def test_what_listens_beyond_this_machine_is_listed(name: str, host: str, loopback: bool) -> None:
    with process_named(name, host) as (pid, port):
        (found,) = (listener for listener in security.listeners() if listener.pid == pid)
        assert (found.name, found.port, found.is_loopback) == (name, port, loopback)
        check = security.open_ports()
    assert (f"{name} *:{port}" in check.found) is not loopback
    if not loopback:
        assert check.status == "note"
        assert "firewall" in check.fix or "corral serve --tls" in check.fix


def test_programs_of_others_are_none_of_rays() -> None:
    with process_named("some-server", "0.0.0.0") as (pid, _):
        assert pid not in {listener.pid for listener in security.listeners()}


def test_http_beyond_this_machine_without_tls_says_that_keys_travel_in_clear() -> None:
    with process_named("haproxy", "0.0.0.0") as (_, port):
        check = security.open_ports()
        assert f"{port}" in check.fix
        assert "corral serve --tls" in check.fix


def test_a_tls_server_is_told_from_a_plain_one() -> None:
    create_certificate()
    script = (
        "import socket, ssl, sys\n"
        "context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
        "context.load_cert_chain(sys.argv[1], sys.argv[2])\n"
        "listening = socket.create_server(('127.0.0.1', 0))\n"
        "print(listening.getsockname()[1], flush=True)\n"
        "context.wrap_socket(listening.accept()[0], server_side=True)\n"
    )
    command = [sys.executable, "-c", script, *map(str, certificate_files())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert security.speaks_tls("127.0.0.1", int(process.stdout.readline()))
    with socket.create_server(("127.0.0.1", 0)) as plain:
        assert not security.speaks_tls("127.0.0.1", plain.getsockname()[1])


@pytest.mark.parametrize(("days", "status"), [(825, "ok"), (29, "note")])
def test_a_certificate_that_ends_within_30_days_is_noted(days: int, status: str) -> None:
    assert security.certificate().status == "ok"
    create_certificate(days=days)
    check = security.certificate()
    assert check.status == status
    assert ("corral certs create" in check.fix) is (status != "ok")


def test_doctor_runs_them_all() -> None:
    names = {check.name for check in examine()}
    assert {"secret files", "Ray's token", "Ray clusters", "open ports", "certificate"} <= names
