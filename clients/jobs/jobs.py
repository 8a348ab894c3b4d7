"""Training runs and sweeps as jobs of a Ray cluster: submit, find, follow, stop, with Ray's `JobSubmissionClient`.

A job belongs to a run, by the run name in its metadata. A run that is queued, running or finished is not started again;
one that failed or was stopped is resumed by another job.
"""

import asyncio
import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.jobs.dashboard import JobError, connect, dashboard_url
from clients.jobs.package import JobPackage, format_size, pack
from training.dotted_keys import flattened
from training.errors import ConfigError, CorralError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from training.config.train_config import TrainConfig

_STOP_S = 30  # for a driver to shut down cleanly before Ray kills it; Ray's default is 3
_RECONNECT_S = 1.0
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """The job of a training run or a sweep; `started` and `ended` are in seconds since the epoch."""

    submission_id: str
    run_name: str
    adapter: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    entrypoint: str
    started: float
    ended: float | None
    exit_code: int | None
    message: str
    submitted_config: Mapping[str, Any]  # flat configuration, and the hash of the data sent

    @property
    def has_ended(self) -> bool:
        """Whether its status is final."""
        return self.status in _ENDED


class TrainingJobs:
    """The training jobs of the cluster at `address`: its dashboard, as http(s)://HOST:PORT or HOST:PORT, or `auto`.

    Raises:
        ConfigError: `address` is not the address of a dashboard.
        JobError: nothing answers there, or the token is missing or rejected. All methods raise it too.
    """

    def __init__(self, address: str) -> None:
        self.url = dashboard_url(address)
        with self._guard():
            self._client = connect(self.url)

    def all(self) -> list[TrainingJob]:
        """All training jobs that the cluster knows, the oldest first."""
        with self._guard():
            details = self._client.list_jobs()
        jobs = [_training_job(job) for job in details if (job.metadata or {}).get("corral") == "train"]
        return sorted(jobs, key=lambda job: job.started)

    def find(self, name: str) -> TrainingJob:
        """The latest job of the run `name`, else the job with that submission id.

        The first job of a run often has the run's name as its id; the name then means the job that resumed the run.
        """
        jobs = self.all()
        matches = [job for job in jobs if job.run_name == name] or [job for job in jobs if job.submission_id == name]
        if not matches:
            known_runs = ", ".join(dict.fromkeys(job.run_name for job in reversed(jobs))) or "none"
            raise JobError(f"no training job or run {name!r} at {self.url}; its runs: {known_runs:.300}")
        return matches[-1]

    def _refresh(self, submission_id: str) -> TrainingJob:
        """The current state of a job."""
        for job in self.all():
            if job.submission_id == submission_id:
                return job
        raise JobError(f"job {submission_id!r} is no longer known at {self.url}: see 'corral runs list'")

    def submit(
        self, package: JobPackage, config: "TrainConfig", submission_id: str, *, env: Mapping[str, str], force: bool
    ) -> TrainingJob:
        """Start a job for the run `config.run_name`; if one is queued, running or finished, return that one instead.

        Raises:
            ConfigError: that one has another configuration or other data.
        """
        run_name = str(config.run_name)
        submitted_config = {
            **flattened(config.model_dump(mode="json")),
            "data sent (sha256)": package.data_sha256()[:16],
        }
        jobs = self.all()
        run_jobs = [job for job in jobs if job.run_name == run_name]
        if run_jobs and run_jobs[-1].status not in ("FAILED", "STOPPED"):
            return _check_same_config(run_jobs[-1], submitted_config)
        used_ids = {job.submission_id for job in jobs}
        job_id, attempt = submission_id, 1
        while job_id in used_ids:  # Ray accepts an id only once
            attempt += 1
            job_id = f"{submission_id}.{attempt}"
        command = ["python", "-m", "training", "--config", package.config_name, *package.overrides]
        with tempfile.TemporaryDirectory(prefix="corral-") as folder, self._guard():
            archive = Path(folder) / "package.zip"
            size = package.write(archive)
            print(f"sending {package.summary()}, {format_size(size)} compressed", file=sys.stderr)
            try:
                self._client.submit_job(
                    entrypoint=shlex.join([*command, *(["--force"] if force else [])]),
                    submission_id=job_id,
                    runtime_env={
                        "working_dir": str(archive),
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S), **env},
                    },
                    metadata={
                        "corral": "train",
                        "run_name": run_name,
                        "adapter": config.adapter,
                        "told": json.dumps(submitted_config),
                    },
                )
            except RuntimeError:
                # Another client may have submitted the same id meanwhile: only one of them succeeds.
                winner = next((job for job in self.all() if job.submission_id == job_id), None)
                if winner is None:
                    raise
                return _check_same_config(winner, submitted_config)
        return self._refresh(job_id)

    def logs(self, job: TrainingJob) -> str:
        """The job's output so far."""
        with self._guard():
            return str(self._client.get_job_logs(job.submission_id))

    def follow(self, job: TrainingJob, write: Callable[[str], object]) -> TrainingJob:
        """Write the job's output until it ends, reconnecting if the connection is lost. Returns the ended job."""
        cursor = LogCursor(write)
        while True:
            with contextlib.suppress(RuntimeError, *_connection_errors()):
                asyncio.run(self._tail(job.submission_id, cursor))
            job = self._refresh(job.submission_id)
            if job.has_ended:
                return job
            time.sleep(_RECONNECT_S)

    async def _tail(self, submission_id: str, cursor: "LogCursor") -> None:
        cursor.position = 0  # every connection gets the output from its beginning
        async for text in self._client.tail_job_logs(submission_id):
            cursor(text)

    def stop(self, job: TrainingJob) -> TrainingJob:
        """Let the job's driver shut down cleanly, and wait until it has."""
        with self._guard():
            self._client.stop_job(job.submission_id)
        deadline = time.monotonic() + 2 * _STOP_S
        while not job.has_ended and time.monotonic() < deadline:
            time.sleep(0.3)
            job = self._refresh(job.submission_id)
        if not job.has_ended:
            raise JobError(f"job {job.submission_id!r} is still {job.status}: check again with 'corral runs list'")
        return job

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Raise the errors of Ray's client as JobError, in one line."""
        try:
            yield
        except CorralError:
            raise
        except Exception as error:  # Ray's own, requests' and aiohttp's
            reason = " ".join(str(error).split())[:300]
            raise JobError(f"{self.url}: {reason or type(error).__name__}") from error


