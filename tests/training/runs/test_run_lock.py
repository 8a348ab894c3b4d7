"""One process at a time holds a run: real ones, refused, killed and suspended, on disk and in an object store."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from training.errors import ConfigError, RunStopped, TrainingError
from training.runs import run_lock as run_lock
from training.runs.run_dir import RunDir
from training.runs.run_lock import hold_run_lock, read_lock_holder

_HOLD_LOCK = """
import sys, time
from training.runs import run_lock
from training.errors import CorralError
from training.runs.run_dir import RunDir

run_lock._HEARTBEAT_EVERY_S = float(sys.argv[3])
RunDir(sys.argv[1], "run").files("drivers")  # imports and connects
time.sleep(max(0.0, float(sys.argv[4]) - time.time()))
try:
    with run_lock.hold_run_lock(RunDir(sys.argv[1], "run")):
        print("locked", flush=True)
        time.sleep(float(sys.argv[2]))
except CorralError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
"""


@pytest.fixture(params=["disk", "store"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    parent = str(tmp_path) if request.param == "disk" else request.getfixturevalue("s3")
    return RunDir(parent, "run")


def start(run_dir: RunDir, heartbeat_s: float = 15.0, *, host: str = "", at: float = 0.0) -> subprocess.Popen[str]:
    """A process that holds the lock of the run, from the time `at` on; with `host` on a machine of that name."""
    command = [sys.executable, "-c", _HOLD_LOCK, run_dir.parent, "60", str(heartbeat_s), str(at)]
    if host:
        renamed = 'hostname "$1" && shift && exec "$@"'
        command = ["unshare", "--map-root-user", "--uts", "sh", "-c", renamed, "sh", host, *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@contextlib.contextmanager
def running_holder(run_dir: RunDir, *, heartbeat_s: float = 15.0, host: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of the run at the beginning of the block, and is gone at its end."""
    process = start(run_dir, heartbeat_s=heartbeat_s, host=host)
    try:
        assert first_line(process) == "locked"
        yield process
    finally:
        process.kill()
        process.communicate()


def refusal(run_dir: RunDir) -> str:
    with pytest.raises(TrainingError) as exc_info, hold_run_lock(run_dir):
        pass
    assert "\n" not in str(exc_info.value)
    return str(exc_info.value)


@pytest.mark.promise("D14")
def test_second_process_is_refused_at_once_and_kill_9_frees_the_run(run_dir: RunDir) -> None:
    with running_holder(run_dir) as first:
        started_at = time.monotonic()
        message = refusal(run_dir)
        assert time.monotonic() - started_at < run_lock._HEARTBEAT_TIMEOUT_S  # it does not wait for a heartbeat
        assert re.match(
            rf"run 'run' is locked by process {first.pid} on {re.escape(socket.gethostname())}, started "
            r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC: wait until it ends, stop it with 'corral runs stop run --storage "
            rf"{re.escape(run_dir.parent)}', or choose another run_name$",
            message,
        )
        assert run_dir.files("drivers") == ["drivers/0001.json"]
        first.send_signal(signal.SIGKILL)
        first.wait()
    with hold_run_lock(run_dir):
        now = read_lock_holder(run_dir)
        assert now
        assert (now.pid, now.ended) == (os.getpid(), None)
        assert f"locked by process {os.getpid()} on" in refusal(run_dir)
    ended = read_lock_holder(run_dir)
    assert ended
    assert ended.is_same(now)
    assert ended.ended is not None
    with hold_run_lock(run_dir):
        assert run_dir.files("drivers") == [f"drivers/000{n}.json" for n in (1, 2, 3)]


@pytest.mark.promise("D14")
def test_of_eight_that_start_at_once_one_gets_the_lock(run_dir: RunDir) -> None:
    at = time.time() + 4
    processes = [start(run_dir, at=at) for _ in range(8)]
    answers = sorted(first_line(process).split(": ")[0] for process in processes)
    assert answers == [*["TrainingError"] * 7, "locked"]
    for process in processes:
        process.kill()
        process.communicate()


def test_a_holder_elsewhere_is_alive_while_it_sends_heartbeats(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_HEARTBEAT_TIMEOUT_S", 5.0)
    with running_holder(run_dir, heartbeat_s=0.5, host="elsewhere") as far:
        first = read_lock_holder(run_dir)
        assert first
        wait_until(
            lambda: (
                (last := read_lock_holder(run_dir)) is not None
                and last.heartbeat_at > first.heartbeat_at + run_lock._HEARTBEAT_TIMEOUT_S
            )
        )
        assert re.search(
            r" on elsewhere, started .* UTC, last heartbeat \d+ s ago: .* stop it on that host with .*",
            refusal(run_dir),
        )

        far.send_signal(signal.SIGSTOP)
        wait_until(lambda: (last := read_lock_holder(run_dir)) is not None and not last.is_alive)
        with hold_run_lock(run_dir):
            far.send_signal(signal.SIGCONT)
            assert first_line(far) == (
                f"TrainingError: run 'run' was taken over by {read_lock_holder(run_dir)}, because this process "
                "sent no heartbeat for 120 s: the run continues there, and this process has stopped"
            )
            last = read_lock_holder(run_dir)
            assert last
            assert last.pid == os.getpid()


def test_a_lock_holder_that_is_stopped_records_when(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path, "run")
    with pytest.raises(RunStopped, match="run_name=run resumes it"), hold_run_lock(run_dir):
        raise KeyboardInterrupt
    last = read_lock_holder(run_dir)
    assert last
    assert last.ended


def test_a_refused_configuration_leaves_no_trace(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path, "run")
    with hold_run_lock(run_dir):
        pass
    before = read_lock_holder(run_dir)
    with pytest.raises(ConfigError), hold_run_lock(run_dir):
        raise ConfigError("another learning_rate")
    assert read_lock_holder(run_dir) == before


def test_a_reused_process_id_does_not_hold_the_lock(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path, "run")
    now = time.time()
    reused = {"pid": os.getpid(), "host": socket.gethostname(), "started": now - 10**8, "seen": now, "ended": None}
    run_dir.write_json("drivers/0001.json", reused)
    with hold_run_lock(run_dir):
        assert json.loads((tmp_path / "run/drivers/0002.json").read_text())["pid"] == os.getpid()
