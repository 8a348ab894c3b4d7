"""Usage per key, model and day: exact, on disk, readable while it is written, and `corral usage`."""

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from clients.cli.main import app
from deployments.accounting.request_record import RequestRecord
from deployments.accounting.usage import UsageRow, UsageStore, read_usage, usage_path
from training.errors import CorralError

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
LONG_AGO = date(2000, 1, 1)
RECORD = RequestRecord(
    "/v1/chat/completions",
    200,
    NOON,
    model="tiny",
    key_id="k1",
    key_name="alice",
    prompt_tokens=10,
    cached_tokens=4,
    completion_tokens=5,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "usage.db"


def test_requests_add_up_by_key_model_and_day(path: Path) -> None:
    store = UsageStore(path)
    store.add("r1", 1, [RECORD, RECORD, replace(RECORD, model="tiny:a@2")])
    store.add("r2", 1, [replace(RECORD, key_id="k2", key_name="bob", status=429, prompt_tokens=0, completion_tokens=0)])
    store.add("r2", 2, [replace(RECORD, key_id=None, key_name="anonymous", ended_at=NOON + 86400)])
    assert read_usage(path, LONG_AGO) == [
        UsageRow(None, "k1", "alice", "tiny", 2, 0, 20, 8, 10),
        UsageRow(None, "", "anonymous", "tiny", 1, 0, 10, 4, 5),
        UsageRow(None, "k1", "alice", "tiny:a@2", 1, 0, 10, 4, 5),
        UsageRow(None, "k2", "bob", "tiny", 1, 1, 0, 4, 0),
    ]
    assert read_usage(path, LONG_AGO, "key")[0] == UsageRow(None, "k1", "alice", None, 3, 0, 30, 12, 15)
    assert read_usage(path, LONG_AGO, "model")[0] == UsageRow(None, None, None, "tiny", 4, 1, 30, 16, 15)
    assert read_usage(path, LONG_AGO, "day") == [
        UsageRow("2026-03-02", None, None, None, 1, 0, 10, 4, 5),
        UsageRow("2026-03-01", None, None, None, 4, 1, 30, 16, 15),
    ]
    assert [row.requests for row in read_usage(path, date(2026, 3, 2))] == [1]


def test_a_client_that_left_is_no_error_and_what_named_no_model_is_no_usage(path: Path) -> None:
    store = UsageStore(path)
    store.add("r1", 1, [replace(RECORD, status=499), replace(RECORD, status=503), replace(RECORD, model=None)])
    (row,) = read_usage(path, LONG_AGO)
    assert (row.requests, row.errors) == (2, 1)


def test_a_report_that_comes_again_counts_once_also_in_a_new_process(path: Path) -> None:
    assert UsageStore(path).add("r1", 7, [RECORD])
    reopened = UsageStore(path)
    assert not reopened.add("r1", 7, [RECORD])
    assert not reopened.add("r1", 6, [RECORD])
    assert reopened.add("r1", 8, [RECORD])
    assert reopened.add("r2", 1, [RECORD])
    assert read_usage(path, LONG_AGO)[0].requests == 3


def test_a_report_counts_whole_or_not_at_all(path: Path) -> None:
    store = UsageStore(path)
    broken = replace(RECORD, prompt_tokens=None)  # type: ignore[arg-type]
    with pytest.raises(sqlite3.Error):
        store.add("r1", 1, [RECORD, broken])
    assert read_usage(path, LONG_AGO) == []
    assert store.add("r1", 1, [RECORD])


@pytest.mark.promise("C8")
def test_only_the_owner_may_read_it(path: Path) -> None:
    store = UsageStore(path)
    store.add("r1", 1, [RECORD])
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == dict.fromkeys(("usage.db", "usage.db-wal", "usage.db-shm"), 0o600)


def test_what_was_added_survives_kill_9_and_is_read_while_it_is_written(path: Path) -> None:
    code = f"""
import itertools, sys
from pathlib import Path
from tests.deployments.accounting.test_usage import RECORD
from deployments.accounting.usage import UsageStore
store = UsageStore(Path({str(path)!r}))
for number in itertools.count(1):
    store.add("r1", number, [RECORD] * 3)
    print(number, flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(50):
        acknowledged = int(next(writer.stdout))
        rows = read_usage(path, LONG_AGO)
        assert rows[0].requests >= 3 * acknowledged
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged = max(map(int, writer.stdout.read().split()), default=acknowledged)
    writer.wait(timeout=300)
    requests = read_usage(path, LONG_AGO)[0].requests
    assert requests in (3 * acknowledged, 3 * (acknowledged + 1))


def test_an_unreadable_file_is_one_line(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(CorralError, match=r"usage\.db.* cannot be read: file is not a database"):
        read_usage(path, LONG_AGO)


# -- corral usage


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path))
    return tmp_path


def usage(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["usage", *arguments])


@pytest.fixture
def used(home: Path) -> None:
    now = datetime.now(UTC)
    store = UsageStore(usage_path())
    old = (now - timedelta(days=7)).timestamp()
    store.add("r1", 1, [replace(RECORD, ended_at=now.timestamp()), replace(RECORD, ended_at=old, prompt_tokens=1000)])
    store.add("r1", 2, [replace(RECORD, ended_at=now.timestamp(), key_id=None, key_name="anonymous", prompt_tokens=1)])


@pytest.mark.usefixtures("used")
def test_corral_usage_shows_a_table_and_json() -> None:
    table = usage()
    assert table.exit_code == 0
    assert [word in table.stdout for word in ("alice", "anonymous", "tiny", "cached")] == [True] * 4
    assert "1,000" not in table.stdout  # a week ago is not within 7 days
    rows = json.loads(usage("--json").stdout)
    assert rows[0] == {
        "key_id": "k1",
        "key": "alice",
        "model": "tiny",
        "requests": 1,
        "errors": 0,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
    }
    assert json.loads(usage("--json", "--by", "day", "--since", "8d").stdout)[-1]["prompt_tokens"] == 1000
    assert json.loads(usage("--json", "--by", "model", "--since", "2000-01-01").stdout)[0]["requests"] == 3
    assert json.loads(usage("--json", "--by", "key", "--since", "2999-01-01").stdout) == []
    assert "1,010" in usage("--since", "30d").stdout


def test_corral_usage_before_anything_was_served(home: Path) -> None:
    result = usage()
    assert result.exit_code == 0
    assert "no requests" in result.stdout
    assert usage("--json").stdout.strip() == "[]"


@pytest.mark.parametrize("since", ["yesterday", "0d", "7", "-1d", "2026-13-01"])
def test_corral_usage_says_how_to_name_a_time(home: Path, since: str) -> None:
    result = usage(f"--since={since}")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert since in result.stderr
    assert "7d" in result.stderr