@dataclass(slots=True)
class LogCursor:
    """Writes a text that is sent again from its beginning after each reconnection, every character once."""

    write: Callable[[str], object]
    num_written: int = 0  # characters
    position: int = 0  # characters received on this connection

    def __call__(self, text: str) -> None:
        if new := text[max(0, self.num_written - self.position) :]:
            self.write(new)
        self.position += len(text)
        self.num_written = max(self.num_written, self.position)


def submit_training(
    address: str,
    config_path: Path,
    overrides: list[str],
    *,
    submission_id: str | None = None,
    env: list[str] | None = None,
    force: bool = False,
    wait: bool = True,
) -> None:
    """Check the configuration of a run or sweep here, submit it as a job, and print its output until it ends.

    Raises:
        CorralError: configuration, data or cluster cannot be used, or the job did not succeed.
    """
    from training.runs.resume import fresh_run_name
    from training.sweep.config import load_run_config

    config = load_run_config(config_path, overrides)
    run_name = config.run_name or submission_id or fresh_run_name(config)
    env_vars = _env_vars(env or [])
    other_overrides = [override for override in overrides if not override.startswith("run_name=")]
    package = pack(config_path, [*other_overrides, f"run_name={run_name}"], config)
    job_config = load_run_config(config_path, package.overrides)
    _check_data(config, package)
    jobs = TrainingJobs(address)
    for path in package.remote_paths:
        print(f"{path} is not on this machine and not sent: it must exist on the cluster", file=sys.stderr)
    job = jobs.submit(package, job_config, submission_id or run_name, env=env_vars, force=force)
    print(f"job {job.submission_id} of run {job.run_name} at {jobs.url}: {job.status}", file=sys.stderr)
    if wait:
        wait_for(jobs, job)
    else:
        print(_hints(jobs, job), file=sys.stderr)


