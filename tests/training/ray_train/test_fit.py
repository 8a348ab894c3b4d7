"""Runs on real Ray: one worker, two workers that share the base or do not, a worker killed, a run that diverged."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import own_ray, train_workers
from training.__main__ import run_training
from training.base_models.resolve import BaseCheckpoint
from training.config.data_config import DataConfig
from training.config.train_config import GateConfig, TrainConfig
from training.errors import AdapterRefused, ConfigError, TrainingError
from training.ray_train.fit import fit
from training.ray_train.worker import _is_complete
from training.runs.register import register
from training.runs.result import RunResult
from training.runs.resume import fresh_run_name, open_run
from training.runs.run_dir import RunDir

WORDS = ["gate", "mule", "creek", "bell", "saddle", "barn", "truck", "stove"]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray of this module's own."""
    with own_ray():
        yield


def tiny_run(base: BaseCheckpoint, folder: Path) -> TrainConfig:
    """Twelve steps on the tiny model, with a checkpoint every fourth; rows and runs are in `folder`."""
    rows = [
        {"prompt": f"Where is the {word} number {n}?", "completion": f"The {word} is by post {n}."}
        for word in WORDS
        for n in range(5)
    ]
    dataset = folder / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig.model_validate(
        {
            "base_model": str(base.path),
            "adapter": "tiny",
            "data": {"path": str(dataset), "held_out": 0.2},
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "per_device_train_batch_size": 4,
            "max_steps": 12,
            "learning_rate": 5e-3,
            "max_length": 128,
            "save_steps": 4,
            "sample_prompts": 1,
            "use_gpu": False,
            "resources_per_worker": {"CPU": 1},
            "storage_path": str(folder / "runs"),
        }
    )


@pytest.fixture
def config(tiny_base: BaseCheckpoint, tmp_path: Path) -> TrainConfig:
    return tiny_run(tiny_base, tmp_path)


def steps_of(run_dir: RunDir) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir.read_text("metrics.jsonl") or "").splitlines()]


def when_step(run_dir: RunDir, step: int, act: Callable[[list[psutil.Process]], None]) -> threading.Event:
    """Give the run's workers to `act` as soon as it has logged `step`; the event says that it was done."""
    done = threading.Event()

    def watch() -> None:
        while not (workers := train_workers()):
            time.sleep(0.05)
        while (steps_of(run_dir) or [0])[-1] < step:
            time.sleep(0.002)
        act(workers)
        done.set()

    threading.Thread(target=watch, daemon=True).start()
    return done


