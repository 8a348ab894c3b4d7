"""Experiment trackers: TensorBoard, MLflow, W&B, and Ray's Prometheus endpoint.

`open_trackers` opens them on rank 0, and every logged step is passed to each. They continue a resumed run without
duplicate steps. Knows nothing of how a run trains.
"""

import contextlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from training.config.train_config import TrackerName
from training.dotted_keys import flattened
from training.errors import ConfigError

_PROJECT = "corral"  # W&B's project and MLflow's experiment unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set
_MLFLOW_RUN_TAG = "corral.run_name"
# A step's metric -> the name (Ray prefixes it with `ray_`) and description of its Prometheus gauge.
_GAUGES = {
    "loss": ("corral_train_loss", "loss of the step, nats per token"),
    "eval_loss": ("corral_train_eval_loss", "held-out loss, nats per token"),
    "learning_rate": ("corral_train_learning_rate", "learning rate"),
    "grad_norm": ("corral_train_grad_norm", "norm of the gradient before clipping"),
    "tokens_per_s": ("corral_train_tokens_per_second", "tokens trained per second, over all workers"),
    "peak_memory_bytes": ("corral_train_peak_memory_bytes", "most memory that rank 0 held"),
    "epoch": ("corral_train_epoch", "passes over the data"),
}


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The description of a run for its trackers.

    Attributes:
        config: resolved, nested.
        first_step: the first step that will be logged; it supersedes later steps of an interrupted attempt.
        tensorboard_dir: a local directory for event files.
    """

    name: str
    adapter: str
    base: str
    config: Mapping[str, Any]
    first_step: int
    tensorboard_dir: Path


class Tracker(Protocol):
    """Receives the metrics of a run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""

    def close(self) -> None:
        """Finish; nothing is logged afterwards."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Check that the package of every tracker is installed here.

    Raises:
        ConfigError: one is not; names it and what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"report_to names {name!r}, but the package {name} is not installed: pip install {name} (on every "
                "node of a cluster), or remove it from report_to"
            )


def open_trackers(names: Sequence[TrackerName], run: TrackedRun) -> "Trackers":
    """Open Ray's metrics and the named trackers.

    Raises:
        ConfigError: a package is not installed.
    """
    check_trackers(names)
    trackers = Trackers()
    trackers.add("prometheus", partial(RayMetrics, run))
    for name in names:
        trackers.add(name, partial(_TRACKERS[name], run))
    return trackers


class Trackers:
    """Several trackers as one. A tracker that fails is dropped and named in `failed`; the run continues."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}
        self.failed: dict[str, str] = {}  # name: reason

    def add(self, name: str, start: Callable[[], Tracker]) -> None:
        """Open a tracker with `start` and add it."""
        with self._drop_on_error(name):
            self._open[name] = start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step in every tracker."""
        for name, tracker in [*self._open.items()]:
            with self._drop_on_error(name):
                tracker.log(step, metrics)

    def close(self) -> None:
        """Close every tracker."""
        for name, tracker in [*self._open.items()]:
            with self._drop_on_error(name):
                tracker.close()
        self._open.clear()

    @contextlib.contextmanager
    def _drop_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            self.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class TensorBoard:
    """Event files in the run's `tensorboard/`: `tensorboard --logdir RUNS_DIR` compares all runs."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # Readers of the files discard earlier entries from `purge_step` on.
        self._writer = SummaryWriter(str(run.tensorboard_dir), purge_step=run.first_step, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        for name, value in metrics.items():
            self._writer.add_scalar(_tensorboard_tag(name), value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Mlflow:
    """An MLflow run on the server of MLFLOW_TRACKING_URI, or else in `mlflow.db` next to the run directories."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        default_uri = f"sqlite:///{run.tensorboard_dir.parent.parent / 'mlflow.db'}"  # a worker's own directory is lost
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or default_uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        earlier_runs = self._client.search_runs(
            [experiment_id], f"tags.`{_MLFLOW_RUN_TAG}` = '{run.name}'", max_results=1
        )
        if earlier_runs:
            self._id = earlier_runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            # Metrics cannot be deleted: steps that an earlier attempt logged are not logged again.
            history = self._client.get_metric_history(self._id, "loss")
            self._last_step = max((int(metric.step) for metric in history), default=0)
        else:
            tags = {_MLFLOW_RUN_TAG: run.name, "adapter": run.adapter, "base": run.base}
            self._id = self._client.create_run(experiment_id, tags=tags, run_name=run.name).info.run_id
            self._last_step = 0
            for key, value in flattened(run.config).items():
                self._client.log_param(self._id, key, str(value)[:500])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        from mlflow.entities import Metric

        if step > self._last_step or "loss" not in metrics:  # without a loss they are the results of the run
            now = int(time.time() * 1000)
            self._client.log_batch(self._id, [Metric(_mlflow_name(k), v, now, step) for k, v in metrics.items()])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


class Wandb:
    """A W&B run, configured by WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and WANDB_API_KEY."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.name,
            name=run.name,
            resume="allow",
            dir=run.tensorboard_dir.parent,
            config=dict(run.config),
            tags=[run.adapter, run.base],
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step; W&B accepts each step only once."""
        if step >= self._run.step:
            self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what remains."""
        self._run.finish()


class RayMetrics:
    """Prometheus gauges such as `ray_corral_train_loss`, on the metrics port of the node that trains."""

    def __init__(self, run: TrackedRun) -> None:
        from ray.util.metrics import Counter, Gauge

        tags = {"run": run.name, "adapter": run.adapter, "base": run.base}

        def create(kind: Any, name: str, description: str) -> Any:
            metric = kind(name, description=description, tag_keys=tuple(tags))
            metric.set_default_tags(tags)
            return metric

        self._gauges = {key: create(Gauge, name, description) for key, (name, description) in _GAUGES.items()}
        self._step = create(Gauge, "corral_train_step", "optimizer steps done")
        self._tokens = create(Counter, "corral_train_tokens_total", "tokens trained by this worker's run")
        self._counted_tokens = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauges to the metrics of one step."""
        self._step.set(step)
        for key, gauge in self._gauges.items():
            if key in metrics:
                gauge.set(metrics[key])
        if (tokens := metrics.get("num_tokens", 0.0)) > self._counted_tokens:
            self._tokens.inc(tokens - self._counted_tokens)
            self._counted_tokens = tokens

    def close(self) -> None:
        """Do nothing: gauges keep their last values until the worker ends."""


_TRACKERS: dict[TrackerName, type[TensorBoard] | type[Mlflow] | type[Wandb]] = {
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "wandb": Wandb,
}


def _tensorboard_tag(name: str) -> str:
    """GROUP/NAME: TensorBoard groups tags by their prefix."""
    return name if "/" in name else f"{'eval' if 'eval' in name else 'train'}/{name}"


def _mlflow_name(name: str) -> str:
    """`name` with the characters that MLflow allows: letters, digits, `_-. :/`."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)
