"""Ray Train around `training.ray_train.worker`: `fit` runs a `TrainConfig` on its workers and waits.

What a run leaves is in its `RunDir`; the same run name goes on from the last whole checkpoint there. Registers nothing.
"""

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training import errors
from training.base_models.resolve import Quantization, resolve_base_model
from training.config.train_config import TrainConfig, check_resources, check_this_machine, resolved, wants_gpu
from training.data.run_inputs import RunInputs, read_inputs
from training.errors import ConfigError, CorralError, TrainingError
from training.home import corral_home
from training.local_ray import start as private_ray
from training.local_ray.signals import kept_handlers, undisturbed
from training.planning.plan import make_plan
from training.ray_train.trackers import check_trackers
from training.ray_train.worker import failure_recorded
from training.registry.manifest import Environment
from training.registry.registry import AdapterManifest
from training.runs.continue_from import copy_parent, resolve_parent, with_warning
from training.runs.progress import Progress, show_progress_of, write_progress
from training.runs.report import write_report
from training.runs.run_dir import RunDir
from training.runs.run_lock import driving, read_driver

_CHECKPOINTS_KEPT = 2  # the last may be cut short by a crash, then the one before counts
# What may differ when a run is resumed: where and how watchfully it runs, not what it computes.
_MAY_CHANGE = {
    "fsdp", "gate", "logging_steps", "max_failures", "num_workers", "price_per_hour", "report_to",
    "resources_per_worker", "run_name", "sample_prompts", "save_steps", "storage_path", "sweep", "use_gpu",
}  # fmt: skip
# What an attempt leaves beside its failure; the next one begins without it, where the run has no result.
_OF_AN_ATTEMPT = ("sweep.json", "progress.json", "registered.json", "phases.json")


@dataclass(frozen=True, slots=True)
class FitResult:
    """A finished run.

    Attributes:
        run_dir: where everything of the run lies.
        inputs: base, chat format and data that were trained on.
        metrics: see `training.trainer.train.SftResult`.
        samples: held-out prompts answered by base and adapter, as `training.trainer.samples.Sample` has them.
        quantization: of the base, with the compute dtype that was used.
        adapter_dir: the trained adapter, a PEFT folder on this machine.
        adapter_sha256: of the weights that were evaluated on held-out rows, None if there were none.
        changes: whether the adapter changed any output on them.
        config: as it ran, with the parent's version and shape written out.
        parent: the adapter that the run went on from.
        environment: code, libraries and devices of the workers.
    """

    run_dir: RunDir
    inputs: RunInputs
    metrics: dict[str, float]
    samples: list[dict[str, str]]
    quantization: Quantization
    adapter_dir: Path
    adapter_sha256: str | None
    changes: bool
    config: TrainConfig
    parent: AdapterManifest | None
    environment: Environment

    @property
    def run_name(self) -> str:
        """The name that resumes the run."""
        return self.run_dir.name


def fit(config: TrainConfig, *, debug: bool = False) -> FitResult:
    """Train on Ray: on the cluster of RAY_ADDRESS (set inside a Ray job), else on a private one on this machine.

    A run that has been trained to its end before is not trained again: what it left is returned.

    Raises:
        CorralError: config, data or cluster do not fit, another process drives the run, it failed, or a signal
            stopped it; one line.
    """
    check_trackers(config.report_to)
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not on_cluster and not ray_is_running_here():
        check_this_machine(config)
    config, parent = resolve_parent(config, resolve_base_model(config.base_model, config.base_revision))
    inputs = with_warning(read_inputs(config), config, parent)
    print(inputs.report.short(), file=sys.stderr)
    run_dir = run_dir_of(config)
    if _is_over(run_dir):  # without a driver, whose times the report would show
        config = open_run(config, run_dir)
        _record_data(run_dir, inputs)
        note = f"run {run_dir.name!r} was trained before, nothing is trained again: choose another run_name for that"
        print(note, file=sys.stderr)
        return read_result(config, run_dir, inputs, parent)
    title = f"{config.adapter} on {inputs.base.name}"
    with driving(run_dir):
        config = open_run(config, run_dir)
        _record_data(run_dir, inputs)
        run_dir.write_json("plan.json", make_plan(config, inputs).as_dict())
        if parent:
            copy_parent(parent, run_dir)
        with (
            _reported(run_dir),
            failure_recorded(run_dir, 0),
            ray_session(on_cluster, debug) as is_private,
            show_progress_of(run_dir, title),
        ):
            write_progress(run_dir, Progress("starting Ray Train"))
            _run_workers(config, run_dir, is_private, debug)
    return read_result(config, run_dir, inputs, parent)


