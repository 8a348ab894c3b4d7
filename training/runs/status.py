"""Training runs as they lie in their directories, at work or long over: `read_runs`, `read_run`, `stop_run`.

Reads run directories (`training.runs.run_dir`) on any fsspec path, for `corral runs`; starts nothing and writes
nothing. A run's state is decided from its files and from whether its driver lives (`training.runs.run_lock`). A sweep
is a run, and so is each of its trials, as SWEEP/trials/NUMBER.
"""

import contextlib
import difflib
import json
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import psutil

from training.errors import CorralError
from training.home import corral_home
from training.names import RUN_NAME
from training.runs.metrics_log import MetricsLog
from training.runs.run_dir import RunDir
from training.runs.run_lock import LockHolder, read_lock_holder

RunState = Literal["running", "finished", "failed", "stopped", "interrupted"]

_NAME = re.compile(rf"{RUN_NAME.pattern}(/trials/\d{{3,}})?")
_STOP_S = 120.0
_POLL_S = 0.1


class RunError(CorralError):
    """A run that does not exist, cannot be read or cannot be stopped from here."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run.

    Attributes:
        directory: its address, such as /home/me/.corral/runs/NAME or s3://bucket/runs/NAME.
        phase: what it does or did last, in words.
        started, ended: seconds since the epoch, if known; an interrupted run ended when it last wrote.
        metrics: of a finished run, see `training.trainer.train.TrainResult`.
        failure: why it failed.
        config: what it was told.
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


def runs_address(storage_path: str | None = None) -> str:
    """Where runs lie: `storage_path`, by default CORRAL_HOME/runs."""
    return os.path.expanduser(storage_path).rstrip("/") if storage_path else str(corral_home() / "runs")


def read_runs(address: str) -> list[RunStatus]:
    """All runs at `address`, the oldest first.

    Raises:
        CorralError: it cannot be read.
    """
    names = [name for name, is_folder in _listing(address) if is_folder]
    found = [run for name in names if (run := _read(RunDir(address, name))) is not None]
    return sorted(found, key=lambda run: (run.started or 0.0, run.name))


def read_run(address: str, name: str) -> RunStatus:
    """The run `name` at `address`.

    Raises:
        RunError: there is none.
        CorralError: it cannot be read.
    """
    run = _read(RunDir(address, name)) if _NAME.fullmatch(name) else None
    if run is None:
        known = [other for other, is_folder in _listing(address) if is_folder]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "'corral runs list' shows what there is"
        raise RunError(f"no run {name!r} at {address}: {hint}")
    return run


def read_metrics(run: RunStatus) -> list[dict[str, Any]]:
    """A run's logged steps: step, num_steps, time, loss, tokens_per_s and more; a line being written is left out."""
    steps = []
    for line in (RunDir(*run.directory.rsplit("/", 1)).read_text(MetricsLog.FILE) or "").splitlines():
        with contextlib.suppress(ValueError):
            steps.append(json.loads(line))
    return steps


def run_files(run: RunStatus) -> list[str]:
    """Names in a run's directory, but for Ray Train's checkpoints and records."""
    return [name for name, _ in _listing(run.directory) if not name.startswith((".", "checkpoint"))]


def stop_run(run: RunStatus) -> None:
    """End a run of this machine as Ctrl-C would, and wait until its driver is gone.

    Raises:
        RunError: it is not at work, its driver is elsewhere, or it does not end.
    """
    if run.state != "running":
        raise RunError(f"run {run.name!r} is not running, it is {run.state}")
    sweep_name, is_trial, _ = run.name.partition("/")
    if is_trial:
        raise RunError(f"{run.name!r} is a trial: 'corral runs stop {sweep_name}' stops the whole sweep")
    process = run.driver.process() if run.driver else None
    if process is None:
        where = f"on {run.driver.host}: run this there" if run.driver else "unknown"
        raise RunError(
            f"the driver of run {run.name!r} is {where}; where it is a Ray job, 'corral runs stop {run.name} "
            "--address http://HOST:8265' stops it"
        )
    try:
        process.send_signal(signal.SIGTERM)  # psutil looks once more whether it is the same process
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied:
        raise RunError(f"run {run.name!r} belongs to another user (process {process.pid})") from None
    deadline = time.monotonic() + _STOP_S
    while run.driver and run.driver.process():  # psutil's own wait would wait for its parent to take its exit code too
        if time.monotonic() > deadline:
            raise RunError(f"run {run.name!r} was told to stop, but process {process.pid} is still there")
        time.sleep(_POLL_S)


def _read(directory: RunDir) -> RunStatus | None:
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
    wrote_at = max(progress.get("time", 0.0), driver.seen if driver else 0.0)
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
        ended=(driver.ended or (wrote_at if state == "interrupted" else None)) if driver else None,
        metrics=metrics,
        failure=failure["message"] if failure else None,
        driver=driver,
        config=config,
    )


def _state(driver: LockHolder | None, has_result: bool, has_failure: bool, *, is_trial: bool) -> RunState:
    is_over = is_trial and (has_result or has_failure)  # its sweep may go on
    if driver and driver.is_alive and not is_over:
        return "running"
    if has_failure:
        return "failed"
    if has_result:
        return "finished"
    return "stopped" if driver and driver.ended is not None else "interrupted"


def _listing(address: str) -> list[tuple[str, bool]]:
    """What is in a directory, sorted: names, and whether they are folders; nothing where there is none."""
    try:
        fs, path = fsspec.core.url_to_fs(address)
        fs.invalidate_cache()
        entries = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except Exception as error:  # an object store's client has its own
        raise RunError(f"runs at {address!r} cannot be listed: {' '.join(str(error).split())[:300]}") from error
    return sorted((entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory") for entry in entries)
