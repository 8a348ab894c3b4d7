"""A sweep on Ray Tune: every trial of a `SweepConfig` is trained, and only the best one's adapter is registered.

`corral sweep` comes here. A trial is one Tune actor that calls `training.trainer.train.train` itself, on one worker.
Ray Train inside Tune, the other way, starts three actors for a trial, of which Tune sees only the small one that waits:
it could hold back by a fixed number of trials, but not by the CPUs and GPUs that they take.

The sweep's `RunDir` has config.json, sweep.json, sweep.md, and a run directory for each trial, trials/000 and on; no
checkpoints are kept. A sweep that is taken up again runs the trials that have neither result.json nor failure.json.
"""

import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.base_models.resolve import resolve_base_model
from training.config.load import resolved
from training.config.train_config import TrainConfig
from training.data.run_inputs import read_inputs
from training.errors import CorralError
from training.planning.resources import check_resources, check_this_machine, wants_gpu
from training.ray_train.session import equal_share, one_line, ray_is_running_here, ray_session, ray_storage
from training.ray_train.worker import RayRun, train_into
from training.registry.manifest import AdapterManifest
from training.runs.attempt import failure_recorded, scratch_of
from training.runs.continue_from import PARENT_DIR, copy_parent, resolve_parent_adapter, split_warning
from training.runs.progress import Progress, show_progress_of, write_progress
from training.runs.register import register
from training.runs.result import read_result
from training.runs.resume import open_run, run_dir_of, with_absolute_paths
from training.runs.run_dir import RunDir
from training.runs.run_lock import hold_run_lock
from training.sweep.config import SweepConfig, Trial, plan
from training.sweep.report import report
from training.sweep.result import SweepResult, as_json, is_done, ranked, read_outcome, trial_dir

_SMOOTHING = 0.9  # of the training loss that asha compares: batches differ


def run_sweep(config: SweepConfig, *, force: bool = False, debug: bool = False) -> SweepResult:
    """Run every trial that has not been run, rank them, and register the best one's adapter.

    Raises:
        CorralError: config, data or machine do not fit, another process drives the sweep, or a signal stopped it. A
            trial that fails, or a best adapter that the gate refuses, is in the result instead.
    """
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not on_cluster and not ray_is_running_here():
        check_this_machine(config)
    inputs = read_inputs(config)
    base = resolve_base_model(config.base_model, config.base_revision)
    checked = [(trial, *resolve_parent_adapter(trial.config, base)) for trial in plan(config)]
    parent = checked[0][2]
    if warning := parent and split_warning(config, inputs.dataset, parent):
        print(f"data: note: {warning}", file=sys.stderr)
    trials = [replace(trial, config=with_absolute_paths(trial_config)) for trial, trial_config, _ in checked]
    run_dir = run_dir_of(config)
    title = f"{run_dir.name} on {inputs.base.name}"
    with hold_run_lock(run_dir):
        open_run(config, run_dir)
        if parent:
            copy_parent(parent, run_dir)
        with failure_recorded(run_dir, 0), ray_session(on_cluster, debug), show_progress_of(run_dir, title):
            write_progress(run_dir, Progress(f"starting {len(trials)} trials"))
            crashes = _run_trials(config, trials, run_dir, debug)
        outcomes = [read_outcome(t, trial_dir(run_dir, t.number), crashes.get(t.number)) for t in trials]
        outcomes = ranked(outcomes, config.sweep.metric, config.sweep.mode)
        result = SweepResult(run_dir.name, run_dir.address, config.sweep.metric, outcomes)
        result = _register_best(config, result, run_dir, trials, parent, force=force)
        run_dir.write_json("sweep.json", as_json(result))
        run_dir.write_text("sweep.md", report(result))
    return result


