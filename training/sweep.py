"""A sweep on Ray Tune: every trial of a `SweepConfig` is trained, and only the best one's adapter is registered.

`corral sweep` comes here. A trial is one Tune actor that calls `training.sft.train` itself, on one worker. Ray Train
inside Tune, the other way, starts three actors for a trial, of which Tune sees only the small one that waits: it could
hold back by a fixed number of trials, but not by the CPUs and GPUs that they take.

SWEEP_DIR/ has config.json, sweep.json, sweep.md, and trials/000/ as a run's directory: config.json, metrics.jsonl, and
at the end adapter/ and result.json, or failure.json. A sweep that is taken up again runs the trials that have neither.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base_models import resolve_base_model
from training.config import TrainConfig, check_resources, check_this_machine, resolved, wants_gpu
from training.errors import CorralError
from training.fit import (
    FitResult,
    _equal_share,
    _keep_quiet,
    _one_line,
    _open_run,
    _ray,
    _ray_is_running_here,
    _RayRun,
    _with_absolute_paths,
    _write_json,
    fresh_run_name,
)
from training.inputs import read_inputs
from training.parent import PARENT_DIR, copy_parent, resolve_parent
from training.progress import Progress, show_progress, write_progress
from training.registry import AdapterManifest
from training.sweep_config import SweepConfig, Trial, plan
from training.sweep_result import SweepResult, as_json, is_done, ranked, read_outcome, report, trial_dir

if TYPE_CHECKING:
    from ray.tune import ResultGrid

_SMOOTHING = 0.9  # of the training loss that asha compares: batches differ


def run_sweep(config: SweepConfig, *, force: bool = False, debug: bool = False) -> SweepResult:
    """Run every trial that has not been run, rank them, and register the best one's adapter.

    Raises:
        CorralError: config, data or machine do not fit. A trial that fails, or a best adapter that the gate refuses, is
            in the result instead.
    """
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not on_cluster and not _ray_is_running_here():
        check_this_machine(config)
    inputs = read_inputs(config)
    base = resolve_base_model(config.base_model, config.base_revision)
    checked = [(trial, *resolve_parent(trial.config, base)) for trial in plan(config)]
    parent = checked[0][2]
    trials = [replace(trial, config=_with_absolute_paths(trial_config)) for trial, trial_config, _ in checked]
    name = config.run_name or f"sweep-{fresh_run_name(config.adapter)}"
    run_dir = _open_run(config, name)
    if parent:
        copy_parent(parent, run_dir)
    with _ray(on_cluster, debug), show_progress(run_dir, f"{name} on {inputs.base.name}"):
        write_progress(run_dir, Progress(f"starting {len(trials)} trials"))
        crashes = _run_trials(config, trials, run_dir, debug)
    outcomes = [read_outcome(trial, run_dir, crashes.get(trial.number)) for trial in trials]
    outcomes = ranked(outcomes, config.sweep.metric, config.sweep.mode)
    result = SweepResult(name, run_dir, config.sweep.metric, outcomes)
    result = _register_best(config, result, trials, parent, force=force)
    _write_json(run_dir / "sweep.json", as_json(result))
    (run_dir / "sweep.md").write_text(report(result))
    return result


def _run_trials(config: SweepConfig, trials: Sequence[Trial], run_dir: Path, debug: bool) -> dict[int, str]:
    """Run what is left of `trials`; returns the errors of those that crashed, by number."""
    import ray

    there = ray.cluster_resources()
    gpus = there.get("GPU", 0.0)
    check_resources(config, there.get("CPU", 0.0), gpus, "the Ray cluster")
    left = [trial for trial in trials if not is_done(trial_dir(run_dir, trial.number))]
    if not left:
        return {}
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a trial's files are our own
    from ray import tune

    most = min(config.sweep.max_concurrent_trials or len(left), len(left))
    use_gpu = wants_gpu(config, gpus)
    resources = config.resources_per_worker or _equal_share(min(most, int(gpus) or most), use_gpu)
    tasks = [_task(trial, run_dir, resources) for trial in left]
    tuner = tune.Tuner(
        tune.with_resources(_run_trial, resources),
        param_space={"task": tune.grid_search(tasks)},
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(config), max_concurrent_trials=most, reuse_actors=True, num_samples=1
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(run_dir),
            verbose=1 if debug else 0,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[_progress(run_dir, len(left))],
        ),
    )
    grid: ResultGrid = tuner.fit()
    shutil.rmtree(run_dir / "tune", ignore_errors=True)  # Tune's own state: what counts is in the trials' directories
    results: Iterable[Any] = [grid[index] for index in range(len(grid))]
    return {result.config["task"]["number"]: _one_line(result.error) for result in results if result.error}


def _scheduler(config: SweepConfig) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if config.sweep.scheduler == "fifo":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="step",
        metric="loss",
        mode="min",
        max_t=10**6,  # a trial ends by itself
        grace_period=config.sweep.grace_period,
        reduction_factor=config.sweep.reduction_factor,
    )


def _progress(run_dir: Path, num_trials: int) -> Any:
    from ray.tune import Callback

    class TrialCount(Callback):
        """Shows how many trials have ended, and where the latest one is."""

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any) -> None:
            ended = sum(t.is_finished() for t in trials)
            number = trial.config["task"]["number"]
            where = f"trial {number} at step {result.get('step')}, loss {result.get('loss', math.nan):.3f}"
            write_progress(run_dir, Progress(f"{ended} of {num_trials} trials ended; {where}"))

    return TrialCount()


def _task(trial: Trial, run_dir: Path, resources: Mapping[str, float]) -> dict[str, Any]:
    """What a trial's actor is told, as plain values."""
    directory = trial_dir(run_dir, trial.number)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", dict(resolved(trial.config)))
    return {
        "number": trial.number,
        "run_dir": str(directory),
        "parent_dir": str(run_dir / PARENT_DIR) if trial.config.continue_from else None,
        "cpus": resources.get("CPU", 1.0),
    }


