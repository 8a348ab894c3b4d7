"""`report_to: [mlflow, wandb]`, by their own packages and without their servers."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from training.ray_train.trackers import TrackedRun, Trackers, open_trackers


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    event_dir = tmp_path / "runs" / "nightly" / "tensorboard"
    event_dir.mkdir(parents=True)
    return TrackedRun("nightly", "ranch", "tiny", {"lora": {"r": 8}}, 1, event_dir)


def logged(trackers: Trackers, steps: range) -> None:
    for step in steps:
        trackers.log(step, {"loss": 4.0 - step, "rewards/margins": 0.5})
    trackers.close()
    assert trackers.failed == {}


def test_mlflow_has_configuration_and_every_step_once_also_after_a_resume(run: TrackedRun) -> None:
    logged(open_trackers(["mlflow"], run), range(1, 4))
    logged(open_trackers(["mlflow"], run), range(3, 6))  # from the checkpoint of step 2
    client = MlflowClient(f"sqlite:///{run.tensorboard_dir.parent.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("corral")
    assert experiment is not None
    (logged_run,) = client.search_runs([experiment.experiment_id])
    assert logged_run.data.params == {"lora.r": "8"}
    assert logged_run.data.tags["corral.run_name"] == "nightly"
    assert logged_run.info.status == "FINISHED"
    history = client.get_metric_history(logged_run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 4.0 - step) for step in range(1, 6)]
    assert len(client.get_metric_history(logged_run.info.run_id, "rewards/margins")) == 5


def test_wandb_keeps_an_offline_run_with_every_step(run: TrackedRun) -> None:
    logged(open_trackers(["wandb"], run), range(1, 4))
    (file,) = run.tensorboard_dir.parent.glob("wandb/offline-run-*-nightly/run-nightly.wandb")
    content = file.read_bytes()  # protocol buffers, which store text as it is
    assert b"lora" in content
    assert content.count(b"rewards/margins") == 2 * 3  # of each step in the history and in the summary
