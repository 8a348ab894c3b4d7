"""`corral keys` as typed: what it prints, what it refuses, and what a server then does (C2, C3)."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from clients.cli.keys import parse_expiry
from clients.cli.main import app
from clients.local_server import format_urls, temporary_key
from deployments.auth.caller import KeyLimits
from deployments.auth.keys import KeyStore
from deployments.config import load_serve_config
from deployments.errors import InvalidKey, ServeConfigError
from deployments.launch.local_server import Server
from training.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path))
    return tmp_path


def corral(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


@pytest.mark.promise("C2")
def test_create_prints_the_key_once_and_alone() -> None:
    options = ["--scope", "chat", "--rpm", "60", "--tpm", "20000", "--streams", "4", "--expires", "90d"]
    result = corral("create", "--name", "laptop", *options)
    assert result.exit_code == 0, result.stderr
    key = result.stdout.strip()
    assert re.fullmatch(r"sk-corral-[0-9a-f]{10}-[\w-]{43}", key)  # so that KEY=$(corral keys create ...) works
    assert "first key" in result.stderr
    assert "60 requests/min, 20000 tokens/min, 4 at a time" in result.stderr
    assert key not in result.stderr
    caller = KeyStore().authenticate(key)
    assert (caller.name, caller.scopes) == ("laptop", {"chat"})
    assert caller.limits == KeyLimits(rpm=60, tpm=20000, streams=4)
    (record,) = KeyStore().list()
    assert record.expires is not None
    assert abs(record.expires - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=1)
    assert "first key" not in corral("create", "--name", "second").stderr


@pytest.mark.promise("C2")
def test_json_has_the_key_at_creation_and_never_again() -> None:
    record = json.loads(corral("create", "--name", "boss", "--scope", "admin", "--json").stdout)
    assert KeyStore().authenticate(record["key"]).scopes == {"admin", "chat"}
    (listed,) = json.loads(corral("list", "--json").stdout)
    assert listed == {field: value for field, value in record.items() if field != "key"}
    assert (listed["name"], listed["expires"], listed["status"]) == ("boss", None, "valid")
    hashes = {key.sha256 for key in KeyStore().list()}
    for output in (corral("list").stdout, corral("list", "--json").stdout):
        assert not [secret for secret in (*hashes, record["key"]) if secret in output]


def test_list_shows_limits_and_status() -> None:
    assert "corral keys create" in corral("list").stdout
    store = KeyStore()
    store.create("old", ("chat",), expires=datetime(2020, 1, 31, 12, tzinfo=UTC))
    record, _ = store.create("laptop", ("chat",), KeyLimits(rpm=5))
    corral("revoke", record.id)
    rows = corral("list").stdout.splitlines()
    assert any("old" in row and "2020-01-31 12:00 UTC" in row and "expired" in row for row in rows)
    assert any(record.id in row and "5 requests/min" in row and "never" in row and "revoked" in row for row in rows)


@pytest.mark.promise("C2")
def test_revoke_says_when_nobody_is_left() -> None:
    first, key = KeyStore().create("laptop", ("chat",))
    second, _ = KeyStore().create("desktop", ("chat",))
    result = corral("revoke", first.id)
    assert (result.exit_code, result.stderr) == (0, "")
    with pytest.raises(InvalidKey, match="revoked"):
        KeyStore().authenticate(key)
    assert "every request is refused" in corral("revoke", second.id).stderr


@pytest.mark.promise("C2")
@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["create", "--name", "x", "--expires", "90x"], 2, "'90x' is not a valid time"),
        (["create", "--name", "x", "--expires", "2020-01-31"], 2, "is in the past"),
        (["create", "--name", "x", "--expires", "0d"], 2, "is in the past"),
        (["create", "--name", "x", "--expires", "999999w"], 2, "is not a valid time"),
        (["create", "--name", "x", "--rpm", "0"], 2, "--rpm"),
        (["create", "--name", "x", "--tpm", "many"], 2, "--tpm"),
        (["create", "--name", "x", "--scope", "root"], 2, "root"),
        (["create", "--name", "a\nb"], 2, "not a valid key name"),
        (["create"], 2, "--name"),
        (["revoke"], 2, "ID"),
        (["revoke", "nobody"], 1, "corral keys list"),
    ],
)
def test_mistakes_are_one_line(home: Path, arguments: list[str], code: int, word: str) -> None:
    result = corral(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert word in result.stderr
    assert not (home / "keys.json").exists()


@pytest.mark.promise("C2")
def test_a_broken_file_is_named_and_left_alone(home: Path) -> None:
    (home / "keys.json").write_text("{")
    for arguments in (["list"], ["create", "--name", "x"], ["revoke", "x"]):
        result = corral(*arguments)
        assert result.exit_code == 1
        assert f"{home}/keys.json is broken" in result.stderr
        assert result.stderr.count("\n") == 1
    assert (home / "keys.json").read_text() == "{"


def test_expiry_in_every_form() -> None:
    now = datetime.now(UTC)
    for text, span in (("30m", 30), ("12h", 720), ("90d", 129_600), ("2w", 20_160)):
        assert abs(parse_expiry(text) - now - timedelta(minutes=span)) < timedelta(seconds=5)
    assert parse_expiry("2999-01-31") == datetime(2999, 1, 31, tzinfo=UTC)
    assert parse_expiry("2999-01-31T12:00+02:00") == datetime(2999, 1, 31, 10, tzinfo=UTC)
    with pytest.raises(ConfigError):
        parse_expiry("")


def other_host(folder: Path) -> Path:
    content: dict[str, Any] = yaml.safe_load(Path("configs/serve/quickstart.yaml").read_text())
    content["http_options"]["host"] = "0.0.0.0"
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.promise("C3")
def test_another_host_is_served_once_a_valid_key_exists(tmp_path: Path) -> None:
    config, store = other_host(tmp_path), KeyStore()
    store.create("old", ("chat",), expires=datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(ServeConfigError, match="corral keys create") as exc_info:
        load_serve_config(config)
    assert "\n" not in str(exc_info.value)
    record, _ = store.create("laptop", ("chat",))
    assert load_serve_config(config)["http_options"]["host"] == "0.0.0.0"
    store.revoke(record.id)
    with pytest.raises(ServeConfigError, match="no valid API key"):
        load_serve_config(config)


def test_corral_serve_says_whether_keys_are_required() -> None:
    server = Server("http://127.0.0.1:8000", None)
    assert "keys  not required on this machine" in format_urls(server)
    KeyStore().create("laptop", ("chat",))
    assert "keys  required, 1 valid" in format_urls(server)


def test_commands_that_run_a_server_have_a_key_to_it_while_they_run() -> None:
    with temporary_key("corral demo") as key:
        assert key is None
    store = KeyStore()
    store.create("laptop", ("chat",))
    with temporary_key("corral demo") as key:
        assert key is not None
        assert store.authenticate(key).name == "corral demo"
    with pytest.raises(InvalidKey, match="revoked"):
        store.authenticate(key)
