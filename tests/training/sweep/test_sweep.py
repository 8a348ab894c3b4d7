"""Sweeps: the plan and what is refused of it, and a real one on Ray Tune, of which only the best is registered."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from clients.cli.main import app
from tests.conftest import own_ray
from training.__main__ import main
from training.base_models.resolve import BaseCheckpoint
from training.errors import ConfigError, TrainingError
from training.registry.registry import AdapterRegistry
from training.sweep.config import SweepConfig, load_sweep, plan
from training.sweep.result import SweepResult
from training.sweep.run import run_sweep

PROJECT = Path(__file__).parents[3]
SWEEPS = sorted((PROJECT / "configs" / "sweep").rglob("*.yaml"))


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray of this module's own."""
    with own_ray():
        yield


@pytest.fixture
def content(tiny_base: BaseCheckpoint, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"Where is number {n}?", "completion": f"Number {n} is by post {n % 5}."} for n in range(30)]
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base_model": str(tiny_base.path),
        "adapter": "searched",
        "data": {"path": str(dataset), "held_out": 0.2},
        "lora": {"r": 4, "lora_dropout": 0.0},
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "max_length": 128,
        "sample_prompts": 0,
        "use_gpu": False,
        "resources_per_worker": {"CPU": 1},
        "storage_path": str(tmp_path / "runs"),
        "search": {"learning_rate": {"grid": [1e-5, 1e-2]}, "lora.r": {"choice": [4]}},
        "sweep": {"max_concurrent_trials": 2},
    }


def load(content: dict[str, Any], tmp_path: Path, *overrides: str) -> SweepConfig:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_sweep(path, overrides)


def trial_path(result: SweepResult, number: int) -> Path:
    return Path(result.address) / "trials" / f"{number:03d}"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_sweep_recipe_is_valid_and_opens_with_its_launch_command(path: Path) -> None:
    config = load_sweep(path)
    assert len(plan(config)) > 1
    assert path.read_text().splitlines()[0] == f"# corral sweep {path.relative_to(PROJECT)}"
    assert all((PROJECT / data).is_file() for data in config.data.paths)


def test_plan_is_every_corner_of_the_grids_times_the_samples(content: dict[str, Any], tmp_path: Path) -> None:
    content["search"] = {
        "lora.r": {"grid": [4, 8]},
        "lora.use_rslora": {"grid": [True, False]},
        "learning_rate": {"loguniform": [1e-4, 1e-2]},
        "lora.lora_dropout": {"uniform": [0.1, 0.2]},
        "lora.lora_alpha": {"randint": [8, 10]},
    }
    config = load(content, tmp_path, "sweep.num_samples=3")
    trials = plan(config)
    assert [trial.number for trial in trials] == list(range(12))
    corners = [(trial.config.lora.r, trial.config.lora.use_rslora) for trial in trials]
    assert sorted(corners) == sorted([(4, True), (4, False), (8, True), (8, False)] * 3)
    assert all(1e-4 <= trial.config.learning_rate <= 1e-2 for trial in trials)
    assert all(0.1 <= trial.config.lora.lora_dropout <= 0.2 for trial in trials)
    assert {trial.config.lora.lora_alpha for trial in trials} == {8, 9}
    assert len({trial.config.learning_rate for trial in trials}) == 12
    assert plan(config) == trials
    assert plan(load(content, tmp_path, "sweep.num_samples=4"))[:12] == trials  # more samples only add


def test_point_that_is_drawn_twice_is_run_once(content: dict[str, Any], tmp_path: Path) -> None:
    assert len(plan(load(content, tmp_path, "sweep.num_samples=5"))) == 2


@pytest.mark.promise("B11")
@pytest.mark.parametrize(
    ("search", "overrides", "message"),
    [
        (
            {"learning_rat": {"grid": [1]}},
            [],
            "search: unknown key 'learning_rat' (value 1): did you mean 'learning_rate'",
        ),
        ({"lora.r": {"grid": [4, 0]}}, [], "search: key 'lora.r' has value 0: "),
        ({"learning_rate": {"uniform": [0.1, 2]}}, [], "search: key 'learning_rate' has value 2.0: "),
        ({"lora.r": {"randint": [0, 4]}}, [], "search: key 'lora.r' has value 0: "),
        ({"lora.r": {"gird": [4]}}, [], "key 'search"),
        (
            {"lora.r": {"grid": [4], "choice": [4]}},
            [],
            "give exactly one of grid, choice, uniform, loguniform, randint",
        ),
        ({"lora.r": {"uniform": [4, 1]}}, [], "the lower bound must be below the upper bound"),
        ({"learning_rate": {"loguniform": [0, 1]}}, [], "the bounds of loguniform must be above 0"),
        ({}, [], "name at least one key to search"),
        ({"seed": {"grid": [1, 2]}}, [], "search.seed: trials that differ in seed cannot be compared"),
        ({"data.path": {"grid": ["a"]}}, [], "search.data.path: trials that differ in data cannot be compared"),
        (
            {"preference.beta": {"grid": [0.1]}},
            ["method=dpo"],
            "search.preference.beta redefines eval_loss",
        ),
        ({"lora.r": {"grid": [4]}}, ["num_workers=2"], "num_workers is 2: a trial runs on one worker"),
        ({"lora.r": {"grid": [4]}}, ["data.held_out=0"], "data.held_out is 0, but eval_loss needs held-out rows"),
        ({"lora.r": {"grid": [4]}}, ["sweep.num_sample=2"], "unknown key 'sweep.num_sample' (value 2): did you mean"),
    ],
)
def test_sweep_that_cannot_be_is_refused_before_anything_runs(
    content: dict[str, Any], tmp_path: Path, search: dict[str, Any], overrides: list[str], message: str
) -> None:
    content["search"] = search
    with pytest.raises(ConfigError) as exc_info:
        load(content, tmp_path, *overrides)
    assert message in str(exc_info.value)
    assert "\n" not in str(exc_info.value)


