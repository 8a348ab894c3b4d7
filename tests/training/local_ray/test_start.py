"""A local Ray during a real run: its actors, and how its threads are scheduled."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from tests.training.ray_train.test_fit import tiny_run
from training.base_models.resolve import BaseCheckpoint
from training.errors import CorralError
from training.local_ray.start import _STARTUP_TIMEOUT, init_ray
from training.runs.run_dir import RunDir


def policies(process: psutil.Process) -> list[int]:
    return [os.sched_getscheduler(thread.id) for thread in process.threads()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the policies are Linux's")
def test_the_threads_of_a_step_come_before_ray(tiny_base: BaseCheckpoint, tmp_path: Path) -> None:
    config = tiny_run(tiny_base, tmp_path).model_dump(mode="json")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config | {"run_name": "beside", "max_steps": 100_000, "save_steps": 50_000}))
    run_dir = RunDir(tmp_path / "runs", "beside")
    with subprocess.Popen([sys.executable, "-m", "training", "--config", str(recipe)], stderr=subprocess.PIPE) as run:
        try:
            while not run_dir.read_text("metrics.jsonl"):
                assert run.poll() is None, run.stderr and run.stderr.read()
                time.sleep(0.1)
            others = psutil.Process(run.pid).children(recursive=True)
            commands = {process: process.name() + " " + " ".join(process.cmdline()) for process in others}
            actors = {name.split("ray::")[1].split(".")[0].strip() for name in commands.values() if "ray::" in name}
            assert {"TrainController", "RayTrainWorker"} <= actors
            assert not {"DatasetManager", "PlacementGroupCleaner"} & actors
            [worker] = [process for process, name in commands.items() if "RayTrainWorker" in name]
            assert os.SCHED_OTHER in policies(worker)  # the thread of the steps
            assert os.sched_getscheduler(worker.pid) == os.SCHED_BATCH  # Ray's own
            for process, name in commands.items():
                if process != worker:
                    assert {*policies(process)} == {os.SCHED_BATCH}, name
            assert os.sched_getscheduler(run.pid) == os.SCHED_OTHER
        finally:
            run.terminate()
            run.communicate(timeout=300)
    assert not [process for process in others if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_a_ray_that_takes_longer_than_its_limit_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of 30 s is fixed in Ray and cannot be reached here in a test's time, so its error is imitated."""
    starts: list[dict[str, Any]] = []
    num_timeouts = 2

    def init(**options: Any) -> None:
        starts.append(options)
        if len(starts) <= num_timeouts:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    init_ray(num_cpus=1)
    assert starts == [{"address": "local", "include_dashboard": False, "num_cpus": 1}] * 3
    starts.clear()
    num_timeouts = 3
    with pytest.raises(CorralError, match="did not start on this machine, tried 3 times for 30 s"):
        init_ray()
    monkeypatch.setattr(ray, "init", lambda **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        init_ray()


def test_the_error_is_ray_s_own_text() -> None:
    from ray._private import node

    assert _STARTUP_TIMEOUT in Path(str(node.__file__)).read_text(encoding="utf-8")
