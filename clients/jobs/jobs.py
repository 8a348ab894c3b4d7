"""Trainings and sweeps as jobs of a Ray cluster: submit, find, follow, stop, over Ray's `JobSubmissionClient`.

`corral train --submit`, `corral sweep --submit` and `corral runs --address` use it. A job belongs to a run, by the run
name in its metadata: a run that is queued, at work or done is not started again, one that failed or was stopped goes on
in another job.
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
from clients.jobs.package import JobPackage, pack, readable
from training.errors import ConfigError, CorralError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from training.config.train_config import TrainConfig

_STOP_S = 30  # for a driver to end in order before Ray kills it; Ray's default is 3
_RECONNECT_S = 1.0
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A job that trains, once or in a sweep; `started` and `ended` are seconds since the epoch."""

    submission_id: str
    run_name: str
    adapter: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    entrypoint: str
    started: float
    ended: float | None
    exit_code: int | None
    message: str
    submitted_config: Mapping[str, Any]  # the configuration, flat, and the hash of the data sent

    @property
    def has_ended(self) -> bool:
        """Whether its status is final."""
        return self.status in _ENDED


class TrainingJobs:
    """The training jobs of the cluster at `address`: its dashboard, as http(s)://HOST:PORT or HOST:PORT, or `auto`.

    Raises:
        ConfigError: `address` is of another form.
        JobError: nothing answers there, or it wants another token. All methods raise it too.
    """

    def __init__(self, address: str) -> None:
        self.url = dashboard_url(address)
        with self._guard():
            self._client = connect(self.url)

    def all(self) -> list[TrainingJob]:
        """Every training job that the cluster remembers, the oldest first."""
        with self._guard():
            details = self._client.list_jobs()
        jobs = [_training_job(job) for job in details if (job.metadata or {}).get("corral") == "train"]
        return sorted(jobs, key=lambda job: job.started)

    def find(self, name: str) -> TrainingJob:
        """The last job of the run with that name, else the job with that submission id.

        The first job of a run often has its name as id; asked for by it, the one that resumed it is meant.
        """
        jobs = self.all()
        named = [job for job in jobs if job.run_name == name] or [job for job in jobs if job.submission_id == name]
        if not named:
            known = ", ".join(dict.fromkeys(job.run_name for job in reversed(jobs))) or "none"
            raise JobError(f"no training job or run {name!r} at {self.url}: there are {known:.300}")
        return named[-1]

    def _refresh(self, submission_id: str) -> TrainingJob:
        """That very job, as it is now."""
        for job in self.all():
            if job.submission_id == submission_id:
                return job
        raise JobError(f"job {submission_id!r} is no longer known at {self.url}: see 'corral runs list'")

    def submit(
        self, package: JobPackage, config: "TrainConfig", submission_id: str, *, env: Mapping[str, str], force: bool
    ) -> TrainingJob:
        """Start a job for the run `config.run_name`, unless one is queued, at work or done: then that one.

        Raises:
            ConfigError: that one was told something else.
        """
        run_name = str(config.run_name)
        told = {**_flat(config.model_dump(mode="json")), "data sent (sha256)": package.data_sha256()[:16]}
        jobs = self.all()
        earlier = [job for job in jobs if job.run_name == run_name]
        if earlier and earlier[-1].status not in ("FAILED", "STOPPED"):
            return _same(earlier[-1], told)
        taken = {job.submission_id for job in jobs}
        fresh_id, attempt = submission_id, 1
        while fresh_id in taken:  # Ray takes an id once
            attempt += 1
            fresh_id = f"{submission_id}.{attempt}"
        command = ["python", "-m", "training", "--config", package.config_name, *package.overrides]
        with tempfile.TemporaryDirectory(prefix="corral-") as folder, self._guard():
            archive = Path(folder) / "package.zip"
            size = package.write(archive)
            print(f"sending {package.summary()}, {readable(size)} packed", file=sys.stderr)
            try:
                self._client.submit_job(
                    entrypoint=shlex.join([*command, *(["--force"] if force else [])]),
                    submission_id=fresh_id,
                    runtime_env={
                        "working_dir": str(archive),
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S), **env},
                    },
                    metadata={
                        "corral": "train",
                        "run_name": run_name,
                        "adapter": config.adapter,
                        "told": json.dumps(told),
                    },
                )
            except RuntimeError:
                # Somebody else may have submitted it meanwhile; one of two wins.
                winner = next((job for job in self.all() if job.submission_id == fresh_id), None)
                if winner is None:
                    raise
                return _same(winner, told)
        return self._refresh(fresh_id)

    def logs(self, job: TrainingJob) -> str:
        """What the job has printed."""
        with self._guard():
            return str(self._client.get_job_logs(job.submission_id))

    def follow(self, job: TrainingJob, write: Callable[[str], object]) -> TrainingJob:
        """Pass on what the job printed and prints until it ends, over lost connections too; returns it as it ended."""
        unseen = LogCursor(write)
        while True:
            with contextlib.suppress(RuntimeError, *_lost_connection()):
                asyncio.run(self._tail(job.submission_id, unseen))
            job = self._refresh(job.submission_id)
            if job.has_ended:
                return job
            time.sleep(_RECONNECT_S)

    async def _tail(self, submission_id: str, unseen: "LogCursor") -> None:
        unseen.position = 0  # Ray tells a job's output from its beginning
        async for text in self._client.tail_job_logs(submission_id):
            unseen(text)

    def stop(self, job: TrainingJob) -> TrainingJob:
        """Have the job's driver end in order, and wait until it has."""
        with self._guard():
            self._client.stop_job(job.submission_id)
        deadline = time.monotonic() + 2 * _STOP_S
        while not job.has_ended and time.monotonic() < deadline:
            time.sleep(0.3)
            job = self._refresh(job.submission_id)
        if not job.has_ended:
            raise JobError(f"job {job.submission_id!r} is still {job.status}: look again with 'corral runs list'")
        return job

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn what Ray's client raises into one line."""
        try:
            yield
        except CorralError:
            raise
        except Exception as error:  # its own, requests' and aiohttp's
            reason = " ".join(str(error).split())[:300]
            raise JobError(f"{self.url}: {reason or type(error).__name__}") from error