def read_result(config: TrainConfig, run_dir: RunDir, inputs: RunInputs, parent: AdapterManifest | None) -> FitResult:
    """What a run with a `result.json` left."""
    result = run_dir.read_json("result.json")
    return FitResult(
        run_dir=run_dir,
        inputs=inputs,
        metrics=result["metrics"],
        samples=result["samples"],
        quantization=config.quantization.model_copy(update={"compute_dtype": result["compute_dtype"]}),
        adapter_dir=run_dir.fetch("adapter"),
        adapter_sha256=result["adapter_sha256"],
        changes=result["changes"],
        config=config,
        parent=parent,
        environment=Environment.model_validate(run_dir.read_json("environment.json")),
    )


def run_dir_of(config: TrainConfig) -> RunDir:
    """The directory of the run that `config` names, or of a new one."""
    return RunDir(runs_dir(config), config.run_name or fresh_run_name(config))


def fresh_run_name(config: TrainConfig) -> str:
    """A name that no other run has, in order of time: [sweep-]ADAPTER-YYYYMMDD-HHMMSS-xxxx (UTC)."""
    return f"{config.run_name_prefix}{config.adapter}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def runs_dir(config: TrainConfig) -> str:
    """Where run directories lie: a path or an fsspec address."""
    if config.storage_path and "://" in config.storage_path:
        return config.storage_path
    return str(Path(config.storage_path).expanduser().absolute() if config.storage_path else corral_home() / "runs")


def open_run(config: TrainConfig, run_dir: RunDir) -> TrainConfig:
    """Make the run's directory, or make sure that the run in it was started with the same configuration.

    Returns the configuration to go on with: a resumed run keeps the size of its steps if `num_workers` is another.
    """
    told = {**resolved(config), "run_name": run_dir.name}
    before = run_dir.read_json("config.json")
    if before:
        for key in sorted((told.keys() | before.keys()) - _MAY_CHANGE):
            if told.get(key) != before.get(key):
                raise ConfigError(
                    f"run {run_dir.name!r} was started with {key}={before.get(key)!r}, now {key} is "
                    f"{told.get(key)!r}: set it back to resume the run, or choose another run_name"
                )
        started_with = type(config).model_validate(before)
        if started_with.step_size != config.step_size:
            changes = {"train_batch_size": started_with.step_size, "gradient_accumulation_steps": 1}
            config = config.model_copy(update=changes)
    else:
        run_dir.write_json("config.json", told)
    run_dir.remove("failure.json", *(() if run_dir.read_json("result.json") else _OF_AN_ATTEMPT))
    return config


def _is_over(run_dir: RunDir) -> bool:
    """Whether the run was trained to its end and nobody drives it any more."""
    if run_dir.read_json("result.json") is None:
        return False
    driver = read_driver(run_dir)
    return driver is None or not driver.is_alive


def _record_data(run_dir: RunDir, inputs: RunInputs) -> None:
    """Write what was found in the data, or make sure that a resumed run finds the same."""
    before = (run_dir.read_json("data.json") or {}).get("sha256", inputs.report.sha256)
    if before != inputs.report.sha256:
        raise ConfigError(
            f"run {run_dir.name!r} was started on data with sha256 {before[:12]}, data.path now has "
            f"{inputs.report.sha256[:12]}: put the files back to resume the run, or choose another run_name"
        )
    run_dir.write_json("data.json", inputs.report.model_dump(mode="json"))


