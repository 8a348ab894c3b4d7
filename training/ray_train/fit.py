"""Training on Ray Train: `fit` runs a `TrainConfig` on the workers of `training.ray_train.worker` and waits.

The results of a run are in its `RunDir`; a run of the same name resumes from the last complete checkpoint there. Does
not register adapters.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from training import errors
from training.base_models.resolve import resolve_base_model
from training.config.train_config import TrainConfig
from training.data.run_inputs import read_inputs
from training.errors import CorralError, TrainingError
from training.local_ray.signals import preserved_handlers
from training.planning.plan import make_plan
from training.planning.resources import check_resources, check_this_machine, wants_gpu
from training.ray_train.session import equal_share, is_ray_initialized, one_line, ray_session, ray_storage
from training.ray_train.trackers import check_trackers
from training.runs.attempt import failure_recorded
from training.runs.continue_from import copy_parent, resolve_parent_adapter, with_warning
from training.runs.progress import Progress, show_progress_of, write_progress
from training.runs.report import write_report
from training.runs.result import RunResult, read_result
from training.runs.resume import is_finished, open_run, record_data_report, resolve_run_dir, with_absolute_paths
from training.runs.run_dir import RunDir
from training.runs.run_lock import hold_run_lock

if TYPE_CHECKING:
    from ray.train.v2.torch.torch_trainer import TorchTrainer


_CHECKPOINTS_KEPT = 2  # if a crash truncates the last one, the run resumes from the one before


def fit(config: TrainConfig, *, debug: bool = False) -> RunResult:
    """Train on Ray: on the cluster of RAY_ADDRESS (set inside a Ray job), else on a private one on this machine.

    A run that is already complete is not trained again: its result is returned.

    Raises:
        CorralError: config, data or cluster do not fit, another process holds the run's lock, the run failed, or a
            signal stopped it; one line.
    """
    check_trackers(config.report_to)
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not on_cluster and not is_ray_initialized():
        check_this_machine(config)
    config, parent = resolve_parent_adapter(config, resolve_base_model(config.base_model, config.base_revision))
    inputs = with_warning(read_inputs(config), config, parent)
    print(inputs.report.summary(), file=sys.stderr)
    run_dir = resolve_run_dir(config)
    if is_finished(run_dir):  # take no lock: the report would show its times
        config = open_run(config, run_dir)
        record_data_report(run_dir, inputs)
        note = f"run {run_dir.name!r} is already complete, nothing is trained again: to train, choose another run_name"
        print(note, file=sys.stderr)
        return read_result(config, run_dir, inputs, parent)
    title = f"{config.adapter} on {inputs.base.name}"
    with hold_run_lock(run_dir):
        config = open_run(config, run_dir)
        record_data_report(run_dir, inputs)
        run_dir.write_json("plan.json", make_plan(config, inputs).as_dict())
        if parent:
            copy_parent(parent, run_dir)
        with (
            _report_on_error(run_dir),
            failure_recorded(run_dir, 0),
            ray_session(on_cluster, debug) as is_private,
            show_progress_of(run_dir, title),
        ):
            write_progress(run_dir, Progress("starting Ray Train"))
            _run_workers(config, run_dir, is_private, debug)
    return read_result(config, run_dir, inputs, parent)


@contextlib.contextmanager
def _report_on_error(run_dir: RunDir) -> Iterator[None]:
    """Write the report of a run that ends without a result."""
    try:
        yield
    except (CorralError, KeyboardInterrupt):
        with contextlib.suppress(CorralError):  # the disk may be full
            write_report(run_dir)
        raise


def _run_workers(config: TrainConfig, run_dir: RunDir, is_private: bool, debug: bool) -> None:
    import ray
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from training.ray_train.worker import train_func

    available = ray.cluster_resources()
    gpus = available.get("GPU", 0.0)
    check_resources(config, available.get("CPU", 0.0), gpus, "the Ray cluster")
    use_gpu = wants_gpu(config, gpus)
    elastic = (config.min_workers, config.max_workers)
    filesystem, storage_path = ray_storage(run_dir)
    trainer = trainer_class(is_private)(
        train_func,
        train_loop_config={
            "config": with_absolute_paths(config).model_dump(mode="json"),
            "storage": run_dir.parent,
            "run_name": run_dir.name,
        },
        scaling_config=ScalingConfig(
            num_workers=config.max_workers if isinstance(config.num_workers, int) else elastic,
            use_gpu=use_gpu,
            resources_per_worker=config.resources_per_worker or equal_share(config.max_workers, use_gpu),
        ),
        run_config=RunConfig(
            name=run_dir.name,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=_CHECKPOINTS_KEPT),
            logging_config=LoggingConfig(log_level="INFO" if debug else "ERROR"),
        ),
    )
    try:
        with preserved_handlers():
            trainer.fit()
    except SystemExit:  # how Ray Train ends on Ctrl-C, with exit code 0
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        _raise_recorded(run_dir)
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(cause := getattr(failure, "_base_exc", failure), CorralError):
                raise cause from error
        raise TrainingError(
            f"run {run_dir.name!r} failed: {one_line(error)}: fix the cause and pass run_name={run_dir.name} to resume "
            "from its last checkpoint"
        ) from error
    _raise_recorded(run_dir)
    run_dir.keep_newest("checkpoint_20", _CHECKPOINTS_KEPT)  # Ray Train may end before its last pruning
    if run_dir.read_json("result.json") is None:
        raise TrainingError(
            f"run {run_dir.name!r} ended without a result in {run_dir}: set storage_path to a directory that all nodes "
            "of the cluster share, or to an object store"
        )


def _raise_recorded(run_dir: RunDir) -> None:
    """Raise the error that a worker recorded, with its original class and message."""
    if recorded := run_dir.read_json("failure.json"):
        raise getattr(errors, recorded["error"], TrainingError)(recorded["message"])


def trainer_class(is_private: bool) -> "type[TorchTrainer]":
    """TorchTrainer without the actor for Ray Data, which is not used.

    On a private Ray also without the one for placement groups that outlive the controller: that Ray ends with it. Each
    takes seconds of CPU time to start, and wakes up a hundred times a second.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    unused = (DatasetsCallback, *([PlacementGroupCleanerCallback] if is_private else []))

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    return Trainer
