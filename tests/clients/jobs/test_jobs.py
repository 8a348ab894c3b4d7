"""Trainings and sweeps as jobs of a real Ray head with token authentication, by the commands a user types."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from clients.jobs import jobs
from clients.jobs.dashboard import JobError, dashboard_url
from clients.jobs.jobs import TrainingJobs
from tests.conftest import free_port, ray_head, suspended, wait_until
from training.base_models.resolve import BaseCheckpoint
from training.errors import ConfigError
from training.registry.registry import AdapterRegistry
from training.runs.metrics_log import read_metrics
from training.runs.status import read_run

TOKEN = "a-token-of-this-module"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A head node, and the folder and environment of a user whose token lies in ~/.ray/auth_token."""

    address: str
    folder: Path
    env: dict[str, str]

    def corral(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "clients.cli", *arguments],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.corral("train", "support.yaml", "--submit", self.address, *arguments)

    def jobs(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(
            self.corral("runs", "list", "--address", self.address, "--json").stdout
        )
        return listed


@pytest.fixture(scope="module")
def cluster(tiny_base: BaseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("user")
    config = {
        "base_model": str(tiny_base.path),
        "adapter": "support",
        "data": {"path": "rows.jsonl"},
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "max_length": 64,
        "save_steps": 5,
        "sample_prompts": 0,
        "resources_per_worker": {"CPU": 1},
    }
    (folder / "support.yaml").write_text(json.dumps(config))
    search = {"search": {"learning_rate": {"grid": [1e-5, 1e-2]}}, "sweep": {"max_concurrent_trials": 1}}
    (folder / "search.yaml").write_text(json.dumps(config | search))
    rows = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    token = folder / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(f"{TOKEN}\n")
    root = str(Path(__file__).resolve().parents[3])
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH") and key != "PYTHONPATH"}
    # Neither this checkout nor a token is in the head's reach but by what it is given.
    with ray_head(env | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}) as address:
        yield Cluster(address, folder, env | {"HOME": str(folder), "PYTHONPATH": root, "RAY_ADDRESS": "127.0.0.1:1"})


@pytest.fixture(scope="module")
def trained(cluster: Cluster) -> subprocess.CompletedProcess[str]:
    """The output of `corral train --submit` for a run that finished."""
    return cluster.submit("--submission-id", "nightly", "max_steps=4", "--env", "NIGHT=1")


@pytest.mark.slow
def test_a_submitted_training_shows_its_output_and_registers_its_adapter(
    cluster: Cluster, trained: subprocess.CompletedProcess[str]
) -> None:
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "sending support.yaml, " in trained.stderr
    assert "1 data file" in trained.stderr
    assert "tiny-llama:support@1 is registered" in trained.stdout
    manifest = AdapterRegistry().resolve("support")
    assert manifest.run_name == "nightly"
    assert manifest.dataset is not None
    assert manifest.dataset.sources == ["data/rows.jsonl"]
    (job,) = cluster.jobs()
    assert job["status"] == "SUCCEEDED"
    assert job["entrypoint"] == (
        "python -m training --config support.yaml max_steps=4 run_name=nightly data.path=data/rows.jsonl"
    )


@pytest.mark.slow
def test_the_same_submission_id_is_one_run(cluster: Cluster, trained: subprocess.CompletedProcess[str]) -> None:
    second = cluster.submit("--submission-id", "nightly", "max_steps=4")
    assert second.returncode == 0, second.stderr
    assert "tiny-llama:support@1 is registered" in second.stdout
    assert [job["submission_id"] for job in cluster.jobs()] == ["nightly"]
    assert AdapterRegistry().versions("support") == [1]


@pytest.mark.slow
def test_another_configuration_or_other_data_under_the_same_id_is_refused_with_the_difference(
    cluster: Cluster, trained: subprocess.CompletedProcess[str]
) -> None:
    other = cluster.submit("--submission-id", "nightly", "max_steps=4", "lora.r=8")
    assert other.returncode == 2
    assert "submitted with lora.r=16, now lora.r is 8" in other.stderr.splitlines()[-1]
    (cluster.folder / "more.jsonl").write_text((cluster.folder / "rows.jsonl").read_text() * 2)
    other = cluster.submit("--submission-id", "nightly", "max_steps=4", "data.path=more.jsonl")
    assert other.returncode == 2
    assert "data sent (sha256)" in other.stderr.splitlines()[-1]


@pytest.mark.slow
def test_runs_lists_shows_and_logs_jobs(cluster: Cluster, trained: subprocess.CompletedProcess[str]) -> None:
    where = ("--address", cluster.address)
    assert "nightly" in cluster.corral("runs", "list", *where).stdout
    assert "nightly: SUCCEEDED" in cluster.corral("runs", "show", "nightly", *where).stdout
    assert "is registered" in cluster.corral("runs", "logs", "nightly", *where).stdout
    stopped = cluster.corral("runs", "stop", "nightly", *where)
    assert (stopped.returncode, stopped.stdout) == (0, "job nightly has ended already: SUCCEEDED\n")
    unknown = cluster.corral("runs", "show", "nightli", *where)
    assert unknown.returncode == 1
    assert "its runs: nightly" in unknown.stderr


@pytest.mark.slow
def test_what_fails_there_fails_here(cluster: Cluster) -> None:
    failed = cluster.submit("--submission-id", "crowded", "num_workers=9")
    assert failed.returncode == 1
    assert "num_workers is 9" in failed.stdout
    assert failed.stderr.splitlines()[-1].startswith("error: job crowded failed")


@pytest.mark.slow
def test_what_is_wrong_here_is_refused_here(cluster: Cluster) -> None:
    num_jobs = len(cluster.jobs())
    for arguments, code, words in (
        (["lora.rr=8"], 2, "did you mean 'lora.r'"),
        (["data.path=none.jsonl"], 1, "none.jsonl"),
        (["--submission-id", "no spaces"], 2, "run_name"),
        (["--env", "NOT_SET_HERE"], 2, "NOT_SET_HERE is not set here"),
    ):
        result = cluster.submit(*arguments)
        assert result.returncode == code, result.stderr
        assert words in result.stderr.splitlines()[-1]
    (cluster.folder / "broken.jsonl").write_text('{"prompt": "no completion"}\n')
    assert "broken.jsonl:1" in cluster.submit("data.path=broken.jsonl").stderr
    without = cluster.corral("train", "support.yaml", "--no-wait")
    assert (without.returncode, "--submit" in without.stderr) == (2, True)
    assert len(cluster.jobs()) == num_jobs


@pytest.mark.slow
@pytest.mark.promise("D14")
def test_ctrl_c_detaches_stop_leaves_no_process_and_the_same_id_resumes(cluster: Cluster) -> None:
    arguments = ("--submission-id", "stopped", "adapter=stopped", "max_steps=400")
    client = cluster.start("train", "support.yaml", "--submit", cluster.address, *arguments)
    wait_until(lambda: step_of("stopped") >= 7, seconds=180)
    with suspended(training_processes("RayTrainWorker")):
        client.send_signal(signal.SIGINT)
        _, stderr = client.communicate(timeout=300)
        assert client.returncode == 1
        assert f"corral runs stop stopped --address {cluster.address}" in stderr
        assert stderr.splitlines()[-1] == "error: detached from job stopped, which keeps running"
        assert status_of(cluster, "stopped") == "RUNNING"
        assert training_processes("run_name=stopped")

    stopped = cluster.corral("runs", "stop", "stopped", "--address", cluster.address)
    assert stopped.returncode == 0, stopped.stderr
    assert "job stopped is STOPPED" in stopped.stdout
    wait_until(lambda: not training_processes("run_name=stopped"))
    wait_until(lambda: not training_processes("RayTrainWorker"))
    assert "stopped" not in AdapterRegistry().names()
    assert read_run(runs_of(), "stopped").state == "stopped"

    resumed = cluster.submit(*arguments)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "job stopped.2 of run stopped" in resumed.stderr
    assert "tiny-llama:stopped@1 is registered" in resumed.stdout
    assert read_metrics(read_run(runs_of(), "stopped").run_dir).steps == list(range(1, 401))
    assert read_run(runs_of(), "stopped").state == "finished"


@pytest.mark.slow
@pytest.mark.promise("D14")
def test_a_sweep_is_followed_detached_from_stopped_and_resumed_under_one_id(cluster: Cluster) -> None:
    command = ("sweep", "search.yaml", "--submit", cluster.address, "--submission-id", "search", "adapter=searched-job")
    first, second = (Path(runs_of(), "search", "trials", number) for number in ("000", "001"))
    client = cluster.start(*command, "max_steps=240")
    wait_until(lambda: (first / "result.json").exists() and (second / "metrics.jsonl").exists(), seconds=180)
    with suspended(training_processes("ray::ImplicitFunc")):
        client.send_signal(signal.SIGINT)
        _, stderr = client.communicate(timeout=300)
        assert client.returncode == 1
        assert stderr.splitlines()[-1] == "error: detached from job search, which keeps running"
        assert read_run(runs_of(), "search").state == "running"
        assert read_run(runs_of(), "search/trials/000").state == "finished"
        assert read_run(runs_of(), "search/trials/001").state == "running"

    stopped = cluster.corral("runs", "stop", "search", "--address", cluster.address)
    assert "job search is STOPPED: submit run search again to resume it" in stopped.stdout, stopped.stderr
    wait_until(lambda: not training_processes("run_name=search"))
    wait_until(lambda: not training_processes("ray::ImplicitFunc"))
    assert read_run(runs_of(), "search").state == "stopped"
    assert "searched-job" not in AdapterRegistry().names()
    assert not (second / "result.json").exists()
    trained = (first / "result.json").stat().st_mtime_ns

    resumed = cluster.corral(*command, "max_steps=240")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "job search.2 of run search" in resumed.stderr
    assert "registered tiny-llama:searched-job@1 from trial 1" in resumed.stdout
    assert (first / "result.json").stat().st_mtime_ns == trained
    assert AdapterRegistry().resolve("searched-job").run_name == "search/trials/001"

    repeated = cluster.corral(*command, "max_steps=240")
    assert repeated.returncode == 0, repeated.stderr
    assert "@1 from trial 1" in repeated.stdout
    assert AdapterRegistry().versions("searched-job") == [1]
    other = cluster.corral(*command, "max_steps=240", "sweep.num_samples=2")
    assert other.returncode == 2
    assert "submitted with sweep.num_samples=1, now sweep.num_samples is 2" in other.stderr.splitlines()[-1]
    # Its first job has the id `search`: the name means the run, as it is now.
    assert "@1 from trial 1" in cluster.corral("runs", "logs", "search", "--address", cluster.address).stdout
    output = cluster.corral("runs", "show", "search", "--address", cluster.address).stdout
    assert "search: SUCCEEDED" in output
    assert "python -m training --config search.yaml adapter=searched-job max_steps=240 run_name=search" in output


@pytest.mark.slow
def test_a_wrong_or_missing_token_is_one_clear_line(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(JobError, match=r"requires a token: set RAY_AUTH_TOKEN"):
        TrainingJobs(cluster.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-another-cluster")
    with pytest.raises(JobError, match="rejects the token from RAY_AUTH_TOKEN"):
        TrainingJobs(cluster.address)


def test_addresses_as_users_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_DASHBOARD_ADDRESS", raising=False)
    assert dashboard_url("http://head:8265/") == "http://head:8265"
    assert dashboard_url("https://ray.example.com") == "https://ray.example.com"
    assert dashboard_url("head:8265") == "http://head:8265"
    assert dashboard_url("head") == "http://head:8265"
    assert dashboard_url("auto") == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
    assert dashboard_url("auto") == "http://other:8265"
    with pytest.raises(ConfigError, match="ray://head:10001"):
        dashboard_url("ray://head:10001")


def test_nothing_at_an_address_is_one_clear_line() -> None:
    with pytest.raises(JobError, match=r"no Ray dashboard answers at http://127.0.0.1:.* check host and port"):
        TrainingJobs(f"127.0.0.1:{free_port()}")


def test_output_told_again_after_a_lost_connection_is_shown_once() -> None:
    output: list[str] = []
    cursor = jobs.LogCursor(output.append)
    cursor("one\ntwo\n")
    cursor.position = 0
    for text in ("one\n", "two\nthr", "ee\n"):
        cursor(text)
    assert "".join(output) == "one\ntwo\nthree\n"


def runs_of() -> str:
    return f"{os.environ['CORRAL_HOME']}/runs"


def step_of(run_name: str) -> int:
    file = Path(runs_of(), run_name, "metrics.jsonl")
    return len(file.read_text().splitlines()) if file.exists() else 0


def status_of(cluster: Cluster, submission_id: str) -> str:
    return next(str(job["status"]) for job in cluster.jobs() if job["submission_id"] == submission_id)


def training_processes(words: str) -> list[psutil.Process]:
    """Processes of this session's cluster with these words in their command line."""
    processes = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command, env = process.info["cmdline"] or [], process.info["environ"] or {}
        if words in " ".join(command) and "clients.cli" not in command and env.get("RAY_AUTH_TOKEN") == TOKEN:
            processes.append(process)
    return processes
