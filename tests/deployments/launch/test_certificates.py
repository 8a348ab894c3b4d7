"""`corral certs` (C3): who can read the key, which hosts the certificate covers, and that clients can verify it."""

import contextlib
import datetime
import json
import os
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from openai import DefaultHttpxClient, OpenAI
from typer.testing import CliRunner, Result

from clients.api import CorralClient, ServerError
from clients.cli.main import app
from deployments.errors import CertificateError, ServeConfigError
from deployments.launch.certificates import certificate_files, create_certificate, read_certificate
from deployments.launch.tls import check_tls_files, context_trusting

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def corral(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["certs", *arguments])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def loaded() -> x509.Certificate:
    return x509.load_pem_x509_certificate(certificate_files()[0].read_bytes())


def extension(kind: type[_Extension]) -> x509.Extension[_Extension]:
    return loaded().extensions.get_extension_for_class(kind)


@pytest.mark.promise("C3")
@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_the_key_is_its_owners_alone_whatever_the_umask(home: Path, umask: int) -> None:
    home.mkdir(mode=0o700)
    before = os.umask(umask)
    try:
        create_certificate()
    finally:
        os.umask(before)
    certificate, key = certificate_files()
    assert (mode(certificate.parent), mode(key), mode(certificate)) == (0o700, 0o600, 0o644)


@pytest.mark.promise("C3")
def test_the_key_is_never_open_to_others_not_even_while_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, int] = {}
    real = os.open

    def open_and_record(path: str | Path, flags: int, *rest: int, **options: int) -> int:
        descriptor = real(path, flags, *rest, **options)
        opened[Path(path).name] = stat.S_IMODE(os.fstat(descriptor).st_mode)  # before a byte is in it
        return descriptor

    monkeypatch.setattr(os, "open", open_and_record)
    before = os.umask(0)
    try:
        create_certificate()
    finally:
        os.umask(before)
    assert opened["key.pem"] == 0o600


@pytest.mark.promise("C3")
def test_it_is_valid_for_the_hosts_this_machine_and_loopback() -> None:
    created = create_certificate(["Llama.example.org", "192.0.2.7", "2001:db8::1", "*.corral.test"])
    hosts = ("llama.example.org", "192.0.2.7", "2001:db8::1", "*.corral.test")
    assert created.hosts == (*hosts, socket.gethostname(), "localhost", "127.0.0.1", "::1")
    names = extension(x509.SubjectAlternativeName).value
    assert len(names.get_values_for_type(x509.IPAddress)) == 4  # as addresses: clients compare no text


@pytest.mark.promise("C3")
def test_it_is_a_p_256_server_certificate_that_signs_for_nobody_else() -> None:
    create_certificate()
    key = loaded().public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert list(extension(x509.ExtendedKeyUsage).value) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    assert extension(x509.BasicConstraints).critical
    assert extension(x509.BasicConstraints).value.ca is False
    assert extension(x509.KeyUsage).value.key_cert_sign is False


@pytest.mark.promise("C3")
def test_it_lasts_at_most_825_days() -> None:
    create_certificate()
    lasts = loaded().not_valid_after_utc - loaded().not_valid_before_utc + datetime.timedelta(seconds=1)
    assert lasts == datetime.timedelta(days=825)
    assert loaded().not_valid_before_utc < datetime.datetime.now(datetime.UTC)


@pytest.mark.promise("C3")
@pytest.mark.parametrize("days", ["826", "0", "-1"])
def test_other_lives_are_refused(days: str) -> None:
    result = corral("create", "--days", days)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "825" in result.stderr
    assert not certificate_files()[0].exists()