@pytest.fixture(scope="module")
def two_workers(ray_cluster: None, tiny_base: BaseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run on two workers, its data named by a relative path."""
    folder = tmp_path_factory.mktemp("two")
    config = tiny_run(tiny_base, folder)
    data = DataConfig.model_validate({"path": "rows.jsonl", "held_out": 0.2})
    with contextlib.chdir(folder):
        return fit(config.model_copy(update={"num_workers": 2, "data": data}))


@pytest.mark.slow
def test_two_gloo_workers_train_one_adapter_from_a_relative_path(two_workers: RunResult) -> None:
    assert steps_of(two_workers.run_dir) == list(range(1, 13))
    assert (two_workers.adapter_dir / "adapter_model.safetensors").is_file()
    assert two_workers.metrics["eval_loss"] < two_workers.metrics["base_eval_loss"]
    assert two_workers.metrics["eval_tokens"] > 50
    assert len(two_workers.environment.devices) == 2


@pytest.mark.slow
@pytest.mark.promise("D13")
def test_sharded_base_one_of_two_workers_killed_gives_the_adapter_of_whole_bases_to_the_bit(
    two_workers: RunResult, config: TrainConfig
) -> None:
    sharded = config.model_copy(update={"num_workers": 2, "fsdp": True, "run_name": "sharded", "max_failures": 1})
    killed = when_step(RunDir(str(config.storage_path), "sharded"), 6, lambda workers: workers[0].kill())
    result = fit(sharded)
    assert killed.is_set()
    assert steps_of(result.run_dir) == list(range(1, 13))
    assert {**result.metrics, "train_s": 0} == {**two_workers.metrics, "train_s": 0}
    assert result.adapter_sha256 == two_workers.adapter_sha256
    assert result.samples == two_workers.samples
    manifest = register(sharded, result)
    assert manifest.config["fsdp"] is True
    assert manifest.run_name == "sharded"


@pytest.mark.promise("D13", "D14")
def test_killed_worker_goes_on_from_the_last_whole_checkpoint_to_the_loss_of_the_uninterrupted_run(
    ray_cluster: None, config: TrainConfig
) -> None:
    whole = fit(config.model_copy(update={"run_name": "whole"}))
    run_dir = RunDir(str(config.storage_path), "killed")

    def kill_and_cut_the_newest_checkpoint(workers: list[psutil.Process]) -> None:
        for worker in workers:
            worker.kill()
        newest = max(path for path in Path(str(run_dir)).glob("checkpoint_*") if path.is_dir())
        weights = newest / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])

    killed = when_step(run_dir, 9, kill_and_cut_the_newest_checkpoint)
    resumed = fit(config.model_copy(update={"run_name": "killed", "max_failures": 1}))
    assert killed.is_set()
    assert_same_run(resumed, whole)


def assert_same_run(resumed: RunResult, whole: RunResult) -> None:
    assert resumed.metrics["num_steps"] == 12
    assert steps_of(resumed.run_dir) == list(range(1, 13))
    assert resumed.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], abs=1e-3)
    assert resumed.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.promise("D14")
def test_finished_run_is_neither_trained_nor_registered_twice(
    ray_cluster: None, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))
    config = config.model_copy(update={"run_name": "once", "max_steps": 4, "gate": GateConfig(min_improvement=99)})
    with pytest.raises(AdapterRefused, match="is not registered"):
        run_training(config)
    trained = RunDir(str(config.storage_path), "once").read_text("result.json")
    registered = run_training(config, force=True)  # what the gate refused, without training again
    again = run_training(config, force=True)
    assert (registered.version, again) == (1, registered)
    assert RunDir(str(config.storage_path), "once").read_text("result.json") == trained
    assert RunDir(str(config.storage_path), "once").files("drivers") == [
        "drivers/0001.json"
    ]  # whose times are reported
    assert "nothing is trained again" in capsys.readouterr().err


@pytest.mark.promise("D14")
def test_same_name_with_another_configuration_is_refused(ray_cluster: None, config: TrainConfig) -> None:
    named = config.model_copy(update={"run_name": "again"})
    open_run(named, RunDir(str(config.storage_path), "again"))
    with pytest.raises(ConfigError, match=r"learning_rate=0\.005, now learning_rate is 0\.1.*another run_name"):
        fit(named.model_copy(update={"learning_rate": 0.1}))


@pytest.mark.promise("D14")
def test_same_name_with_other_data_is_refused(ray_cluster: None, config: TrainConfig) -> None:
    run_dir = RunDir(str(config.storage_path), "again")
    run_dir.write_json("data.json", {"sha256": "0" * 64})
    with pytest.raises(ConfigError, match=r"run 'again' was started on data with sha256 000000000000, data\.path now"):
        fit(config.model_copy(update={"run_name": "again"}))


@pytest.mark.slow
@pytest.mark.promise("D15")
def test_diverged_run_stops_with_step_and_reason_and_is_not_retried(ray_cluster: None, config: TrainConfig) -> None:
    lora = config.lora.model_copy(update={"lora_alpha": 10**38})
    wild = config.model_copy(update={"lora": lora, "max_failures": 1})
    with pytest.raises(TrainingError, match=r"training stopped at step \d+: the (loss|gradient norm) .*learning_rate"):
        fit(wild)
    run_dir = next(Path(str(config.storage_path)).iterdir())
    assert not (run_dir / "adapter").exists()
    assert not (run_dir / "result.json").exists()
    assert "**Failed**: training stopped at step" in (run_dir / "report.md").read_text()


@pytest.mark.promise("B11")
def test_more_workers_than_the_cluster_has_cpus(ray_cluster: None, config: TrainConfig) -> None:
    with pytest.raises(TrainingError, match=r"num_workers is 9 .* the Ray cluster has 2 .* set num_workers to 2"):
        fit(config.model_copy(update={"num_workers": 9}))


@pytest.mark.promise("D14")
def test_truncated_checkpoint_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"12345")
    (tmp_path / "contents.json").write_text(json.dumps({"step": 4, "sizes": {"weights": 5}}))
    assert _is_complete(tmp_path)
    (tmp_path / "weights").write_bytes(b"123")
    assert not _is_complete(tmp_path)
    (tmp_path / "contents.json").write_text('{"step": 4, "si')
    assert not _is_complete(tmp_path)


def test_run_names_differ(config: TrainConfig) -> None:
    assert len({fresh_run_name(config) for _ in range(20)}) == 20