def wait_for(jobs: TrainingJobs, job: TrainingJob) -> None:
    """Print a job's output until it ends; Ctrl-C detaches, and the job keeps running.

    Raises:
        JobError: it failed or was stopped, or Ctrl-C came first.
    """
    try:
        job = jobs.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\n{_hints(jobs, job)}", file=sys.stderr)
        raise JobError(f"detached from job {job.submission_id}, which keeps running") from None
    if job.status == "STOPPED":
        raise JobError(f"job {job.submission_id} was stopped: submit it again to resume run {job.run_name}")
    if job.status == "FAILED":
        reason = "see the last lines of its output" if job.exit_code else " ".join(job.message.split())[:300]
        raise JobError(f"job {job.submission_id} failed: {reason}; submit it again to resume run {job.run_name}")


def _training_job(job: "JobDetails") -> TrainingJob:
    metadata = job.metadata or {}
    return TrainingJob(
        submission_id=str(job.submission_id),
        run_name=metadata["run_name"],
        adapter=metadata["adapter"],
        status=str(job.status),
        entrypoint=job.entrypoint,
        started=(job.start_time or 0) / 1000,
        ended=job.end_time / 1000 if job.end_time else None,
        exit_code=job.driver_exit_code,
        message=job.message or "",
        submitted_config=json.loads(metadata["told"]),
    )


def _check_same_config(job: TrainingJob, submitted_config: Mapping[str, Any]) -> TrainingJob:
    """`job`, if it was submitted with the same configuration and data."""
    for key in sorted(submitted_config.keys() | job.submitted_config.keys()):
        if submitted_config.get(key) != job.submitted_config.get(key):
            raise ConfigError(
                f"run {job.run_name!r} is job {job.submission_id} ({job.status}), which was submitted with "
                f"{key}={job.submitted_config.get(key)!r}, now {key} is {submitted_config.get(key)!r}: set it back, or "
                "choose another --submission-id"
            )
    return job


def _check_data(config: "TrainConfig", package: JobPackage) -> None:
    """Read the data as the job will, if the data and the base's tokenizer are on this machine."""
    from training.base_models.embedded import EMBEDDED_MODEL
    from training.data.run_inputs import read_inputs

    base_is_local = config.base_model == EMBEDDED_MODEL or Path(config.base_model).expanduser().is_dir()
    num_sources = len(config.data.path) + len(config.data.held_out_path)
    num_local = sum(Path(s.path).expanduser().exists() for s in (*config.data.path, *config.data.held_out_path))
    if base_is_local and num_local == num_sources and not package.remote_paths:
        print(read_inputs(config).report.summary(), file=sys.stderr)


def _env_vars(items: list[str]) -> dict[str, str]:
    """Parse `KEY=VALUE`, or `KEY`, whose value is taken from this environment."""
    values = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals and key not in os.environ:
            raise ConfigError(f"--env {item} has no value, and {key} is not set here: write --env {key}=VALUE")
        values[key] = value if equals else os.environ[key]
    return values


def _hints(jobs: TrainingJobs, job: TrainingJob) -> str:
    arguments = f"{job.run_name} --address {jobs.url}"
    return f"follow it  corral runs logs {arguments} --follow\nstop it    corral runs stop {arguments}"


def _connection_errors() -> tuple[type[Exception], ...]:
    import aiohttp  # a dependency of Ray's client

    return (aiohttp.ClientError, OSError)
