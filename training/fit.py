"""Ray Train around `training.sft`: `fit` runs a `TrainConfig` on its workers and waits.

Each run has a directory, STORAGE/RUN_NAME: `config.json`, `metrics.jsonl` (one line per logged step), Ray Train's
checkpoints, `parent/` where it goes on from a registered adapter, and at the end `adapter/` and `result.json`. The same
run name goes on from the last whole checkpoint. Registers nothing.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training import errors
from training.base_models import Quantization, resolve_base_model
from training.config import TrainConfig, check_resources, check_this_machine, resolved, wants_gpu
from training.errors import ConfigError, CorralError, RunStopped, TrainingError
from training.home import corral_home
from training.inputs import RunInputs, read_inputs
from training.parent import PARENT_DIR, copy_parent, resolve_parent
from training.progress import Progress, show_progress, write_progress
from training.registry import AdapterManifest
from training.signals import kept_handlers, undisturbed

_CHECKPOINTS_KEPT = 2  # the last may be cut short by a crash, then the one before counts
_CONTENTS_FILE = "contents.json"  # names and sizes of the files of a checkpoint
# What may differ when a run is resumed: where and how watchfully it runs, not what it computes.
_MAY_CHANGE = {
    "gate", "logging_steps", "max_failures", "num_workers", "resources_per_worker", "run_name", "sample_prompts",
    "save_steps", "storage_path", "sweep", "use_gpu",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FitResult:
    """A finished run.

    Attributes:
        run_dir: where everything of the run lies; `run_dir / "adapter"` is a PEFT folder.
        inputs: base, chat format and data that were trained on.
        metrics: see `training.sft.SftResult`.
        samples: held-out prompts answered by base and adapter, as `training.sft.Sample` has them.
        quantization: of the base, with the compute dtype that was used.
        config: as it ran, with the parent's version and shape written out.
        parent: the adapter that the run went on from.
    """

    run_name: str
    run_dir: Path
    inputs: RunInputs
    metrics: dict[str, float]
    samples: list[dict[str, str]]
    quantization: Quantization
    config: TrainConfig
    parent: AdapterManifest | None

    @property
    def adapter_dir(self) -> Path:
        """The trained adapter."""
        return self.run_dir / "adapter"


def fit(config: TrainConfig, *, debug: bool = False) -> FitResult:
    """Train on Ray: on the cluster of RAY_ADDRESS (set inside a Ray job), else on a private one on this machine.

    Raises:
        CorralError: config, data or cluster do not fit, the run failed, or a signal stopped it; one line.
    """
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not on_cluster and not _ray_is_running_here():
        check_this_machine(config)
    config, parent = resolve_parent(config, resolve_base_model(config.base_model, config.base_revision))
    inputs = read_inputs(config)
    print(inputs.report.short(), file=sys.stderr)
    run_name = config.run_name or fresh_run_name(config.adapter)
    run_dir = _open_run(config, run_name)
    if parent:
        copy_parent(parent, run_dir)
    try:
        with _ray(on_cluster, debug), show_progress(run_dir, f"{config.adapter} on {inputs.base.name}"):
            write_progress(run_dir, Progress("starting Ray Train"))
            _run_workers(config, run_name, run_dir, debug)
    except KeyboardInterrupt:
        raise RunStopped(run_name) from None
    result = json.loads((run_dir / "result.json").read_text())
    quantization = config.quantization.model_copy(update={"compute_dtype": result["compute_dtype"]})
    return FitResult(run_name, run_dir, inputs, result["metrics"], result["samples"], quantization, config, parent)


def fresh_run_name(adapter: str) -> str:
    """A name that no other run has, in order of time: ADAPTER-YYYYMMDD-HHMMSS-xxxx (UTC)."""
    return f"{adapter}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def runs_dir(config: TrainConfig) -> Path:
    """Where run directories lie."""
    return Path(config.storage_path).expanduser().absolute() if config.storage_path else corral_home() / "runs"


def _open_run(config: TrainConfig, run_name: str) -> Path:
    """Make the run's directory, or make sure that the run in it was started with the same configuration."""
    run_dir = runs_dir(config) / run_name
    told = {**resolved(config), "run_name": run_name}
    recorded = run_dir / "config.json"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if recorded.exists():
            before = json.loads(recorded.read_text())
            for key in sorted((told.keys() | before.keys()) - _MAY_CHANGE):
                if told.get(key) != before.get(key):
                    raise ConfigError(
                        f"run {run_name!r} was started with {key}={before.get(key)!r}, now {key} is {told.get(key)!r}: "
                        "set it back to resume the run, or choose another run_name"
                    )
        for stale in ("failure.json", "result.json", "progress.json"):
            (run_dir / stale).unlink(missing_ok=True)
        _write_json(recorded, told)
    except OSError as error:
        raise TrainingError(
            f"run directory {str(run_dir)!r} cannot be written: {error.strerror}: set storage_path"
        ) from error
    return run_dir


