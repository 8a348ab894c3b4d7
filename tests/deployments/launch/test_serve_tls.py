"""`corral serve --tls` on a real server (C3): HTTPS and nothing else, by HAProxy on all interfaces with a key, and by
Ray's own proxy on loopback without; and that its Ray keeps to itself (D16), whatever the environment says.
"""

import contextlib
import os
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import yaml

from clients.api import CorralClient
from clients.doctor.security import Listener, listeners, speaks_plain_http
from deployments.auth.keys import KeyStore
from tests.conftest import serve_config, stop_server
from training.base_models.resolve import BaseCheckpoint

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class SecureServer:
    """`corral serve --tls` in a process of its own; `cluster` listens where RAY_ADDRESS says that a cluster is."""

    url: str
    config: Path
    certificate: Path
    key: str | None
    process: subprocess.Popen[bytes]
    log: Path
    cluster: socket.socket

    @property
    def trusted(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.certificate)

    def browser(self) -> httpx.Client:
        """Logged in to the page, where a key is required."""
        browser = httpx.Client(
            base_url=self.url, verify=self.trusted, trust_env=False, timeout=120, headers={"accept": "text/html"}
        )
        if self.key:
            response = browser.post("/ui/login", data={"key": self.key}, headers={"origin": self.url})
            assert response.status_code == 303, response.text
            assert "; Secure" in response.headers["set-cookie"]
        return browser


@pytest.fixture(scope="module", params=["0.0.0.0", "127.0.0.1"])
def secure(
    request: pytest.FixtureRequest, tiny_base: BaseCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecureServer]:
    folder, host = tmp_path_factory.mktemp("tls"), request.param
    (folder / "home").mkdir(mode=0o700)
    key = KeyStore(folder / "home" / "keys.json").create("test", ("chat",))[1] if host == "0.0.0.0" else None
    content = serve_config()
    content["http_options"]["host"] = host
    content["applications"][0]["args"] = {"base_model": str(tiny_base.path), "engine": {"max_model_len": 512}}
    config, log = folder / "serve.yaml", folder / "serve.log"
    config.write_text(yaml.safe_dump(content))
    with socket.create_server(("127.0.0.1", 0)) as cluster, log.open("wb") as output:
        environment = os.environ | {
            "CORRAL_HOME": str(folder / "home"),
            "RAY_ADDRESS": f"127.0.0.1:{cluster.getsockname()[1]}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_SERVE_ENABLE_HA_PROXY": "1" if host == "0.0.0.0" else "0",
        }
        command = [sys.executable, "-m", "clients.cli", "serve", str(config), "--tls"]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, umask=0)
        url = f"https://127.0.0.1:{content['http_options']['port']}"
        deadline = time.monotonic() + 300
        while f"API   {url}/v1" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.3)
        yield SecureServer(url, config, folder / "home" / "certs" / "cert.pem", key, process, log, cluster)
        assert process.poll() is None, log.read_text()[-4000:]
        assert stop_server(process) == 0, log.read_text()[-4000:]


@pytest.mark.promise("C3")
def test_api_and_page_answer_over_https_to_who_trusts_the_certificate(secure: SecureServer) -> None:
    with CorralClient(secure.url, secure.key, ca=secure.certificate) as client:
        (base,) = client.models()
        answer = client.chat("hi", model=base.id, temperature=0, max_tokens=8)
        assert "".join(client.stream("hi", model=base.id, temperature=0, max_tokens=8)) == answer
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(secure.url, trust_env=False)


@pytest.mark.promise("C3")
def test_the_page_knows_that_it_is_on_https(secure: SecureServer) -> None:
    with contextlib.closing(secure.browser()) as browser:
        assert browser.get("/ui/").status_code == 200
        root = browser.get("/ui/config").json()["root"]
    assert root == f"{secure.url}/ui"  # else the browser blocks the page's own requests


