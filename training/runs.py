"""Training runs as they lie in their directories, at work or long over: `read_runs`, `read_run`, `stop_run`.

Reads what `training.fit` leaves in STORAGE/RUN_NAME, on any fsspec path; `corral runs` shows it. Starts nothing and
writes nothing. A run's state is decided from its files, its driver's process where that is on this machine, and
otherwise from how long ago it last wrote.
"""

import difflib
import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import psutil

from training.errors import CorralError
from training.home import corral_home

RunState = Literal["running", "finished", "failed", "stopped", "interrupted"]

_SILENT_S = 900.0  # a driver elsewhere that wrote nothing for so long is taken for dead: a 70B model loads for minutes
_STOP_S = 60.0
_RECORDS = ("config.json", "driver.json", "progress.json", "result.json", "failure.json")


class RunError(CorralError):
    """A run that does not exist, cannot be read or cannot be stopped from here."""


@dataclass(frozen=True, slots=True)
class Driver:
    """The process that drives a run: `started` and `ended` (None while it runs, or where it was killed) in seconds
    since the epoch."""

    pid: int
    host: str
    started: float
    ended: float | None

    def process(self) -> psutil.Process | None:
        """The process, if it is on this machine and alive; never another one that has its number now."""
        if self.host != socket.gethostname() or self.ended is not None:
            return None
        try:
            process = psutil.Process(self.pid)
            # The driver had this number when it wrote `started`; whoever has it since was created later.
            is_driver = process.create_time() <= self.started + 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if is_driver else None


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    Attributes:
        directory: its address, such as /home/me/.corral/runs/NAME or s3://bucket/runs/NAME.
        phase: what it does or did last, in words.
        started, ended: seconds since the epoch; None where no driver recorded them.
        metrics: of a finished run, see `training.sft.SftResult`.
        failure: why it failed.
        config: what it was told.
        files: what is in its directory.
    """

    name: str
    directory: str
    state: RunState
    adapter: str
    base_model: str
    phase: str
    step: int | None
    num_steps: int | None
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    started: float | None
    ended: float | None
    metrics: Mapping[str, float]
    failure: str | None
    driver: Driver | None
    config: Mapping[str, Any]
    files: list[str]


def runs_address(storage_path: str | None = None) -> str:
    """Where runs lie: `storage_path`, by default CORRAL_HOME/runs."""
    return os.path.expanduser(storage_path).rstrip("/") if storage_path else str(corral_home() / "runs")


def read_runs(address: str) -> list[Run]:
    """All runs at `address`, the oldest first.

    Raises:
        RunError: it cannot be read.
    """
    fs, root = _open(address)
    try:
        names = [
            entry["name"].rstrip("/").rpartition("/")[2]
            for entry in fs.ls(root, detail=True)
            if entry["type"] == "directory"
        ]
    except FileNotFoundError:
        return []
    except Exception as error:  # an object store's client has its own
        raise RunError(f"runs at {address!r} cannot be listed: {_one_line(error)}") from error
    found = [run for name in names if (run := _read(fs, root, address, name)) is not None]
    return sorted(found, key=lambda run: (run.started or 0.0, run.name))


def read_run(address: str, name: str) -> Run:
    """The run `name` at `address`.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    fs, root = _open(address)
    run = _read(fs, root, address, name) if name.strip("./") and "/" not in name else None
    if run is None:
        known = [other.name for other in read_runs(address)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "'corral runs list' shows what there is"
        raise RunError(f"no run {name!r} at {address}: {hint}")
    return run


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """A run's logged steps: step, num_steps, time, loss, tokens_per_s and more; a line being written is left out."""
    fs, root = _open(run.directory)
    try:
        lines = fs.cat_file(f"{root}/metrics.jsonl").decode().splitlines()
    except FileNotFoundError:
        return []
    return [step for line in lines if isinstance(step := _parsed(line), dict)]


def stop_run(run: Run) -> None:
    """End a run of this machine as Ctrl-C would, and wait until its driver is gone.

    Raises:
        RunError: it is not at work, its driver is elsewhere, or it does not end.
    """
    if run.state != "running":
        raise RunError(f"run {run.name!r} is not running, it is {run.state}")
    process = run.driver.process() if run.driver else None
    if process is None:
        where = f"on {run.driver.host}: run this there" if run.driver else "unknown"
        raise RunError(
            f"the driver of run {run.name!r} is {where}; where it is a Ray job, 'corral runs stop {run.name} "
            "--address http://HOST:8265' stops it"
        )
    try:
        process.send_signal(signal.SIGTERM)  # psutil looks once more whether it is the same process
        process.wait(_STOP_S)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired:
        raise RunError(f"run {run.name!r} was told to stop, but process {process.pid} is still there") from None
    except psutil.AccessDenied:
        raise RunError(f"run {run.name!r} belongs to another user (process {process.pid})") from None


def _read(fs: Any, root: str, address: str, name: str) -> Run | None:
    directory = f"{root}/{name}"
    try:
        files = sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in fs.ls(directory, detail=True))
        if "config.json" not in files:
            return None
        records = {record: _record(fs, f"{directory}/{record}") for record in _RECORDS if record in files}
        silent_s = min((_age_s(fs, f"{directory}/{record}") for record in records), default=float("inf"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        raise RunError(f"run {name!r} at {address!r} cannot be read: {_one_line(error)}") from error
    config, progress = records.get("config.json", {}), records.get("progress.json", {})
    driver = _driver(records.get("driver.json", {}))
    result = records.get("result.json")
    metrics: dict[str, float] = (result or {}).get("metrics", {})
    failure = records.get("failure.json")
    return Run(
        name=name,
        directory=f"{address}/{name}",
        state=_state(driver, has_result=result is not None, has_failure=failure is not None, silent_s=silent_s),
        adapter=config.get("adapter", ""),
        base_model=config.get("base_model", ""),
        phase=progress.get("phase", ""),
        step=progress.get("step") or _whole(metrics.get("num_steps")),
        num_steps=progress.get("num_steps") or _whole(metrics.get("num_steps")),
        loss=metrics.get("train_loss", progress.get("loss")),
        tokens_per_s=progress.get("tokens_per_s"),
        eta_s=progress.get("eta_s"),
        started=driver.started if driver else None,
        ended=driver.ended if driver else None,
        metrics=metrics,
        failure=failure.get("message", "") if failure is not None else None,
        driver=driver,
        config=config,
        files=files,
    )


def _state(driver: Driver | None, *, has_result: bool, has_failure: bool, silent_s: float) -> RunState:
    here = driver is not None and driver.host == socket.gethostname()
    if driver is not None and (driver.process() if here else driver.ended is None and silent_s < _SILENT_S):
        return "running"
    if has_failure:
        return "failed"
    if has_result:
        return "finished"
    if driver is None and silent_s < _SILENT_S:
        return "running"
    return "stopped" if driver is not None and driver.ended is not None else "interrupted"


def _open(address: str) -> tuple[Any, str]:
    try:
        fs, root = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise RunError(f"runs at {address!r} cannot be opened: {_one_line(error)}") from error
    fs.invalidate_cache()
    return fs, root.rstrip("/")


def _record(fs: Any, path: str) -> dict[str, Any]:
    try:
        value = _parsed(fs.cat_file(path))
    except FileNotFoundError:  # replaced or removed meanwhile
        return {}
    return value if isinstance(value, dict) else {}


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _age_s(fs: Any, path: str) -> float:
    try:
        return time.time() - float(fs.modified(path).timestamp())
    except FileNotFoundError:
        return float("inf")


def _driver(record: Mapping[str, Any]) -> Driver | None:
    try:
        return Driver(int(record["pid"]), str(record["host"]), float(record["started"]), record.get("ended"))
    except (KeyError, TypeError, ValueError):
        return None


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