@contextlib.contextmanager
def _ray(on_cluster: bool, debug: bool) -> Iterator[None]:
    """Ray for the block: the cluster of RAY_ADDRESS, one that the caller started, or a private one that ends here."""
    import logging

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it Ray warns about its own future
    import ray

    if _ray_is_running_here():
        yield
        return
    quiet: dict[str, Any] = {} if debug else {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with kept_handlers():
            if on_cluster:
                ray.init(**quiet)
            else:
                # Its agents outlive a killed driver by this long, by default for a minute.
                os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
                ray.init(address="local", include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}" if on_cluster else "Ray on this machine"
        raise TrainingError(f"{where} cannot be reached: {_one_line(error)}") from error
    _tighten_token()
    try:
        yield
    finally:
        with undisturbed():
            ray.shutdown()


def _ray_is_running_here() -> bool:
    """Whether the caller has connected this program to Ray already."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _tighten_token() -> None:
    token = Path.home() / ".ray" / "auth_token"  # Ray writes it for everybody to read
    with contextlib.suppress(OSError):
        token.chmod(0o600)


def _run_workers(config: TrainConfig, run_name: str, run_dir: Path, debug: bool) -> None:
    import ray
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    there = ray.cluster_resources()
    gpus = there.get("GPU", 0.0)
    check_resources(config, there.get("CPU", 0.0), gpus, "the Ray cluster")
    use_gpu = wants_gpu(config, gpus)
    trainer = TorchTrainer(
        _train_func,
        train_loop_config={"config": _with_absolute_paths(config).model_dump(mode="json"), "run_dir": str(run_dir)},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=config.resources_per_worker or _equal_share(config.num_workers, use_gpu),
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=str(run_dir.parent),
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
        raise TrainingError(
            f"run {run_name!r} failed: {_one_line(error)}: mend the cause and pass run_name={run_name} to go on "
            "from its last checkpoint"
        ) from error
    _raise_recorded(run_dir)
    if not (run_dir / "result.json").exists():
        raise TrainingError(
            f"run {run_name!r} ended without a result in {str(run_dir)!r}: storage_path must be a directory that every "
            "node of the cluster sees"
        )


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers have another working directory: what is a path here is made absolute."""

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name

    return config.model_copy(
        update={"base_model": absolute(config.base_model), "data": config.data.with_absolute_paths()}
    )


def _equal_share(num_workers: int, use_gpu: bool) -> dict[str, float]:
    """The most CPUs that each of `num_workers` can have at once on the nodes there are; and a GPU where used."""
    import ray

    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        nodes = [ray.available_resources().get("CPU", 0.0)]  # a server may run beside
    shares = range(int(max(nodes, default=1.0)), 1, -1)
    cpus = next((share for share in shares if sum(cpu // share for cpu in nodes) >= num_workers), 1)
    return {"CPU": float(cpus)} | ({"GPU": 1.0} if use_gpu else {})


def _train_func(loop_config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker."""
    config = TrainConfig.model_validate(loop_config["config"])
    run_dir = Path(loop_config["run_dir"])
    if (run_dir / "failure.json").exists():
        return  # a restart after an error that would only come again

    import ray
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from training import sft

    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    torch.set_num_threads(max(1, int(cpus)))
    _keep_quiet()
    with tempfile.TemporaryDirectory(prefix="corral-") as scratch:
        run = _RayRun(get_context().get_world_rank(), run_dir)
        resume_from = _last_whole_checkpoint()
        if run.rank == 0:
            _forget_steps_after(run_dir / "metrics.jsonl", _checkpoint_step(resume_from))
        adapter_dir = Path(scratch) / "adapter"
        try:
            result = sft.train(
                config,
                run,
                adapter_dir=adapter_dir,
                scratch_dir=Path(scratch) / "checkpoints",
                device=get_device(),
                resume_from=resume_from,
                parent_dir=run_dir / PARENT_DIR if config.continue_from else None,
            )
        except CorralError as error:
            if run.rank == 0:
                _write_json(run_dir / "failure.json", {"error": type(error).__name__, "message": str(error)})
            raise
        if run.rank == 0:
            shutil.rmtree(run_dir / "adapter", ignore_errors=True)
            shutil.copytree(adapter_dir, run_dir / "adapter")
            samples = [asdict(sample) for sample in result.samples]
            _write_json(
                run_dir / "result.json",
                {"metrics": result.metrics, "samples": samples, "compute_dtype": result.compute_dtype},
            )


class _RayRun:
    """A `training.sft.Run` on a Ray Train worker."""

    def __init__(self, rank: int, run_dir: Path) -> None:
        self.rank = rank
        self._run_dir = run_dir
        self._started: tuple[int, float] | None = None  # first logged step of this worker, and when

    def on_phase(self, phase: str) -> None:
        if self.rank == 0:
            write_progress(self._run_dir, Progress(phase))

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        if self.rank != 0:
            return
        now = time.time()
        line = json.dumps({"step": step, "num_steps": num_steps, "time": now, **metrics})
        with (self._run_dir / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
        first_step, started = self._started = self._started or (step, now)
        eta_s = (num_steps - step) * (now - started) / (step - first_step) if step > first_step else None
        write_progress(
            self._run_dir, Progress("training", step, num_steps, metrics["loss"], metrics["tokens_per_s"], eta_s)
        )

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None:
        import ray.train

        # Every rank hands over its own part (rank 0 all weights, the others their random state); Ray merges them.
        if self.rank == 0:
            sizes = {str(f.relative_to(directory)): f.stat().st_size for f in directory.rglob("*") if f.is_file()}
            _write_json(directory / _CONTENTS_FILE, {"step": step, "sizes": sizes})
        ray.train.report({"step": step, **metrics}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _last_whole_checkpoint() -> Path | None:
    """The newest reported checkpoint whose files all have the size they were written with."""
    import ray.train

    reported = [ray.train.get_checkpoint()]
    if reported[0] is not None:
        reported += [r.checkpoint for r in reversed(ray.train.get_all_reported_checkpoints())]
    for checkpoint in reported:
        if checkpoint is not None and _is_whole(Path(checkpoint.path)):
            return Path(checkpoint.path)
    return None


def _is_whole(directory: Path) -> bool:
    try:
        contents = json.loads((directory / _CONTENTS_FILE).read_text())
        return all((directory / name).stat().st_size == size for name, size in contents["sizes"].items())
    except (OSError, ValueError, KeyError):
        return False


def _checkpoint_step(checkpoint: Path | None) -> int:
    return int(json.loads((checkpoint / _CONTENTS_FILE).read_text())["step"]) if checkpoint else 0


def _forget_steps_after(metrics_file: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run takes again, and a line that a crash cut short."""
    if not metrics_file.exists():
        return
    kept = []
    for line in metrics_file.read_text().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    metrics_file.write_text("".join(kept))


def _raise_recorded(run_dir: Path) -> None:
    """Raise the error that a worker recorded, as the worker raised it."""
    failure = run_dir / "failure.json"
    if failure.exists():
        recorded = json.loads(failure.read_text())
        raise getattr(errors, recorded["error"], TrainingError)(recorded["message"])


def _keep_quiet() -> None:
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _write_json(path: Path, value: Any) -> None:
    """Write it whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    fresh.write_text(json.dumps(value, indent=1))
    fresh.replace(path)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