@contextlib.contextmanager
def _reported(run_dir: RunDir) -> Iterator[None]:
    """Write the report of a run that ends before its result."""
    try:
        yield
    except (CorralError, KeyboardInterrupt):
        with contextlib.suppress(CorralError):  # the disk may be full
            write_report(run_dir)
        raise


@contextlib.contextmanager
def ray_session(on_cluster: bool, debug: bool) -> Iterator[bool]:
    """Ray for the block: the cluster of RAY_ADDRESS, one that the caller started, or a private one that ends here;
    yields whether it is the last."""
    import logging

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it Ray warns about its own future
    import ray

    if ray_is_running_here():
        yield False
        return
    quiet: dict[str, Any] = {} if debug else {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with kept_handlers():
            if on_cluster:
                ray.init(**quiet)
            else:
                private_ray.start(**quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}" if on_cluster else "Ray on this machine"
        raise TrainingError(f"{where} cannot be reached: {one_line(error)}") from error
    try:
        yield not on_cluster
    finally:
        with undisturbed():
            ray.shutdown()


def ray_is_running_here() -> bool:
    """Whether the caller has connected this program to Ray already."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _run_workers(config: TrainConfig, run_dir: RunDir, is_private: bool, debug: bool) -> None:
    import ray
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    from training.ray_train.worker import train_func

    there = ray.cluster_resources()
    gpus = there.get("GPU", 0.0)
    check_resources(config, there.get("CPU", 0.0), gpus, "the Ray cluster")
    use_gpu = wants_gpu(config, gpus)
    elastic = (config.min_workers, config.max_workers)
    filesystem, storage_path = ray_storage(run_dir)
    trainer = (private_ray.trainer_class() if is_private else TorchTrainer)(
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
        with kept_handlers():
            trainer.fit()
    except SystemExit:  # what Ray Train makes of Ctrl-C, with exit code 0
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        _raise_recorded(run_dir)
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(cause := getattr(failure, "_base_exc", failure), CorralError):
                raise cause from error
        raise TrainingError(
            f"run {run_dir.name!r} failed: {one_line(error)}: mend the cause and pass run_name={run_dir.name} to go "
            "on from its last checkpoint"
        ) from error
    _raise_recorded(run_dir)
    run_dir.keep_newest("checkpoint_20", _CHECKPOINTS_KEPT)  # Ray Train may end before it has pruned the last time
    if run_dir.read_json("result.json") is None:
        raise TrainingError(
            f"run {run_dir.name!r} ended without a result in {run_dir}: storage_path must be a directory that every "
            "node of the cluster sees, or an object store"
        )


def ray_storage(run_dir: RunDir) -> tuple[Any, str]:
    """The run directory's parent as Ray Train takes it: None and a path, or a pyarrow filesystem and a path in it."""
    if run_dir.is_local:
        return None, run_dir.parent
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = fsspec.core.url_to_fs(run_dir.parent)
    return PyFileSystem(FSSpecHandler(filesystem)), path


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers have another working directory: what is a path here is made absolute."""

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name

    return config.model_copy(
        update={"base_model": absolute(config.base_model), "data": config.data.with_absolute_paths()}
    )


def equal_share(num_workers: int, use_gpu: bool) -> dict[str, float]:
    """The most CPUs that each of `num_workers` can have at once on the nodes there are; and a GPU where used."""
    import ray

    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        nodes = [ray.available_resources().get("CPU", 0.0)]  # a server may run beside
    shares = range(int(max(nodes, default=1.0)), 1, -1)
    cpus = next((share for share in shares if sum(cpu // share for cpu in nodes) >= num_workers), 1)
    return {"CPU": float(cpus)} | ({"GPU": 1.0} if use_gpu else {})


def _raise_recorded(run_dir: RunDir) -> None:
    """Raise the error that a worker recorded, as the worker raised it."""
    if recorded := run_dir.read_json("failure.json"):
        raise getattr(errors, recorded["error"], TrainingError)(recorded["message"])


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