def _run_trials(config: SweepConfig, trials: Sequence[Trial], run_dir: RunDir, debug: bool) -> dict[int, str]:
    """Run what is left of `trials`; returns the errors of those that crashed, by number."""
    import ray

    there = ray.cluster_resources()
    gpus = there.get("GPU", 0.0)
    check_resources(config, there.get("CPU", 0.0), gpus, "the Ray cluster")
    left = [trial for trial in trials if not is_done(trial_dir(run_dir, trial.number))]
    if not left:
        return {}
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a trial's files are our own
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would return what there is, as if that were all
    if not debug:
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
    from ray import tune

    most = min(config.sweep.max_concurrent_trials or len(left), len(left))
    use_gpu = wants_gpu(config, gpus)
    resources = config.resources_per_worker or equal_share(min(most, int(gpus) or most), use_gpu)
    for trial in left:
        trial_dir(run_dir, trial.number).write_json("config.json", dict(resolved(trial.config)))
    tasks = [
        {"sweep": [run_dir.parent, run_dir.name], "number": trial.number, "cpus": resources.get("CPU", 1.0)}
        for trial in left
    ]
    filesystem, storage_path = ray_storage(RunDir(run_dir.address, "tune"))
    tuner = tune.Tuner(
        tune.with_resources(_run_trial, resources),
        param_space={"task": tune.grid_search(tasks)},
        tune_config=tune.TuneConfig(scheduler=_scheduler(config), max_concurrent_trials=most, reuse_actors=True),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            verbose=1 if debug else 0,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[_progress(run_dir, len(left))],
        ),
    )
    try:
        with redirect_stdout(sys.stderr if debug else io.StringIO()):  # Tune prints, however quiet it is told to be
            grid: Any = tuner.fit()
    finally:
        with suppress(CorralError):  # a store that is away
            run_dir.remove_folder("tune")  # what counts is in the trials' directories
    results = [grid[index] for index in range(len(grid))]
    return {result.config["task"]["number"]: one_line(result.error) for result in results if result.error}


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


def _progress(run_dir: RunDir, num_trials: int) -> Any:
    from ray.tune import Callback

    class TrialCount(Callback):
        """Shows how many trials have ended."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            ended = sum(t.is_finished() for t in trials)
            write_progress(run_dir, Progress(f"{ended} of {num_trials} trials have ended"))

        on_trial_error = on_trial_complete

    return TrialCount()


def _run_trial(space: dict[str, Any]) -> None:
    """What Ray Tune calls in a trial's actor."""
    import ray
    import torch
    from ray import tune

    task = space["task"]
    sweep_dir = RunDir(*task["sweep"])
    run_dir = trial_dir(sweep_dir, task["number"])
    config = TrainConfig.model_validate(run_dir.read_json("config.json"))
    torch.set_num_threads(max(1, int(task["cpus"])))
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    with scratch_of(run_dir, 0) as scratch:
        parent_dir = sweep_dir.fetch(PARENT_DIR, scratch / PARENT_DIR) if config.continue_from else None
        try:
            with failure_recorded(run_dir, 0):
                run = _TrialRun(config, run_dir, scratch, tune.report)
                train_into(run_dir, config, run, scratch, device, None, parent_dir)
        except CorralError:
            return  # recorded; the actor takes the next trial


class _TrialRun(RayRun):
    """A `RunReporter` in a trial: logs as a run does and reports the loss to Tune; keeps no checkpoints.

    That is the held-out loss where there is one during training (`eval_steps`), else the smoothed training loss.
    """

    def __init__(
        self, config: TrainConfig, run_dir: RunDir, scratch: Path, tell: Callable[[dict[str, float]], None]
    ) -> None:
        super().__init__(config, 0, run_dir, 0, scratch)
        self._tell = tell
        self._by_eval_loss = config.eval_steps is not None
        self._loss: float | None = None

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        super().on_log(step, num_steps, metrics)
        if self._by_eval_loss:
            if "eval_loss" in metrics:
                self._tell({"step": step, "loss": metrics["eval_loss"]})
            return
        before = metrics["loss"] if self._loss is None else self._loss
        self._loss = _SMOOTHING * before + (1 - _SMOOTHING) * metrics["loss"]
        self._tell({"step": step, "loss": self._loss})

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None:
        pass


def _register_best(
    config: SweepConfig,
    result: SweepResult,
    run_dir: RunDir,
    trials: Sequence[Trial],
    parent: AdapterManifest | None,
    *,
    force: bool,
) -> SweepResult:
    best = result.best
    if best is None:
        failed = next((outcome.reason for outcome in result.outcomes if outcome.reason), "none finished")
        return replace(result, refused=f"no trial finished with a finite {result.metric}: {failed}")
    chosen = next(trial.config for trial in trials if trial.number == best.number)
    trained = read_result(chosen, trial_dir(run_dir, best.number), read_inputs(chosen), parent)
    sweep = {"name": result.name, "num_trials": len(trials), "searched": sorted(config.search)}
    try:
        return replace(result, manifest=register(chosen, trained, force=force, sweep=sweep))
    except CorralError as error:
        return replace(result, refused=str(error))
