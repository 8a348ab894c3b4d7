"""The lock that keeps a run to one process at a time; any other process can read who holds it.

To take the lock, a process creates the file with the next number in `drivers/` of the run's directory. Creation is
atomic on a disk (a hard link) and in an object store (a conditional put), so one of several processes succeeds. The
holder rewrites its own file while it runs and touches no other; the last file names the holder. Whether the holder is
alive:

- On its own host, its process is looked up by pid and start time, so `kill -9` releases the lock at once.
- On another host, it counts as alive while its heartbeat (the key `seen` of its file, rewritten every 15 s) or its
  workers' progress.json is less than two minutes old. The machines' clocks must agree within that time. A holder that
  was only suspended finds its successor's file and stops.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

import psutil

from training.errors import ConfigError, CorralError, RunStopped, TrainingError
from training.runs.progress import read_progress
from training.runs.run_dir import RunDir, runs_address

_FOLDER = "drivers"
_HEARTBEAT_EVERY_S = 15.0
_HEARTBEAT_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class LockHolder:
    """The process that holds a run's lock, or held it last. Times are seconds since the epoch, by its own clock.

    Attributes:
        heartbeat_at: when it, or one of its workers, last reported that it is alive; `seen` in its file.
        ended: None while it runs, and after it was killed.
    """

    pid: int
    host: str
    started: float
    heartbeat_at: float
    ended: float | None = None

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether it holds the lock now, as far as this machine can tell."""
        if self.is_here:
            return self.process() is not None
        return self.ended is None and time.time() - self.heartbeat_at < _HEARTBEAT_TIMEOUT_S

    def process(self) -> psutil.Process | None:
        """The process, if it is alive and on this machine; never another process that reuses its pid."""
        if not self.is_here or self.ended is not None:
            return None
        try:
            process = psutil.Process(self.pid)
            # The holder had this pid when it wrote `started`; a process that reuses it was created later.
            is_holder = process.create_time() <= self.started + 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if is_holder else None

    def is_same(self, other: "LockHolder") -> bool:
        """Whether both are records of one process, written at different times."""
        return (self.pid, self.host, self.started) == (other.pid, other.host, other.started)

    def to_record(self) -> dict[str, Any]:
        """The content of its file, which has `heartbeat_at` under the key `seen`."""
        return {"seen" if key == "heartbeat_at" else key: value for key, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: Any) -> "LockHolder | None":
        """The reverse of `to_record`; None for anything that it did not write."""
        try:
            fields = dict(record)
            return cls(heartbeat_at=fields.pop("seen"), **fields)
        except (KeyError, TypeError, ValueError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {datetime.fromtimestamp(self.started, UTC):%F %T} UTC"


def read_lock_holder(run_dir: RunDir) -> LockHolder | None:
    """The process that took the run's lock last; None if none did.

    Raises:
        TrainingError: the directory cannot be read.
    """
    return _last_record(run_dir)[1]


@contextlib.contextmanager
def hold_run_lock(run_dir: RunDir) -> Iterator[None]:
    """Hold the run's lock during the block. If the block raises a `ConfigError`, no trace of it is left.

    Raises:
        TrainingError: another process holds the lock, or took it over while this one was suspended.
        RunStopped: on Ctrl-C, or anything else that raises KeyboardInterrupt.
    """
    file, holder = _acquire(run_dir)
    released = threading.Event()
    heartbeat = threading.Thread(target=_send_heartbeats, args=(run_dir, file, holder, released), daemon=True)
    heartbeat.start()
    keep_record = True
    try:
        yield
    except ConfigError:
        keep_record = False
        raise
    except KeyboardInterrupt:
        if successor := _successor(run_dir, holder):
            raise TrainingError(
                f"run {run_dir.name!r} was taken over by {successor}, because this process sent no heartbeat for "
                f"{_HEARTBEAT_TIMEOUT_S:.0f} s: the run continues there, and this process has stopped"
            ) from None
        raise RunStopped(run_dir.name) from None
    finally:
        released.set()
        heartbeat.join()
        with contextlib.suppress(CorralError):  # the disk may be full
            if keep_record:
                ended = replace(holder, heartbeat_at=time.time(), ended=time.time())
                run_dir.write_json(file, ended.to_record())
            else:
                run_dir.remove(file)


def _last_record(run_dir: RunDir) -> tuple[int, LockHolder | None]:
    """The number of the last holder's file (0 if there is no file), and the holder."""
    files = run_dir.files(_FOLDER)
    if not files:
        return 0, None
    holder = LockHolder.from_record(run_dir.read_json(files[-1]))
    if holder and not holder.is_here and holder.ended is None and (progress := read_progress(run_dir)):
        holder = replace(holder, heartbeat_at=max(holder.heartbeat_at, progress.time))
    return int(PurePosixPath(files[-1]).stem), holder


def _acquire(run_dir: RunDir) -> tuple[str, LockHolder]:
    """Take the lock; returns this process's file and record."""
    number, last = _last_record(run_dir)
    if last and last.is_alive:
        raise _lock_held_error(run_dir, last)
    now = time.time()
    holder = LockHolder(os.getpid(), socket.gethostname(), now, now)
    file = f"{_FOLDER}/{number + 1:04d}.json"
    if not run_dir.create_json(file, holder.to_record()):  # another process was faster
        raise _lock_held_error(run_dir, read_lock_holder(run_dir))
    return file, holder


def _lock_held_error(run_dir: RunDir, holder: LockHolder | None) -> TrainingError:
    description, place, expiry = str(holder or "a process that has just started"), "", ""
    if holder and not holder.is_here:
        description += f", last heartbeat {max(0.0, time.time() - holder.heartbeat_at):.0f} s ago"
        place = " on that host"
        expiry = f"; the lock expires {_HEARTBEAT_TIMEOUT_S:.0f} s after the last heartbeat"
    storage = "" if run_dir.parent == runs_address() else f" --storage {run_dir.parent}"
    return TrainingError(
        f"run {run_dir.name!r} is locked by {description}: wait until it ends, stop it{place} with 'corral runs stop "
        f"{run_dir.name}{storage}', or choose another run_name{expiry}"
    )


def _send_heartbeats(run_dir: RunDir, file: str, holder: LockHolder, released: threading.Event) -> None:
    """Renew the holder's file until the lock is released; interrupt the process if another one has taken over."""
    while not released.wait(_HEARTBEAT_EVERY_S):
        if _successor(run_dir, holder):
            os.kill(os.getpid(), signal.SIGINT)
            return
        with contextlib.suppress(CorralError):  # the disk is full or the store unavailable: the next try may succeed
            run_dir.write_json(file, replace(holder, heartbeat_at=time.time()).to_record())


def _successor(run_dir: RunDir, holder: LockHolder) -> LockHolder | None:
    """The process that took the lock over from `holder`; None if there is none or it cannot be read."""
    with contextlib.suppress(CorralError):
        last = read_lock_holder(run_dir)
        return None if last is None or last.is_same(holder) else last
    return None
