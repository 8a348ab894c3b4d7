"""The database of stored responses: owners, shared items, bounds of age and size, kill -9."""

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.responses.store import ResponseStore, StoredItem, StoredResponse

DAY_S = 24 * 60 * 60
MIB = 2**20


class Clock:
    """Seconds, which a test sets."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "responses.db"


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[ResponseStore]:
    store = ResponseStore(path, 30 * DAY_S, 2 * MIB, clock)
    yield store
    store.close()


def item(item_id: str, text: str = "hi") -> StoredItem:
    return StoredItem(item_id, json.dumps({"text": text}))


def response(response_id: str, given: list[StoredItem], made: list[StoredItem]) -> StoredResponse:
    return StoredResponse(response_id, f'{{"id": "{response_id}"}}', given, made)


def count(path: Path, table: str) -> int:
    with sqlite3.connect(path) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


@pytest.mark.promise("F3")
def test_what_is_added_is_there_for_its_owner_alone(store: ResponseStore) -> None:
    stored = response("resp_1", [item("msg_1"), item("msg_2", "x")], [item("msg_3")])
    store.add("alice", stored)
    store.add("alice", response("resp_1", [], []))  # sent twice
    assert store.get("alice", "resp_1") == stored
    assert store.item("alice", "msg_3") == item("msg_3")
    for owner in ("bob", ""):
        assert store.get(owner, "resp_1") is None
        assert store.item(owner, "msg_3") is None
        assert not store.delete(owner, "resp_1")
    other = response("resp_1", [item("msg_1", "bob's")], [])
    store.add("bob", other)  # ids of others are free
    assert store.get("bob", "resp_1") == other
    assert store.delete("alice", "resp_1")
    assert store.get("alice", "resp_1") is None
    assert store.get("bob", "resp_1") == other


@pytest.mark.promise("F3")
def test_a_conversation_grows_by_what_each_turn_adds_and_each_response_stands_alone(
    store: ResponseStore, path: Path
) -> None:
    dialog: list[StoredItem] = []
    for turn in range(50):
        given, made = [*dialog, item(f"msg_q{turn}")], [item(f"msg_a{turn}")]
        store.add("alice", response(f"resp_{turn}", given, made))
        dialog = [*given, *made]
    assert count(path, "items") == 100
    for turn in range(49):
        assert store.delete("alice", f"resp_{turn}")
    last = store.get("alice", "resp_49")
    assert last is not None
    assert [*last.input_items, *last.output_items] == dialog
    assert store.delete("alice", "resp_49")
    assert count(path, "items") == count(path, "response_items") == 0


def test_an_item_with_an_id_that_is_taken_gets_another(store: ResponseStore) -> None:
    store.add("alice", response("resp_1", [item("msg_1", "a")], []))
    store.add("alice", response("resp_2", [item("msg_1", "b"), item("msg_2"), item("msg_2")], []))
    first, second = store.get("alice", "resp_1"), store.get("alice", "resp_2")
    assert first is not None
    assert second is not None
    assert first.input_items == [item("msg_1", "a")]
    assert [stored.body for stored in second.input_items] == [item("", text).body for text in ("b", "hi", "hi")]
    ids = [stored.id for stored in second.input_items]
    assert ids[1] == "msg_2"
    assert len({"msg_1", *ids}) == 4
    assert all(item_id.startswith("msg_") for item_id in ids)


@pytest.mark.promise("F3")
def test_responses_expire(store: ResponseStore, path: Path, clock: Clock) -> None:
    store.add("alice", response("resp_1", [item("msg_1")], [item("msg_2")]))
    clock.now += 29 * DAY_S
    store.add("alice", response("resp_2", [item("msg_1")], [item("msg_3")]))
    assert store.get("alice", "resp_1") is not None
    clock.now += DAY_S
    assert store.get("alice", "resp_1") is None  # before it is deleted
    assert store.item("alice", "msg_2") is None
    assert store.item("alice", "msg_1") is not None  # of the second, too
    assert not store.delete("alice", "resp_1")
    store.evict()
    assert count(path, "responses") == 1
    assert store.get("alice", "resp_2") == response("resp_2", [item("msg_1")], [item("msg_3")])


@pytest.mark.promise("F3")
def test_the_oldest_go_when_the_file_is_full(store: ResponseStore, path: Path, clock: Clock) -> None:
    for number in range(100):
        clock.now += 1
        store.add("alice", response(f"resp_{number}", [item(f"msg_{number}", "x" * 100_000)], []))
    kept = [number for number in range(100) if store.get("alice", f"resp_{number}") is not None]
    assert kept == list(range(kept[0], 100))
    assert 15 <= len(kept) <= 20
    store.close()
    assert path.stat().st_size <= 2.2 * MIB


def test_one_that_is_larger_than_all_is_kept_until_the_next(store: ResponseStore) -> None:
    store.add("alice", response("resp_1", [item("msg_1", "x" * 3 * MIB)], []))
    assert store.get("alice", "resp_1") is not None
    store.add("alice", response("resp_2", [item("msg_2")], []))
    assert store.get("alice", "resp_1") is None
    assert store.get("alice", "resp_2") is not None


def test_the_files_are_the_owners_alone(store: ResponseStore, path: Path) -> None:
    store.check()
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == dict.fromkeys(("responses.db", "responses.db-wal", "responses.db-shm"), 0o600)


@pytest.mark.promise("F3")
def test_a_store_that_cannot_be_written_says_so_before(store: ResponseStore, path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        store._db.execute("PRAGMA busy_timeout = 10")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            store.check()
    store.check()


_ADD_FOREVER = """
import sys
from pathlib import Path
from deployments.responses.store import ResponseStore, StoredItem, StoredResponse
store = ResponseStore(Path(sys.argv[1]), 1e9, 2**30)
for number in range(1_000_000):
    items = [StoredItem(f"msg_{number}", '{"text": "x"}')]
    store.add("alice", StoredResponse(f"resp_{number}", "{}", items, []))
    print(number, flush=True)
"""


@pytest.mark.promise("F3")
def test_what_was_added_survives_kill_9(path: Path) -> None:
    command = [sys.executable, "-c", _ADD_FOREVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        added = -1
        for line in writer.stdout:
            if (added := int(line)) == 200:
                os.kill(writer.pid, signal.SIGKILL)
    assert added >= 200
    store = ResponseStore(path, 1e9, 2**30)
    for number in range(added + 1):
        kept = store.get("alice", f"resp_{number}")
        assert kept is not None
        assert [stored.id for stored in kept.input_items] == [f"msg_{number}"]
    store.close()
