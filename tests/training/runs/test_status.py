"""Runs by their directories: what state they are in, and, on real processes, that SIGTERM and kill -9 leave no process
and nothing half done, and that the name resumes them (D14)."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
from typer.testing import CliRunner

from clients.cli.main import app
from clients.cli.runs import sparkline
from tests.conftest import descendants, suspended, wait_until
from training.base_models.resolve import BaseCheckpoint
from training.registry.registry import AdapterRegistry
from training.runs.metrics_log import read_metrics
from training.runs.status import RunError, read_run, read_runs, stop_run

NOW = time.time()
CONFIG = {"adapter": "tiny", "base_model": "smollm2-135m", "run_name": "a"}
NOBODY = 2**22 + 1  # above Linux' largest pid
HERE = {"pid": NOBODY, "host": socket.gethostname(), "started": NOW - 60, "seen": NOW - 60}
RESULT = {"metrics": {"train_loss": 1.5, "num_steps": 4.0, "eval_loss": 1.6, "base_eval_loss": 3.2}, "samples": []}


def write_run(runs: Path, name: str, **records: Any) -> Path:
    directory = runs / name
    directory.mkdir(parents=True)
    for record, value in {"config": CONFIG, **records}.items():
        file = directory / ("drivers/0001.json" if record == "driver" else f"{record}.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(value))
    return directory


def corral_runs(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["runs", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def own_lock() -> dict[str, Any]:
    return {**HERE, "pid": os.getpid(), "started": time.time(), "ended": None}


@pytest.mark.parametrize(
    ("records", "state"),
    [
        ({"driver": {**HERE, "ended": None}}, "interrupted"),
        ({"driver": {**HERE, "ended": NOW}}, "stopped"),
        ({"driver": {**HERE, "ended": NOW}, "result": RESULT}, "finished"),
        ({"driver": {**HERE, "ended": NOW}, "failure": {"message": "the loss became nan"}}, "failed"),
        ({"driver": own_lock()}, "running"),
        ({"driver": own_lock(), "failure": {"message": "a worker failed, the process shuts down"}}, "running"),
        # The pid is this process's, but the lock holder had it before this process started: another process.
        ({"driver": {**own_lock(), "started": psutil.Process().create_time() - 100}}, "interrupted"),
        ({"driver": {**HERE, "host": "elsewhere", "ended": None}, "progress": {"phase": "training"}}, "running"),
        ({"driver": {**HERE, "host": "elsewhere", "ended": None}, "result": RESULT}, "running"),
    ],
)
def test_state_is_decided_from_files_and_the_lock_holder(tmp_path: Path, records: dict[str, Any], state: str) -> None:
    if records["driver"]["host"] == "elsewhere":  # judged by its last heartbeat, and NOW may be long ago
        records = records | {"driver": records["driver"] | {"seen": time.time() - 60}}
    write_run(tmp_path, "a", **records)
    assert read_run(str(tmp_path), "a").state == state


def test_a_lock_holder_elsewhere_without_heartbeats_is_interrupted(tmp_path: Path) -> None:
    now = time.time()
    long_ago = {**HERE, "host": "elsewhere", "started": now - 7200, "ended": None}
    write_run(tmp_path, "b", driver=long_ago | {"seen": now - 60}, progress={"phase": "training", "time": now - 3600})
    write_run(tmp_path, "c", driver=long_ago | {"seen": now - 3600}, progress={"phase": "training", "time": now - 60})
    assert {read_run(str(tmp_path), name).state for name in "bc"} == {"running"}  # by its lock holder, by its workers
    write_run(tmp_path, "a", driver=long_ago | {"seen": now - 4000}, progress={"phase": "training", "time": now - 3600})
    run = read_run(str(tmp_path), "a")
    assert (run.state, run.started, run.ended) == ("interrupted", now - 7200, now - 3600)
    assert corral_runs("stop", "a", "--storage", str(tmp_path)) == "run a has ended already: interrupted\n"


def test_runs_on_an_object_store_are_read_the_same() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/runs-of-this-test/b/config.json", json.dumps(CONFIG).encode())
    fs.pipe("/runs-of-this-test/b/result.json", json.dumps(RESULT).encode())
    fs.pipe("/runs-of-this-test/b/drivers/0001.json", json.dumps({**HERE, "ended": NOW}).encode())
    fs.pipe("/runs-of-this-test/b/metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    fs.pipe("/runs-of-this-test/no-run/notes.txt", b"")
    (run,) = read_runs("memory://runs-of-this-test")
    assert (run.name, run.state, run.num_steps, run.loss) == ("b", "finished", 4, 1.5)
    assert read_metrics(run.run_dir).records == [{"step": 1, "loss": 2.0}]
    assert read_runs("memory://no-runs-there") == []


def test_list_show_and_logs(tmp_path: Path) -> None:
    progress = {"phase": "training", "step": 2, "num_steps": 4, "loss": 2.5, "tokens_per_s": 100.0, "eta_s": 60.0}
    directory = write_run(tmp_path, "late", driver=own_lock(), progress=progress)
    steps = [{"step": n, "num_steps": 4, "time": NOW, "loss": 5.0 - n, "tokens_per_s": 99.6} for n in (1, 2)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    write_run(tmp_path, "early", driver={**HERE, "ended": NOW}, failure={"message": "the loss became nan"})
    where = ("--storage", str(tmp_path))
    assert [run["name"] for run in json.loads(corral_runs("list", *where, "--json"))] == ["early", "late"]
    assert json.loads(corral_runs("show", "early", *where, "--json"))["driver"] == {**HERE, "ended": NOW}
    table = corral_runs("list", *where)
    assert "failed" in table
    assert "2/4" in table
    output = corral_runs("show", "late", *where)
    assert "late: running, training" in output
    assert "1:00 left" in output
    assert "4.000 █▁ 3.000" in output
    assert "registered     not yet" in output
    assert "because        the loss became nan" in corral_runs("show", "early", *where)
    assert "resume it      corral train CONFIG run_name=early" in corral_runs("show", "early", *where)
    logs = corral_runs("logs", "late", *where).splitlines()
    assert [line.split("  ", 1)[1] for line in logs[:2]] == [
        "step 1/4  loss 4.000  100 tokens/s",
        "step 2/4  loss 3.000  100 tokens/s",
    ]
    assert corral_runs("logs", "early", *where) == "failed: the loss became nan\n"


def test_an_unknown_run_is_named_with_the_nearest(tmp_path: Path) -> None:
    write_run(tmp_path, "support-1")
    for name in ("suport-1", "../support-1", ".", ""):
        with pytest.raises(RunError, match=r"no run .*(did you mean 'support-1'|corral runs list)"):
            read_run(str(tmp_path), name)


def test_stop_touches_no_process_but_the_lock_holder(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        reused = {**HERE, "pid": other.pid, "started": NOW - 1000, "ended": None}  # the lock holder had this pid
        write_run(tmp_path, "gone", driver=reused)
        write_run(tmp_path, "elsewhere", driver={**reused, "host": "elsewhere", "seen": time.time()})
        write_run(tmp_path, "over", driver={**HERE, "pid": other.pid, "started": time.time() + 5, "ended": NOW})
        for name, reason in (("gone", "interrupted"), ("elsewhere", "on elsewhere"), ("over", "stopped")):
            with pytest.raises(RunError, match=reason):
                stop_run(read_run(str(tmp_path), name))
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0]) == "▁"
    assert sparkline([3.0, float("nan"), 2.0, 1.0]) == "█▅▁"
    assert len(sparkline([float(n) for n in range(1000)])) == 60


@pytest.mark.slow
@pytest.mark.promise("D14")
def test_stopped_and_killed_runs_leave_no_process_and_no_adapter_and_their_name_resumes_them(
    tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": f"It is {n}."}) + "\n" for n in range(40)))
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "base_model": str(tiny_base.path),
                "adapter": "stopped-often",
                "run_name": "often",
                "data": {"path": str(rows)},
                "per_device_train_batch_size": 4,
                "max_steps": 300,
                "learning_rate": 5e-3,
                "max_length": 64,
                "save_steps": 20,
                "sample_prompts": 0,
                "use_gpu": False,
                "resources_per_worker": {"CPU": 1},
                "storage_path": str(tmp_path / "runs"),
            }
        )
    )

    processes: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "training", "--config", str(tmp_path / "run.yaml")]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    def step() -> int:
        try:
            return read_metrics(read_run(str(tmp_path / "runs"), "often").run_dir).steps[-1]
        except (RunError, IndexError):
            return 0

    def state() -> str:
        return read_run(str(tmp_path / "runs"), "often").state

    holder = start()
    wait_until(lambda: step() >= 25, holder)
    assert state() == "running"
    with suspended(descendants(holder.pid, "RayTrainWorker")):
        second = start()
        _, errors = second.communicate(timeout=300)
        assert second.returncode == 1
        assert errors.splitlines()[-1].startswith(f"error: run 'often' is locked by process {holder.pid} on ")
        assert holder.poll() is None
        started = psutil.Process(holder.pid).children(recursive=True)
        assert len(started) > 3
    # From another process: waiting for the lock holder here would take its exit code.
    stop = [sys.executable, "-m", "clients.cli", "runs", "stop", "often", "--storage", str(tmp_path / "runs")]
    stopped = subprocess.run(stop, capture_output=True, text=True, check=False)
    assert "run_name=often resumes it" in stopped.stdout, stopped.stderr
    assert holder.wait(timeout=300) == 1
    assert holder.stderr.read().splitlines()[-1] == (
        "error: run 'often' was stopped: run_name=often resumes it from its last checkpoint"
    )
    assert psutil.wait_procs(started, timeout=300)[1] == []
    assert state() == "stopped"

    stopped_at = step()
    holder = start()
    wait_until(lambda: step() > stopped_at + 6, holder)
    started = psutil.Process(holder.pid).children(recursive=True)
    workers = [process for process in started if not is_agent(process)]
    holder.kill()
    holder.wait()
    assert psutil.wait_procs(workers, timeout=300)[1] == []
    assert state() == "interrupted"
    assert "stopped-often" not in AdapterRegistry().names()

    holder = start()
    output, errors = holder.communicate(timeout=300)
    assert holder.returncode == 0, errors
    assert "tiny-llama:stopped-often@1 is registered" in output
    assert state() == "finished"
    assert read_metrics(read_run(str(tmp_path / "runs"), "often").run_dir).steps == list(range(1, 301))
    # Ray's idle agents try for a minute to tell a dead GCS that its raylet died.
    assert psutil.wait_procs(started, timeout=300)[1] == []
    output = corral_runs("show", "often", "--storage", str(tmp_path / "runs"))
    assert "registered     tiny-llama:stopped-often@1" in output


def is_agent(process: psutil.Process) -> bool:
    try:
        return "Agent" in " ".join(process.cmdline())
    except psutil.Error:
        return False