@dataclass(slots=True)
class LogCursor:
    """Passes on of a text that is told again from its beginning what it has not passed on yet."""

    write: Callable[[str], object]
    seen: int = 0  # characters
    position: int = 0

    def __call__(self, text: str) -> None:
        if new := text[max(0, self.seen - self.position) :]:
            self.write(new)
        self.position += len(text)
        self.seen = max(self.seen, self.position)


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
    """Check the configuration of a training or a sweep here, send it as a job, and pass its output on until it ends.

    Raises:
        CorralError: configuration, data or cluster do not fit, or the job did not succeed.
    """
    from training.runs.resume import fresh_run_name
    from training.sweep.config import load_run_config

    config = load_run_config(config_path, overrides)
    run_name = config.run_name or submission_id or fresh_run_name(config)
    env_vars = _env_vars(env or [])
    others = [override for override in overrides if not override.startswith("run_name=")]
    package = pack(config_path, [*others, f"run_name={run_name}"], config)
    there = load_run_config(config_path, package.overrides)
    _check_data(config, package)
    jobs = TrainingJobs(address)
    for path in package.elsewhere:
        print(f"{path} is not on this machine and not sent: the cluster has to have it", file=sys.stderr)
    job = jobs.submit(package, there, submission_id or run_name, env=env_vars, force=force)
    print(f"job {job.submission_id} of run {job.run_name} at {jobs.url}: {job.status}", file=sys.stderr)
    if wait:
        wait_for(jobs, job)
    else:
        print(_hints(jobs, job), file=sys.stderr)


def wait_for(jobs: TrainingJobs, job: TrainingJob) -> None:
    """Pass a job's output on until it ends; Ctrl-C leaves it alone.

    Raises:
        JobError: it failed or was stopped, or Ctrl-C came first.
    """
    try:
        job = jobs.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\n{_hints(jobs, job)}", file=sys.stderr)
        raise JobError(f"detached from job {job.submission_id}, which goes on") from None
    if job.status == "STOPPED":
        raise JobError(f"job {job.submission_id} was stopped: submit it again to resume run {job.run_name}")
    if job.status == "FAILED":
        reason = "its last lines say why" if job.exit_code else " ".join(job.message.split())[:300]
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


def _same(job: TrainingJob, told: Mapping[str, Any]) -> TrainingJob:
    """`job`, if it was told the same."""
    for key in sorted(told.keys() | job.submitted_config.keys()):
        if told.get(key) != job.submitted_config.get(key):
            raise ConfigError(
                f"run {job.run_name!r} is job {job.submission_id} ({job.status}), which was submitted with "
                f"{key}={job.submitted_config.get(key)!r}, now {key} is {told.get(key)!r}: set it back, or choose "
                "another --submission-id"
            )
    return job


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys, as overrides name them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _check_data(config: "TrainConfig", package: JobPackage) -> None:
    """Read the data as the job will, where it and the base's tokenizer are on this machine."""
    from training.base_models.embedded import EMBEDDED_MODEL
    from training.data.run_inputs import read_inputs

    base_is_here = config.base_model == EMBEDDED_MODEL or Path(config.base_model).expanduser().is_dir()
    num_sources = len(config.data.path) + len(config.data.held_out_path)
    num_local = sum(Path(s.path).expanduser().exists() for s in (*config.data.path, *config.data.held_out_path))
    if base_is_here and num_local == num_sources and not package.elsewhere:
        print(read_inputs(config).report.summary(), file=sys.stderr)


def _env_vars(given: list[str]) -> dict[str, str]:
    """`KEY=VALUE`, or `KEY` for its value here."""
    values = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals and key not in os.environ:
            raise ConfigError(f"--env {item} has no value, and {key} is not set here: write --env {key}=VALUE")
        values[key] = value if equals else os.environ[key]
    return values


def _hints(jobs: TrainingJobs, job: TrainingJob) -> str:
    where = f"{job.run_name} --address {jobs.url}"
    return f"look again  corral runs logs {where} --follow\nstop it     corral runs stop {where}"


def _lost_connection() -> tuple[type[Exception], ...]:
    import aiohttp  # Ray's client brings it

    return (aiohttp.ClientError, OSError)
