"""The status of training runs, current and past, read from their directories on any fsspec path.

Starts nothing and writes nothing. A run's state follows from its files and from whether the process that holds its lock
is alive. A sweep is a run, and so is each of its trials, named SWEEP/trials/NUMBER.
"""

import difflib
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import fsspec
import psutil

from training.errors import CorralError
from training.names import RUN_NAME
from training.runs.run_dir import RunDir
from training.runs.run_lock import LockHolder, read_lock_holder

RunState = Literal["running", "finished", "failed", "stopped", "interrupted"]

_NAME = re.compile(rf"{RUN_NAME.pattern}(/trials/\d{{3,}})?")
_STOP_TIMEOUT_S = 120.0
_POLL_S = 0.1


class RunError(CorralError):
    """A run that does not exist, cannot be read or cannot be stopped from this machine."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The status of one run.

    Attributes:
        directory: its address, such as /home/me/.corral/runs/NAME or s3://bucket/runs/NAME.
        phase: its current or last phase, for people.
        started, ended: seconds since the epoch, if known; an interrupted run ended when it last wrote.
        metrics: those of a finished run, see `training.trainer.train.TrainResult`.
        failure: why it failed.
        driver: the process that holds its lock, or held it last.
        config: its resolved configuration.
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
    driver: LockHolder | None
    config: Mapping[str, Any]

    @property
    def run_dir(self) -> RunDir:
        """The run's directory."""
        return RunDir(*self.directory.rsplit("/", 1))

    def to_record(self) -> dict[str, Any]:
        """The fields as JSON values; `driver` has the keys of its file."""
        return asdict(self) | {"driver": self.driver and self.driver.to_record()}


def read_runs(address: str) -> list[RunStatus]:
    """All runs at `address`, the oldest first.

    Raises:
        CorralError: `address` cannot be read.
    """
    names = [name for name, is_folder in _listing(address) if is_folder]
    runs = [run for name in names if (run := _read_status(RunDir(address, name))) is not None]
    return sorted(runs, key=lambda run: (run.started or 0.0, run.name))


def read_run(address: str, name: str) -> RunStatus:
    """The run `name` at `address`.

    Raises:
        RunError: it does not exist.
        CorralError: it cannot be read.
    """
    run = _read_status(RunDir(address, name)) if _NAME.fullmatch(name) else None
    if run is None:
        known_names = [other for other, is_folder in _listing(address) if is_folder]
        matches = difflib.get_close_matches(name, known_names, n=1)
        hint = f"did you mean {matches[0]!r}?" if matches else "'corral runs list' shows the existing runs"
        raise RunError(f"no run {name!r} at {address}: {hint}")
    return run


def run_files(run: RunStatus) -> list[str]:
    """Names of files and folders in a run's directory, except Ray Train's checkpoints and records."""
    return [name for name, _ in _listing(run.directory) if not name.startswith((".", "checkpoint"))]


def stop_run(run: RunStatus) -> None:
    """Stop a run on this machine as Ctrl-C would, and wait until its process has ended.

    Raises:
        RunError: it is not running, runs on another machine, or does not end.
    """
    if run.state != "running":
        raise RunError(f"run {run.name!r} is not running: it is {run.state}")
    sweep_name, is_trial, _ = run.name.partition("/")
    if is_trial:
        raise RunError(f"{run.name!r} is a trial: 'corral runs stop {sweep_name}' stops the whole sweep")
    process = run.driver.process() if run.driver else None
    if process is None:
        place = f"is on {run.driver.host}: run this command there" if run.driver else "is unknown"
        raise RunError(
            f"the process of run {run.name!r} {place}; if the run is a Ray job, use 'corral runs stop {run.name} "
            "--address http://HOST:8265'"
        )
    try:
        process.send_signal(signal.SIGTERM)  # psutil checks again that it is the same process
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied:
        raise RunError(f"run {run.name!r} belongs to another user (process {process.pid})") from None
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while run.driver and run.driver.process():  # psutil's wait() also waits for its parent to reap it
        if time.monotonic() > deadline:
            raise RunError(
                f"run {run.name!r} was asked to stop, but process {process.pid} still runs after "
                f"{_STOP_TIMEOUT_S:.0f} s"
            )
        time.sleep(_POLL_S)


def _read_status(directory: RunDir) -> RunStatus | None:
    config = directory.read_json("config.json")
    if config is None:
        return None
    sweep_name, is_trial, _ = directory.name.partition("/")
    driver = read_lock_holder(RunDir(directory.parent, sweep_name))
    progress = directory.read_json("progress.json") or {}
    result, failure = directory.read_json("result.json"), directory.read_json("failure.json")
    metrics: dict[str, float] = (result or {}).get("metrics", {})
    num_steps = int(metrics["num_steps"]) if "num_steps" in metrics else None
    has_result = bool(result or directory.read_json("sweep.json"))
    state = _state(driver, has_result, bool(failure), is_trial=bool(is_trial))
    last_write = max(progress.get("time", 0.0), driver.heartbeat_at if driver else 0.0)
    return RunStatus(
        name=directory.name,
        directory=directory.address,
        state=state,
        adapter=config.get("adapter", ""),
        base_model=config.get("base_model", ""),
        phase=progress.get("phase", ""),
        step=num_steps or progress.get("step"),
        num_steps=num_steps or progress.get("num_steps"),
        loss=metrics.get("train_loss", progress.get("loss")),
        tokens_per_s=progress.get("tokens_per_s"),
        eta_s=progress.get("eta_s"),
        started=driver.started if driver else None,
        ended=(driver.ended or (last_write if state == "interrupted" else None)) if driver else None,
        metrics=metrics,
        failure=failure["message"] if failure else None,
        driver=driver,
        config=config,
    )


def _state(driver: LockHolder | None, has_result: bool, has_failure: bool, *, is_trial: bool) -> RunState:
    trial_ended = is_trial and (has_result or has_failure)  # its sweep may still run
    if driver and driver.is_alive and not trial_ended:
        return "running"
    if has_failure:
        return "failed"
    if has_result:
        return "finished"
    return "stopped" if driver and driver.ended is not None else "interrupted"


def _listing(address: str) -> list[tuple[str, bool]]:
    """The names in a directory, sorted, each with whether it is a folder; empty if the directory does not exist."""
    try:
        fs, path = fsspec.core.url_to_fs(address)
        fs.invalidate_cache()
        entries = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except Exception as error:  # object store clients raise their own classes
        raise RunError(f"runs at {address!r} cannot be listed: {' '.join(str(error).split())[:300]}") from error
    return sorted((entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory") for entry in entries)
