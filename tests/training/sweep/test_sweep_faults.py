"""A sweep survives SIGTERM, kill -9 and a second process, in an object store. Real processes, real Ray."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import psutil
import pytest
from typer.testing import CliRunner

from clients.cli.main import app
from tests.conftest import descendants, suspended, wait_until
from training.base_models.resolve import BaseCheckpoint
from training.registry.registry import AdapterRegistry
from training.runs.run_dir import RunDir
from training.runs.status import read_run

_STEPS = 150
_TRIAL = "ray::ImplicitFunc"  # what Ray calls the process of a trial


@pytest.mark.slow
@pytest.mark.promise("D14")
def test_a_sweep_in_an_object_store_is_stopped_killed_and_taken_up_again(
    tiny_base: BaseCheckpoint, tmp_path: Path, s3: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": f"It is {n}."}) + "\n" for n in range(40)))
    config = {
        "base_model": str(tiny_base.path),
        "adapter": "searched-often",
        "run_name": "stored",
        "data": {"path": str(rows), "held_out": 0.2},
        "per_device_train_batch_size": 4,
        "max_steps": _STEPS,
        "max_length": 64,
        "sample_prompts": 0,
        "use_gpu": False,
        "resources_per_worker": {"CPU": 1},
        "storage_path": s3,
        "search": {"learning_rate": {"grid": [1e-5, 1e-3, 1e-2]}},
        "sweep": {"max_concurrent_trials": 1},
    }
    (tmp_path / "search.yaml").write_text(json.dumps(config))
    first, second = (RunDir(s3, f"stored/trials/{number}") for number in ("000", "001"))

    process = start(tmp_path)
    wait_until(lambda: bool(first.read_json("result.json")), process)
    wait_until(lambda: bool(second.read_json("progress.json")), process)
    assert read_run(s3, "stored").state == "running"
    with suspended(descendants(process.pid, _TRIAL)):
        other = start(tmp_path)
        _, errors = other.communicate(timeout=300)
        assert other.returncode == 1
        assert errors.splitlines()[-1].startswith(f"error: run 'stored' is locked by process {process.pid} on ")
        workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: run 'stored' was stopped: run_name=stored resumes it")
    assert psutil.wait_procs(workers, timeout=300)[1] == []
    assert read_run(s3, "stored").state == "stopped"
    assert not own_state_of_tune(s3)
    result = first.read_json("result.json")

    process, started_at = start(tmp_path), time.time()
    wait_until(lambda: (second.read_json("progress.json") or {"time": 0.0})["time"] > started_at, process)
    workers = descendants(process.pid, _TRIAL)
    assert workers
    process.kill()
    process.communicate()
    assert psutil.wait_procs(workers, timeout=300)[1] == []
    assert read_run(s3, "stored").state == "interrupted"
    assert "searched-often" not in AdapterRegistry().names()

    process = start(tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "registered tiny-llama:searched-often@1 from trial 2" in output
    assert first.read_json("result.json") == result  # with its times: it was not trained again
    for number in range(3):
        trial = read_run(s3, f"stored/trials/{number:03d}")
        assert (trial.state, trial.num_steps) == ("finished", _STEPS)
    assert not own_state_of_tune(s3)
    assert not [file for file in files_of(s3) if "scratch" in file]
    assert {"sweep.json", "sweep.md", "drivers/0003.json"} <= files_of(s3)
    output = CliRunner().invoke(app, ["runs", "show", "stored", "--storage", s3]).stdout
    assert "stored: finished" in output
    assert "registered     tiny-llama:searched-often@1" in output


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "training", "--config", str(folder / "search.yaml")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files_of(s3: str) -> set[str]:
    """Names of all files of the sweep."""
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    return {path.split("/stored/", 1)[1] for path in store.find(f"{s3}/stored")}


def own_state_of_tune(s3: str) -> set[str]:
    return {file for file in files_of(s3) if file.startswith("tune/")}
