"""The safety checks of `corral doctor` on real files, sockets and processes: what is open is found, and has a fix."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from clients.doctor import security
from clients.doctor.doctor import run_checks
from deployments.auth.keys import KeyStore
from deployments.launch.certificates import certificate_files, create_certificate

# A process that says which port of which address it serves HTTP on, then waits for the end of its input.
_LISTEN = """
import socket, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

class Server(HTTPServer):
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET

class Silent(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

server = Server((sys.argv[1], 0), Silent)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port, flush=True)
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
    """A process that `ps` shows as `name`, listening on `host`; yields its pid and port."""
    with subprocess.Popen(
        [name, "-c", _LISTEN, host], executable=sys.executable, env=os.environ | environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())


@pytest.mark.parametrize("name", ["keys.json", "usage.db", "responses.db", "audit.jsonl", "certs/key.pem"])
def test_a_secret_that_others_can_read_is_named_with_the_fix(home: Path, name: str) -> None:
    path = home / name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch(mode=0o600)
    assert security.secret_files().status == "ok"
    path.chmod(0o640)
    check = security.secret_files()
    assert (check.status, check.fix) == ("error", f"chmod go-rwx {path}")
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
    assert check.status == "error"
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
        (match,) = (listener for listener in security.listeners() if listener.pid == pid)
        assert (match.name, match.port, match.is_loopback) == (name, port, loopback)
        check = security.open_ports()
    if not loopback:
        assert f"*:{port}" in check.found or "ports" in check.found  # other tests' Ray may run beside
        assert check.status == "note"
        assert "firewall" in check.fix or "corral serve --tls" in check.fix


def test_programs_of_others_are_none_of_rays() -> None:
    with process_named("some-server", "0.0.0.0") as (pid, _):
        assert pid not in {listener.pid for listener in security.listeners()}


@pytest.mark.parametrize("name", ["haproxy", "ray::ProxyActor"])
def test_http_beyond_this_machine_without_tls_says_that_keys_travel_in_clear(name: str) -> None:
    with process_named(name, "0.0.0.0") as (_, port):
        check = security.open_ports()
    assert re.search(rf"in cleartext to port [\d, ]*\b{port}\b.*corral serve --tls", check.fix)


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
    with process_named("plain") as (_, port):
        assert not security.speaks_tls("127.0.0.1", port)
        assert security.speaks_plain_http("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # such as a worker's gRPC
        assert not security.speaks_plain_http("127.0.0.1", silent.getsockname()[1])


@pytest.mark.parametrize(("days", "status"), [(825, "ok"), (29, "note")])
def test_a_certificate_that_ends_within_30_days_is_noted(days: int, status: str) -> None:
    assert security.certificate().status == "ok"
    create_certificate(days=days)
    check = security.certificate()
    assert check.status == status
    assert ("corral certs create" in check.fix) is (status != "ok")


def test_keys_that_end_within_a_week_are_named(home: Path) -> None:
    assert "none" in security.api_keys().found
    store, now = KeyStore(), datetime.now(UTC)
    store.create("lasting", ("chat",))
    store.create("later", ("chat",), expires=now + timedelta(days=8))
    assert (security.api_keys().status, security.api_keys().found) == ("ok", "2 valid")
    store.create("soon", ("chat",), expires=now + timedelta(days=6))
    gone, _ = store.create("gone", ("chat",), expires=now + timedelta(days=6))
    store.revoke(gone.id)
    check = security.api_keys()
    assert check.status == "note"
    assert "'soon'" in check.found
    assert not {"lasting", "later", "gone"} & {word.strip("',") for word in check.found.split()}
    assert "corral keys create" in check.fix


def test_doctor_runs_them_all() -> None:
    names = {check.name for check in run_checks()}
    assert {"secret files", "Ray's token", "Ray clusters", "open ports", "certificate", "API keys"} <= names
