"""What Ray Train runs on every worker: the training itself, with progress and checkpoints in the run's directory.

Rank 0 writes; a checkpoint says which files it has and how large they are, so that one cut short is told from a whole
one. `training.ray_train.fit` starts the workers.
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.base_models.resolve import base_name
from training.config.load import resolved
from training.config.train_config import TrainConfig
from training.local_ray.cpu_priority import normal_priority
from training.ray_train.environment import environment_here
from training.ray_train.trackers import TrackedRun, open_trackers
from training.runs.attempt import failure_recorded, scratch_of
from training.runs.continue_from import PARENT_DIR
from training.runs.metrics_log import MetricsLog, PhaseLog
from training.runs.progress import Progress, write_progress
from training.runs.run_dir import RunDir

if TYPE_CHECKING:
    import torch

_CONTENTS_FILE = "contents.json"  # names and sizes of the files of a checkpoint
_REMOTE_EVERY_S = 5.0  # how often progress goes to an object store


def train_func(loop_config: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of Ray Train.

    Args:
        loop_config: `config`, a `TrainConfig` as plain values, and `storage` and `run_name` of its `RunDir`.
    """
    config = TrainConfig.model_validate(loop_config["config"])
    run_dir = RunDir(loop_config["storage"], loop_config["run_name"])
    if run_dir.read_json("failure.json"):
        return  # a restart after an error that would only come again

    import ray
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0))))
    rank = get_context().get_world_rank()
    with scratch_of(run_dir, rank) as scratch, failure_recorded(run_dir, rank):
        resume_from = _last_whole_checkpoint(scratch / "resumed")
        run = RayRun(config, rank, run_dir, _checkpoint_step(resume_from), scratch)
        parent_dir = run_dir.fetch(PARENT_DIR, scratch / PARENT_DIR) if config.continue_from else None
        train_into(run_dir, config, run, scratch, get_device(), resume_from, parent_dir)


def train_into(
    run_dir: RunDir,
    config: TrainConfig,
    run: "RayRun",
    scratch: Path,
    device: "torch.device",
    resume_from: Path | None,
    parent_dir: Path | None,
) -> None:
    """Train, and leave `adapter/`, `environment.json` and `result.json` in the run's directory (rank 0)."""
    import torch

    from training.trainer import train as sft

    normal_priority()  # before torch starts this thread's helpers
    _keep_quiet()
    if run.rank == 0:
        num_workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        environment = environment_here(str(device), num_workers)
        run_dir.write_json("environment.json", environment.model_dump(mode="json"))
    with run:
        result = sft.train(
            config,
            run,
            adapter_dir=scratch / "adapter",
            scratch_dir=scratch / "checkpoints",
            device=device,
            resume_from=resume_from,
            parent_dir=parent_dir,
        )
        if run.rank == 0:
            run.on_result(result.metrics)
            run_dir.upload(scratch / "adapter", "adapter")
            run_dir.write_json("result.json", asdict(result))


class RayRun:
    """A `training.trainer.callback.RunReporter` on a Ray Train worker; leaving its block closes the trackers.

    Args:
        step: of the checkpoint that the run goes on from, 0 for a new run.
        scratch: for event files on their way to an object store.
    """

    def __init__(self, config: TrainConfig, rank: int, run_dir: RunDir, step: int, scratch: Path) -> None:
        self.rank = rank
        self._run_dir = run_dir
        self._event_dir = run_dir.local_path("tensorboard") or scratch / "tensorboard"
        tracked = TrackedRun(
            name=run_dir.name,
            adapter=config.adapter,
            base=base_name(config.base_model),
            config=resolved(config),
            first_step=step + 1,
            tensorboard_dir=self._event_dir,
        )
        self._trackers = open_trackers(config.report_to, tracked) if rank == 0 else None
        self._metrics = MetricsLog(run_dir, step) if rank == 0 else None
        self._phases = PhaseLog(run_dir)
        self._written_at = 0.0
        self._started: tuple[int, float] | None = None  # first logged step of this worker, and when

    def __enter__(self) -> "RayRun":
        return self

    def __exit__(self, *_: object) -> None:
        if self._trackers:
            self._trackers.close()
            self._upload_events()
            self._run_dir.write_json("trackers.json", {"failed": self._trackers.failed})

    def on_result(self, metrics: Mapping[str, float]) -> None:
        """The run is done: its figures go to the trackers too."""
        if self._trackers:
            self._trackers.log(int(metrics["num_steps"]), {f"result/{key}": value for key, value in metrics.items()})

    def on_phase(self, phase: str) -> None:
        if self._metrics:
            self._metrics.flush()
            self._show(Progress(phase), now=True)
            self._phases.add(phase)

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        if not self._metrics or not self._trackers:
            return
        self._trackers.log(step, metrics)
        now = time.time()
        self._metrics.add({"step": step, "num_steps": num_steps, "time": now, **metrics})
        first_step, started = self._started = self._started or (step, now)
        eta_s = (num_steps - step) * (now - started) / (step - first_step) if step > first_step else None
        self._show(Progress("training", step, num_steps, metrics["loss"], metrics["tokens_per_s"], eta_s))

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None:
        import ray.train

        checkpoint = None
        if self._metrics:
            self._metrics.flush()
            self._upload_events()
            sizes = {str(f.relative_to(directory)): f.stat().st_size for f in directory.rglob("*") if f.is_file()}
            (directory / _CONTENTS_FILE).write_text(json.dumps({"step": step, "sizes": sizes}))
            checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": step, **metrics}, checkpoint=checkpoint)  # a barrier: every rank is at this step

    def _show(self, progress: Progress, now: bool = False) -> None:
        if now or self._run_dir.is_local or time.monotonic() - self._written_at > _REMOTE_EVERY_S:
            self._written_at = time.monotonic()
            write_progress(self._run_dir, progress)

    def _upload_events(self) -> None:
        if not self._run_dir.is_local and self._event_dir.exists():
            self._run_dir.upload(self._event_dir, "tensorboard")


def _last_whole_checkpoint(copy: Path) -> Path | None:
    """The newest reported checkpoint whose files all have the size they were written with; from a store, a `copy`."""
    import ray.train

    reported = [ray.train.get_checkpoint()]
    if reported[0] is not None:
        reported += [r.checkpoint for r in reversed(ray.train.get_all_reported_checkpoints())]
    for checkpoint in reported:
        if checkpoint is None:
            continue
        if Path(checkpoint.path).is_dir():
            directory = Path(checkpoint.path)
        else:
            shutil.rmtree(copy, ignore_errors=True)
            try:
                directory = Path(checkpoint.to_directory(str(copy)))
            except OSError:  # what is listed may be gone from the store
                continue
        if _is_whole(directory):
            return directory
    return None


def _is_whole(directory: Path) -> bool:
    try:
        contents = json.loads((directory / _CONTENTS_FILE).read_text())
        return all((directory / name).stat().st_size == size for name, size in contents["sizes"].items())
    except (OSError, ValueError, KeyError):
        return False


def _checkpoint_step(checkpoint: Path | None) -> int:
    return int(json.loads((checkpoint / _CONTENTS_FILE).read_text())["step"]) if checkpoint else 0


def _keep_quiet() -> None:
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