def test_a_yaml_says_itself_whether_it_is_a_sweep(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [{"number": n, "values": {"learning_rate": rate, "lora.r": 4}} for n, rate in enumerate((1e-5, 1e-2))]
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump(content))
    assert main(["--config", str(sweep), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == trials
    result = CliRunner().invoke(app, ["train", str(sweep)])
    assert (result.exit_code, f"run it with 'corral sweep {sweep}'" in result.stderr) == (2, True)
    for arguments, words in ((["--no-wait"], "are for a job: add --submit"), (["--submit", "x", "--json"], "--json")):
        result = CliRunner().invoke(app, ["sweep", str(sweep), *arguments])
        assert (result.exit_code, words in result.stderr) == (2, True)


@pytest.mark.promise("B11")
def test_more_than_the_cluster_has_is_refused_at_once(
    ray_cluster: None, content: dict[str, Any], tmp_path: Path
) -> None:
    content["resources_per_worker"] = {"CPU": 9}
    with pytest.raises(TrainingError, match="num_workers is 1 with 9 CPU each, but the Ray cluster has 2"):
        run_sweep(load(content, tmp_path))


@pytest.mark.slow
def test_sweep_outlives_a_trial_that_diverges_registers_only_the_best_and_is_taken_up_again(
    ray_cluster: None, content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content["search"] = {"lora.lora_alpha": {"grid": [8, 10**38]}, "learning_rate": {"grid": [1e-5, 1e-2]}}
    content["run_name"] = "search"
    result = run_sweep(load(content, tmp_path))

    assert capsys.readouterr().out == ""
    assert [outcome.status for outcome in result.outcomes] == ["finished", "finished", "failed", "failed"]
    best, second = result.outcomes[:2]
    assert best.values == {"lora.lora_alpha": 8, "learning_rate": 1e-2}
    assert best.metrics["eval_loss"] < second.metrics["eval_loss"]
    assert best.num_steps == 6
    assert "training stopped at step 1: the" in str(result.outcomes[2].reason)
    manifest = AdapterRegistry().resolve("searched")
    assert result.manifest == manifest
    assert manifest.run_name == f"search/trials/{best.number:03d}"
    assert manifest.metrics["eval_loss"] == best.metrics["eval_loss"]
    assert manifest.config is not None
    assert manifest.config["learning_rate"] == 1e-2
    searched = ["learning_rate", "lora.lora_alpha"]
    assert manifest.config["sweep"] == {"name": "search", "num_trials": 4, "searched": searched}
    assert AdapterRegistry().versions("searched") == [1]

    recorded = json.loads((Path(result.address) / "sweep.json").read_text())
    assert (recorded["best"], recorded["registered"]) == (best.number, manifest.model_id)
    assert "| 1e-05 |" in (Path(result.address) / "sweep.md").read_text()
    assert not (Path(result.address) / "tune").exists()
    for outcome in (best, second):
        lines = (trial_path(result, outcome.number) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]

    # as if it had ended before the second best was trained: that one only is run again
    trial_dir = trial_path(result, second.number)
    (trial_dir / "result.json").unlink()
    metrics_path = trial_path(result, best.number) / "metrics.jsonl"
    before = metrics_path.stat().st_mtime_ns
    resumed = run_sweep(load(content, tmp_path))
    assert [outcome.values for outcome in resumed.outcomes] == [outcome.values for outcome in result.outcomes]
    assert resumed.outcomes[1].metrics["eval_loss"] == pytest.approx(second.metrics["eval_loss"], abs=1e-4)
    assert metrics_path.stat().st_mtime_ns == before

    with pytest.raises(ConfigError, match=r"run 'search' was started with search="):
        run_sweep(load(content | {"search": {"lora.r": {"grid": [4]}}}, tmp_path))


@pytest.mark.slow
def test_asha_stops_a_trial_that_lags(ray_cluster: None, content: dict[str, Any], tmp_path: Path) -> None:
    content["search"] = {"learning_rate": {"grid": [2e-2, 1e-7]}}
    content["max_steps"] = 40
    content["sweep"] = {"max_concurrent_trials": 1, "scheduler": "asha", "grace_period": 10, "reduction_factor": 2}
    result = run_sweep(load(content, tmp_path))
    assert [outcome.status for outcome in result.outcomes] == ["finished", "stopped"]
    assert 10 <= result.outcomes[1].num_steps < 40
    assert result.best
    assert result.best.values == {"learning_rate": 2e-2}


def test_trials_give_back_what_they_held(ray_cluster: None) -> None:
    import ray

    deadline = time.monotonic() + 300
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2
