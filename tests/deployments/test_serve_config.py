"""Serve YAMLs: every misspelt key is refused, also where Ray would ignore it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from clients.local_server import read_serve_config, startup_warnings
from deployments.config import load_serve_config
from deployments.errors import ServeConfigError
from deployments.launch.certificates import certificate_files, create_certificate

SERVE_CONFIGS = sorted(Path("configs/serve").rglob("*.yaml"))


def variant(tmp_path: Path, change: Any) -> Path:
    content = yaml.safe_load(Path("configs/serve/quickstart.yaml").read_text())
    change(content)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=str)
def test_every_serve_yaml_is_accepted_and_binds_loopback(path: Path) -> None:
    assert load_serve_config(path)["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(aplications=[]), "unknown key 'aplications'.*'applications'"),
        (lambda c: c["http_options"].update(prot=1), "unknown key 'http_options.prot'.*'port'"),
        (lambda c: c["applications"][0].update(route=1), "unknown key 'applications.0.route'"),
        (lambda c: c["applications"][0]["args"].update(base_modle="x"), "args.base_modle'.*'base_model'"),
        (
            lambda c: c["applications"][0]["args"]["engine"].update(max_num_seq=1),
            "args.engine.max_num_seq'.*'max_num_seqs'",
        ),
        (lambda c: c["applications"][0]["deployments"][0].update(num_replica=1), "deployments.0.num_replica'"),
        (
            lambda c: c["applications"][0]["deployments"][0]["autoscaling_config"].update(max_replica=3),
            "autoscaling_config.max_replica'.*'max_replicas'",
        ),
        (lambda c: c["applications"][0]["args"]["engine"].update(max_num_seqs=0), "max_num_seqs.*given 0"),
        (lambda c: c["applications"][1]["args"].update(tilte="x"), "args.tilte'.*'title'"),
    ],
)
def test_misspelt_keys_and_bad_values_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ServeConfigError, match=message):
        load_serve_config(variant(tmp_path, change))


@pytest.mark.promise("C3")
def test_another_host_than_loopback_is_refused_without_keys(tmp_path: Path) -> None:
    with pytest.raises(ServeConfigError, match=r"host is '0.0.0.0'.*bind 127.0.0.1"):
        load_serve_config(variant(tmp_path, lambda c: c["http_options"].update(host="0.0.0.0")))


@pytest.mark.promise("C3")
def test_a_yaml_without_a_host_is_refused_because_ray_would_bind_every_interface(tmp_path: Path) -> None:
    with pytest.raises(ServeConfigError, match=r"host is '0.0.0.0'"):
        load_serve_config(variant(tmp_path, lambda c: c.pop("http_options")))


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The `http_options` of a YAML with HTTPS."""
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))
    create_certificate()
    files = certificate_files()
    return {"ssl_certfile": str(files[0]), "ssl_keyfile": str(files[1])}


@pytest.mark.promise("C3")
def test_a_yaml_may_name_certificate_and_key(tmp_path: Path, certificate: dict[str, str]) -> None:
    path = variant(tmp_path, lambda c: c["http_options"].update(certificate))
    assert load_serve_config(path)["http_options"]["ssl_certfile"] == certificate["ssl_certfile"]
    Path(certificate["ssl_keyfile"]).chmod(0o644)
    with pytest.raises(ServeConfigError, match=r"http_options: the key .* mode 0644, .*chmod 600"):
        load_serve_config(path)


@pytest.mark.promise("C3")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssl_keyfile": None}, "ssl_keyfile and ssl_certfile must be provided together"),
        ({"ssl_certfile": "/nowhere/cert.pem"}, "'/nowhere/cert.pem'.* cannot be read"),
        ({"ssl_certfile": "cert.pem"}, "'cert.pem' is relative"),
        ({"ssl_ca_certs": "/etc/ssl/ca.pem"}, "asks no client for a certificate"),  # uvicorn's default: CERT_NONE
        ({"ssl_keyfile_password": "x"}, "ssl_keyfile_password"),
    ],
)
def test_https_that_would_not_be_what_it_says_is_refused(
    tmp_path: Path, certificate: dict[str, str], options: dict[str, str | None], message: str
) -> None:
    with pytest.raises(ServeConfigError, match=message):
        load_serve_config(variant(tmp_path, lambda c: c["http_options"].update(certificate | options)))


@pytest.mark.promise("C3")
def test_tls_makes_a_certificate_once_and_serves_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))
    first = read_serve_config(None, tls=True)["http_options"]
    certificate = Path(first["ssl_certfile"]).read_bytes()
    assert read_serve_config(None, 8001, tls=True)["http_options"] == first | {"port": 8001}
    assert Path(first["ssl_certfile"]).read_bytes() == certificate
    assert "ssl_certfile" not in read_serve_config(None)["http_options"]


@pytest.mark.promise("C3")
def test_tls_leaves_a_yamls_own_certificate(tmp_path: Path, certificate: dict[str, str]) -> None:
    other = {"ssl_certfile": tmp_path / "own.pem", "ssl_keyfile": tmp_path / "own-key.pem"}
    for name, path in other.items():
        Path(certificate[name]).rename(path)
    own = {name: str(path) for name, path in other.items()}
    path = variant(tmp_path, lambda c: c["http_options"].update(own))
    assert own.items() <= read_serve_config(path, tls=True)["http_options"].items()
    assert not certificate_files()[0].exists()


@pytest.mark.promise("C3")
def test_the_operator_is_warned_of_keys_in_clear_and_of_a_certificate_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))
    create_certificate(days=20)
    files = dict(zip(("ssl_certfile", "ssl_keyfile"), map(str, certificate_files()), strict=True))
    assert startup_warnings({"http_options": {"host": "127.0.0.1"}}) == []
    for options in ({"host": "192.0.2.1"}, {"host": "::"}, {}):
        (warning,) = startup_warnings({"http_options": {**options, "port": 8000}})
        assert "in clear" in warning
        assert "--tls" in warning
    (warning,) = startup_warnings({"http_options": {"host": "192.0.2.1", **files}})
    assert "expires on" in warning


@pytest.mark.parametrize("text", ["- a\n", "a: [", ""])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ServeConfigError):
        load_serve_config(path)
