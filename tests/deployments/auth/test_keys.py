"""The file of API keys: what it stores, whom it admits, and that it never fails open (C1, C2)."""

import json
import multiprocessing
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deployments.auth import keys
from deployments.auth.caller import KeyLimits
from deployments.auth.keys import KEY_PREFIX, KeyStore
from deployments.errors import InvalidKey, KeysUnreadable


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys.json")


@pytest.mark.promise("C2")
def test_a_key_is_told_once_and_only_its_hash_is_kept(store: KeyStore) -> None:
    record, key = store.create("laptop", ("chat",), KeyLimits(rpm=60))
    secret = key.removeprefix(f"{KEY_PREFIX}{record.id}-")
    assert len(secret) == 43  # 256 bits in base64
    assert secret not in store.path.read_text()
    assert secret not in repr(record)
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["keys.json", "keys.json.lock"]
    caller = store.authenticate(key)
    assert (caller.key_id, caller.name, caller.scopes) == (record.id, "laptop", {"chat"})
    assert caller.limits == KeyLimits(rpm=60)
    assert caller == store.caller(record.id)


@pytest.mark.promise("C2")
def test_admin_includes_chat(store: KeyStore) -> None:
    assert store.authenticate(store.create("boss", ("admin",))[1]).scopes == {"admin", "chat"}


@pytest.mark.promise("C2")
def test_what_is_not_exactly_a_key_is_refused(store: KeyStore) -> None:
    record, key = store.create("laptop", ("chat",))
    other, other_key = store.create("desktop", ("chat",))
    stolen_id = key.replace(record.id, other.id)
    known_hash = f"{KEY_PREFIX}{record.id}-{record.sha256}"
    wrong = [
        "", KEY_PREFIX, record.id, record.sha256, known_hash, key[:-1], key + "x", key.upper(), f" {key}", f"{key}\n",
        key.removeprefix(KEY_PREFIX), stolen_id, other_key[:-43] + key[-43:], f"{KEY_PREFIX}0000000000-", "sk-ümläut",
        "\ud800", "\0" * 100, "x" * 1_000_000,
    ]  # fmt: skip
    for candidate in wrong:
        with pytest.raises(InvalidKey, match="not valid"):
            store.authenticate(candidate)
    assert store.authenticate(other_key).key_id == other.id


@pytest.mark.promise("C2")
def test_known_and_unknown_ids_are_compared_alike(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = store.create("laptop", ("chat",))
    compared: list[tuple[str, str]] = []
    compare_digest = keys.hmac.compare_digest

    def spy(a: str, b: str) -> bool:
        compared.append((a, b))
        return compare_digest(a, b)

    monkeypatch.setattr(keys.hmac, "compare_digest", spy)
    for key_id in (record.id, "ffffffffff"):
        with pytest.raises(InvalidKey):
            store.authenticate(f"{KEY_PREFIX}{key_id}-guess")
    assert [(len(a), len(b)) for a, b in compared] == [(64, 64)] * 2


@pytest.mark.promise("C2")
def test_an_expired_key_is_refused_and_says_so(store: KeyStore) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=0.3)
    record, key = store.create("guest", ("chat",), expires=soon)
    assert store.authenticate(key).key_id == record.id
    while datetime.now(UTC) < soon:
        pass
    for ask in (lambda: store.authenticate(key), lambda: store.caller(record.id)):
        with pytest.raises(InvalidKey, match="'guest' expired at"):
            ask()
    with pytest.raises(InvalidKey, match="not valid"):  # who does not know the key does not learn that it expired
        store.authenticate(key[:-1])
    assert (store.num_valid, store.required) == (0, True)


@pytest.mark.promise("C2")
def test_a_running_server_sees_new_and_revoked_keys(store: KeyStore) -> None:
    server = KeyStore(store.path)
    assert not server.required
    record, key = store.create("laptop", ("chat",))
    assert server.required
    assert server.authenticate(key).key_id == record.id
    _, second = store.create("desktop", ("chat",))
    assert server.authenticate(second).name == "desktop"
    store.revoke(record.id)
    for ask in (lambda: server.authenticate(key), lambda: server.caller(record.id)):
        with pytest.raises(InvalidKey, match="revoked"):
            ask()
    assert server.authenticate(second).name == "desktop"
    assert [(key.name, key.status) for key in server.list()] == [("laptop", "revoked"), ("desktop", "valid")]


@pytest.mark.promise("C1")
def test_after_the_last_key_is_revoked_everybody_still_needs_one(store: KeyStore) -> None:
    store.revoke(store.create("laptop", ("chat",))[0].id)
    assert (store.num_valid, store.required) == (0, True)


def test_an_unchanged_file_is_not_read_again(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key = store.create("laptop", ("chat",))
    store.authenticate(key)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read again"))
    store.authenticate(key)


@pytest.mark.promise("C2")
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "unknown field", "no scope", "duplicate id", "naive time"])
def test_a_broken_file_lets_nobody_in_until_it_is_repaired(store: KeyStore, damage: str) -> None:
    _, key = store.create("laptop", ("chat",))
    original = store.path.read_text()
    content = json.loads(original)
    (only,) = content["keys"]
    broken = {
        "cut": original[:-9],
        "empty": "",
        "other": "[]",
        "unknown field": json.dumps({"keys": [only | {"admin": True}]}),
        "no scope": json.dumps({"keys": [only | {"scopes": []}]}),
        "duplicate id": json.dumps({"keys": [only, only]}),
        "naive time": json.dumps({"keys": [only | {"expires": "2999-01-01T00:00:00"}]}),
    }[damage]
    store.path.write_text(broken)
    for ask in (
        lambda: store.authenticate(key),
        lambda: store.required,
        store.list,
        lambda: store.create("x", ("chat",)),
    ):
        with pytest.raises(KeysUnreadable, match=r"keys.json is broken.*requests are refused") as exc_info:
            ask()
        assert only["sha256"] not in str(exc_info.value)
    assert store.path.read_text() == broken  # nothing is written over it
    store.path.write_text(original)
    assert store.authenticate(key).name == "laptop"


@pytest.mark.promise("C2")
def test_a_file_that_cannot_be_read_lets_nobody_in(store: KeyStore) -> None:
    store.path.mkdir()  # to root every mode is readable
    with pytest.raises(KeysUnreadable, match="cannot be read"):
        _ = store.required


@pytest.mark.promise("C8")
@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "<b>", "tab\t"])
def test_names_stay_on_one_line_of_a_log(store: KeyStore, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        store.create(name, ("chat",))
    assert not store.path.exists()


def _create_ten(path: Path) -> None:
    for i in range(10):
        KeyStore(path).create(f"key {i}", ("chat",))


@pytest.mark.promise("C2")
def test_keys_made_at_the_same_time_are_all_kept(store: KeyStore) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_create_ten, args=(store.path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        store.list()  # complete at any moment, else this raises
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(store.list()) == 20


def test_revoking_what_is_not_there_is_refused(store: KeyStore) -> None:
    store.create("laptop", ("chat",))
    with pytest.raises(InvalidKey, match=r"'nobody'.*corral keys list"):
        store.revoke("nobody")