@pytest.mark.parametrize(
    "host", ["https://example.org", "a b", "example.org:443", "", "-x.org", "münchen.de", "a" * 64]
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(CertificateError, match="not a valid host"):
        create_certificate([host])


@pytest.mark.promise("C3")
@pytest.mark.parametrize("existing", ["cert.pem", "key.pem"])
def test_an_existing_file_is_never_overwritten(existing: str) -> None:
    create_certificate()
    contents = {path: path.read_bytes() for path in certificate_files()}
    for path in contents:
        if path.name != existing:
            path.unlink()
    result = corral("create")
    assert result.exit_code == 1
    assert existing in result.stderr
    assert "move" in result.stderr
    (path,) = (path for path in contents if path.name == existing)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == contents[path]


@pytest.mark.promise("C3")
def test_git_ignores_them() -> None:
    for name in ("certs/cert.pem", "certs/key.pem", "server.key", "server.crt", "keys.json"):
        assert subprocess.run(["git", "check-ignore", "-q", name], check=False).returncode == 0, name


def test_show_tells_what_openssl_tells_and_warns_before_the_end(home: Path) -> None:
    assert "corral certs create" in corral("show").stderr
    assert corral("create", "--host", "example.org", "--days", "29").exit_code == 0
    output = corral("show")
    pem = certificate_files()[0]
    expected = subprocess.run(
        ["openssl", "x509", "-in", str(pem), "-noout", "-fingerprint", "-sha256"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected.stdout.strip().partition("=")[2] in output.stdout
    for part in (str(pem), "example.org, ", "28 days"):
        assert part in output.stdout
    assert output.stderr.startswith("warning: ")
    as_json = json.loads(corral("show", "--json").stdout)
    assert as_json["days_left"] == 28
    assert as_json["hosts"][0] == "example.org"


def test_show_does_not_warn_long_before_the_end() -> None:
    assert corral("create").exit_code == 0
    assert corral("show").stderr == ""


def test_a_file_that_is_no_certificate_is_one_line(home: Path) -> None:
    certificate_files()[0].parent.mkdir(parents=True)
    certificate_files()[0].write_text("nonsense")
    result = corral("show")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "PEM" in result.stderr


@contextlib.contextmanager
def https_server(certificate: Path, key: Path) -> Iterator[str]:
    """A server over TLS that answers every GET with an empty list of models."""

    class Models(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"object": "list", "data": []}'
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def strict(path: Path) -> ssl.SSLContext:
    """The default of Python 3.13."""
    context = ssl.create_default_context(cafile=path)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


@pytest.mark.promise("C3")
def test_clients_that_trust_the_file_verify_the_server() -> None:
    create_certificate()
    pem, key = certificate_files()
    with https_server(pem, key) as url:
        for name in ("127.0.0.1", "localhost"):
            named_url = url.replace("127.0.0.1", name)
            assert httpx.get(named_url, verify=strict(pem), trust_env=False).status_code == 200
        http = DefaultHttpxClient(verify=ssl.create_default_context(cafile=pem), trust_env=False)
        with OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as openai:
            assert openai.models.list().data == []
        with CorralClient(url, ca=pem) as client:
            assert client.models() == []
        assert httpx.get(url, verify=context_trusting(str(pem)), trust_env=False).status_code == 200


@pytest.mark.promise("C3")
def test_clients_that_do_not_trust_it_are_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_certificate()
    pem, key = certificate_files()
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "other"))
    create_certificate()  # an impostor's
    with https_server(pem, key) as url:
        for ca in (None, certificate_files()[0]):
            with CorralClient(url, ca=ca) as client, pytest.raises(ServerError, match=r"not trusted.*--ca FILE"):
                client.models()
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(url, verify=context_trusting(str(certificate_files()[0])), trust_env=False)


def test_chat_refuses_a_ca_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for file in ("none.pem", "empty.pem"):
        result = CliRunner().invoke(app, ["chat", "hi", "--ca", str(tmp_path / file)])
        assert result.exit_code == 1
        assert file in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.promise("C3")
def test_files_that_https_cannot_be_served_with_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_certificate()
    pem, key = map(str, certificate_files())
    check_tls_files(pem, key)
    Path(key).chmod(0o640)
    with pytest.raises(ServeConfigError, match=f"mode 0640.*chmod 600 {key}"):
        check_tls_files(pem, key)
    Path(key).chmod(0o600)
    with pytest.raises(ServeConfigError, match="absolute"):
        check_tls_files("cert.pem", key)
    for certificate in (str(tmp_path / "none.pem"), str(tmp_path)):
        with pytest.raises(ServeConfigError, match="cannot be read"):
            check_tls_files(certificate, key)
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "other"))
    create_certificate()
    with pytest.raises(ServeConfigError, match="key values mismatch"):
        check_tls_files(pem, str(certificate_files()[1]))
    with pytest.raises(ServeConfigError, match="cannot be used"):
        check_tls_files(__file__, key)


@pytest.mark.promise("C3")
def test_an_encrypted_key_is_refused_without_asking_for_its_password(tmp_path: Path) -> None:
    create_certificate()
    pem, key = map(str, certificate_files())
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", key, "-out", str(locked), "-passout", "pass:secret"], check=True
    )
    locked.chmod(0o600)
    with pytest.raises(ServeConfigError, match="encrypted"):
        check_tls_files(pem, str(locked))


def test_read_certificate_reads_one_without_names(tmp_path: Path) -> None:
    pem = tmp_path / "plain.pem"
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=plain", "-days", "5"]
    subprocess.run(
        ["openssl", "req", "-x509", *options, "-keyout", str(tmp_path / "k.pem"), "-out", str(pem)],
        check=True, capture_output=True,
    )  # fmt: skip
    assert read_certificate(pem).hosts == ()
    assert read_certificate(pem).subject == "CN=plain"
