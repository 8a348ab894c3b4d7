"""Who drives a run: one process at a time. `fit` and `run_sweep` do so inside `hold_run_lock`; `corral runs` reads it.

A driver makes the file with the next number in `drivers/` of the run's directory, which one of many can do, on a disk
(a hard link) as in an object store (a put on condition); it rewrites its own file while it lives and touches no other.
The last file tells who drives the run. Whether that one lives:

- On its own host its process is looked up, number and start time: after kill -9 the run is free at once.
- On another host it lives while the `seen` of its file, rewritten every 15 s, or its workers' progress.json is younger
  than two minutes; the clocks of the machines are taken to agree within that. One that only slept finds the file of its
  successor and stops.
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

import psutil

from training.errors import ConfigError, CorralError, RunStopped, TrainingError
from training.home import corral_home
from training.runs.progress import read_progress
from training.runs.run_dir import RunDir

_FOLDER = "drivers"
_SEEN_EVERY_S = 15.0
_SILENT_S = 120.0


@dataclass(frozen=True, slots=True)
class LockHolder:
    """The process that drives a run, or drove it: times are seconds since the epoch, by its own clock.

    Attributes:
        seen: when it, or a worker of it, last said that it lives.
        ended: None while it runs, and where it was killed.
    """

    pid: int
    host: str
    started: float
    seen: float
    ended: float | None = None

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether it drives the run now, as far as can be told from here."""
        if self.is_here:
            return self.process() is not None
        return self.ended is None and time.time() - self.seen < _SILENT_S

    def process(self) -> psutil.Process | None:
        """The process, if it is on this machine and alive; never another one that has its number now."""
        if not self.is_here or self.ended is not None:
            return None
        try:
            process = psutil.Process(self.pid)
            # The driver had this number when it wrote `started`; whoever has it since was created later.
            is_driver = process.create_time() <= self.started + 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if is_driver else None

    def is_same(self, other: "LockHolder") -> bool:
        """Whether both are records of one process, early and late."""
        return (self.pid, self.host, self.started) == (other.pid, other.host, other.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {datetime.fromtimestamp(self.started, UTC):%F %T} UTC"


def read_lock_holder(run_dir: RunDir) -> LockHolder | None:
    """The run's last driver.

    Raises:
        TrainingError: the directory cannot be read.
    """
    return _last(run_dir)[1]


@contextlib.contextmanager
def hold_run_lock(run_dir: RunDir) -> Iterator[None]:
    """Drive the run for the block, alone. A `ConfigError` leaves no trace in the directory.

    Raises:
        TrainingError: another process drives it, or took it over while this one slept.
        RunStopped: Ctrl-C came, or what raises KeyboardInterrupt as well.
    """
    file, driver = _take(run_dir)
    done = threading.Event()
    watch = threading.Thread(target=_keep_seen, args=(run_dir, file, driver, done), daemon=True)
    watch.start()
    began = True
    try:
        yield
    except ConfigError:
        began = False
        raise
    except KeyboardInterrupt:
        if successor := _successor(run_dir, driver):
            raise TrainingError(
                f"run {run_dir.name!r} was taken over by {successor}, as this process gave no sign of life for "
                f"{_SILENT_S:.0f} s: it goes on there and has ended here"
            ) from None
        raise RunStopped(run_dir.name) from None
    finally:
        done.set()
        watch.join()
        with contextlib.suppress(CorralError):  # the disk may be full
            if began:
                run_dir.write_json(file, asdict(replace(driver, seen=time.time(), ended=time.time())))
            else:
                run_dir.remove(file)


def _last(run_dir: RunDir) -> tuple[int, LockHolder | None]:
    """The number of the last driver's file, 0 where there is none, and the driver."""
    files = run_dir.files(_FOLDER)
    if not files:
        return 0, None
    try:
        driver = LockHolder(**run_dir.read_json(files[-1]))
    except TypeError:  # not ours
        driver = None
    if driver and not driver.is_here and driver.ended is None and (progress := read_progress(run_dir)):
        driver = replace(driver, seen=max(driver.seen, progress.time))
    return int(PurePosixPath(files[-1]).stem), driver


def _take(run_dir: RunDir) -> tuple[str, LockHolder]:
    number, last = _last(run_dir)
    if last and last.is_alive:
        raise _driven(run_dir, last)
    now = time.time()
    driver = LockHolder(os.getpid(), socket.gethostname(), now, now)
    file = f"{_FOLDER}/{number + 1:04d}.json"
    if not run_dir.create_json(file, asdict(driver)):  # another one was faster
        raise _driven(run_dir, read_lock_holder(run_dir))
    return file, driver


def _driven(run_dir: RunDir, driver: LockHolder | None) -> TrainingError:
    who, there, free = str(driver or "a process that has just started"), "", ""
    if driver and not driver.is_here:
        who += f", seen {max(0.0, time.time() - driver.seen):.0f} s ago"
        there, free = " there", f"; {_SILENT_S:.0f} s without a sign of it free the run"
    storage = "" if run_dir.parent == str(corral_home() / "runs") else f" --storage {run_dir.parent}"
    return TrainingError(
        f"run {run_dir.name!r} is driven by {who}: wait for it, end it{there} with 'corral runs stop "
        f"{run_dir.name}{storage}', or choose another run_name{free}"
    )


def _keep_seen(run_dir: RunDir, file: str, driver: LockHolder, done: threading.Event) -> None:
    """Say every now and then that the driver lives; stop it as Ctrl-C does where another one has taken its place."""
    while not done.wait(_SEEN_EVERY_S):
        if _successor(run_dir, driver):
            os.kill(os.getpid(), signal.SIGINT)
            return
        with contextlib.suppress(CorralError):  # a full disk, a store that is away: the next time may do
            run_dir.write_json(file, asdict(replace(driver, seen=time.time())))


def _successor(run_dir: RunDir, driver: LockHolder) -> LockHolder | None:
    """Who took the run over from `driver`, as far as it can be read."""
    with contextlib.suppress(CorralError):
        last = read_lock_holder(run_dir)
        return None if last is None or last.is_same(driver) else last
    return None