@pytest.mark.promise("C1")
def test_without_the_key_nobody_gets_in_over_tls_either(secure: SecureServer) -> None:
    with httpx.Client(base_url=secure.url, verify=secure.trusted, trust_env=False, timeout=120) as client:
        expected = 401 if secure.key else 200
        assert client.get("/v1/models").status_code == expected
        assert client.get("/ui/config").status_code == expected
        assert client.get("/readyz").status_code == 200


@pytest.mark.promise("C3")
def test_it_said_how_to_trust_it_and_the_key_is_its_owners_alone(secure: SecureServer) -> None:
    assert f"trust {secure.certificate}" in secure.log.read_text()
    key = secure.certificate.with_name("key.pem")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700


@pytest.mark.promise("C3")
def test_plain_http_gets_no_answer(secure: SecureServer) -> None:
    for path in ("/healthz", "/v1/models", "/ui/"):
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{secure.url.replace('https', 'http')}{path}", trust_env=False, timeout=120)


@pytest.mark.promise("C3")
@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_tls_below_1_2_is_refused_by_the_server(secure: SecureServer, newest: ssl.TLSVersion) -> None:
    context = secure.trusted
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
    context.set_ciphers("ALL:@SECLEVEL=0")  # the client would do it
    with (
        socket.create_connection(("127.0.0.1", httpx.URL(secure.url).port or 0)) as plain,
        pytest.raises(ssl.SSLError) as exc_info,
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")
    assert exc_info.value.reason in ("TLSV1_ALERT_PROTOCOL_VERSION", "UNEXPECTED_EOF_WHILE_READING")  # uvicorn hangs up


@pytest.mark.promise("C3")
def test_tls_1_2_is_spoken(secure: SecureServer) -> None:
    context = secure.trusted
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", httpx.URL(secure.url).port or 0)) as plain:
        assert context.wrap_socket(plain, server_hostname="127.0.0.1").version() == "TLSv1.2"


def beyond_this_machine(process: subprocess.Popen[bytes]) -> list[Listener]:
    """The addresses other than loopback that a process and its children listen on."""
    own = {process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))}
    return [listener for listener in listeners() if listener.pid in own and not listener.is_loopback]


@pytest.mark.promise("C3")
def test_beyond_this_machine_only_replicas_listen_and_they_ask_for_the_token(secure: SecureServer) -> None:
    listeners = beyond_this_machine(secure.process)
    haproxy = [listener for listener in listeners if listener.name == "haproxy"]
    assert {listener.address for listener in haproxy} == ({f"*:{httpx.URL(secure.url).port}"} if secure.key else set())
    replicas = [listener for listener in listeners if listener not in haproxy]
    assert replicas  # Ray does not let these be configured
    for replica in replicas:
        assert replica.name.startswith("ray::ServeReplica")
        assert refuses_calls_without_token(replica), replica


def refuses_calls_without_token(listener: Listener) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{listener.port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as exc_info:
            call(b"", timeout=120)
    return bool(exc_info.value.code() is grpc.StatusCode.UNAUTHENTICATED)


@pytest.mark.promise("C3")
def test_no_socket_answers_plain_http_to_strangers(secure: SecureServer) -> None:
    answering = [
        listener for listener in beyond_this_machine(secure.process) if speaks_plain_http("127.0.0.1", listener.port)
    ]
    assert answering == []


@pytest.mark.promise("D16")
def test_a_cluster_that_the_environment_names_is_never_joined(secure: SecureServer) -> None:
    secure.cluster.setblocking(False)
    with pytest.raises(BlockingIOError):
        secure.cluster.accept()


@pytest.mark.promise("D16")
def test_a_second_server_on_the_port_is_told_who_has_it(secure: SecureServer) -> None:
    command = [sys.executable, "-m", "clients.cli", "serve", str(secure.config)]
    home = {"CORRAL_HOME": str(secure.certificate.parent.parent)}
    result = subprocess.run(command, env=os.environ | home, capture_output=True, text=True, timeout=300, check=False)
    assert ("in clear" in result.stderr) is (secure.key is not None)  # all interfaces, and no --tls this time
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert f"another corral (pid {secure.process.pid})" in result.stderr