def _run_trial(space: dict[str, Any]) -> None:
    """What Ray Tune calls in a trial's actor."""
    import ray
    import torch
    from ray import tune

    from training import sft

    task = space["task"]
    run_dir = Path(task["run_dir"])
    config = TrainConfig.model_validate_json((run_dir / "config.json").read_text())
    torch.set_num_threads(max(1, int(task["cpus"])))
    _keep_quiet()
    (run_dir / "metrics.jsonl").unlink(missing_ok=True)  # of an attempt that was cut short
    with tempfile.TemporaryDirectory(prefix="corral-") as scratch:
        try:
            result = sft.train(
                config,
                _TrialRun(config, run_dir, tune.report),
                adapter_dir=Path(scratch) / "adapter",
                scratch_dir=Path(scratch) / "checkpoints",
                device=torch.device("cuda" if ray.get_gpu_ids() else "cpu"),
                parent_dir=Path(task["parent_dir"]) if task["parent_dir"] else None,
            )
        except CorralError as error:  # it would only come again
            _write_json(run_dir / "failure.json", {"error": type(error).__name__, "message": str(error)})
            return
        shutil.copytree(Path(scratch) / "adapter", run_dir / "adapter", dirs_exist_ok=True)
    samples = [asdict(sample) for sample in result.samples]
    _write_json(
        run_dir / "result.json",
        {"metrics": result.metrics, "samples": samples, "compute_dtype": result.compute_dtype},
    )


class _TrialRun(_RayRun):
    """A `training.sft.Run` in a trial: logs as a run does, and tells Tune the loss; keeps no checkpoints.

    That is the held-out loss where there is one during training (`eval_steps`), else the smoothed training loss.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, report: Callable[[dict[str, float]], None]) -> None:
        super().__init__(0, run_dir)
        self._report = report
        self._by_eval_loss = config.eval_steps is not None
        self._loss: float | None = None

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        super().on_log(step, num_steps, metrics)
        if self._by_eval_loss:
            if "eval_loss" in metrics:
                self._report({"step": step, "loss": metrics["eval_loss"]})
            return
        before = metrics["loss"] if self._loss is None else self._loss
        self._loss = _SMOOTHING * before + (1 - _SMOOTHING) * metrics["loss"]
        self._report({"step": step, "loss": self._loss})

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None:
        pass


def _register_best(
    config: SweepConfig,
    result: SweepResult,
    trials: Sequence[Trial],
    parent: AdapterManifest | None,
    *,
    force: bool,
) -> SweepResult:
    from training.__main__ import register

    best = result.best
    if best is None:
        failed = next((outcome.reason for outcome in result.outcomes if outcome.reason), "none finished")
        return replace(result, refused=f"no trial finished with a finite {result.metric}: {failed}")
    chosen = next(trial for trial in trials if trial.number == best.number)
    directory = trial_dir(result.run_dir, best.number)
    recorded = json.loads((directory / "result.json").read_text())
    trained = FitResult(
        run_name=f"{result.name}/trials/{directory.name}",
        run_dir=directory,
        inputs=read_inputs(chosen.config),
        metrics=recorded["metrics"],
        samples=recorded["samples"],
        quantization=chosen.config.quantization.model_copy(update={"compute_dtype": recorded["compute_dtype"]}),
        config=chosen.config,
        parent=parent,
    )
    sweep = {"name": result.name, "num_trials": len(trials), "searched": sorted(config.search)}
    try:
        return replace(result, manifest=register(chosen.config, trained, force=force, sweep=sweep))
    except CorralError as error:
        return replace(result, refused=str(error))
