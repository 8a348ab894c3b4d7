"""Where else a run's metrics go: TensorBoard, MLflow, W&B, and Ray's Prometheus endpoint.

Rank 0's worker opens them with `open_trackers` and passes every logged step on; `training.ray_train.fit` does so. Each
of them continues a resumed run without doubled steps. Knows nothing of how a run trains.
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
from training.errors import ConfigError

_PROJECT = "corral"  # W&B's project and MLflow's experiment, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says so
_MLFLOW_RUN_TAG = "corral.run_name"
# Metrics of a step -> Prometheus gauges, whose names Ray prefixes with `ray_`.
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
    """What a tracker is told of a run.

    Attributes:
        first_step: the first that will be logged; later ones of an interrupted attempt are superseded.
        config: resolved, nested.
        tensorboard_dir: a local directory for event files.
    """

    name: str
    adapter: str
    base: str
    config: Mapping[str, Any]
    first_step: int
    tensorboard_dir: Path


class Tracker(Protocol):
    """Somewhere that metrics go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of one step."""

    def close(self) -> None:
        """Nothing more comes."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse a tracker whose package is missing here.

    Raises:
        ConfigError: naming it and what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"report_to names {name!r}, but the package {name} is not installed: pip install {name} (on every "
                "node of a cluster), or take it out of report_to"
            )


def open_trackers(names: Sequence[TrackerName], run: TrackedRun) -> "Trackers":
    """Ray's metrics and the named ones.

    Raises:
        ConfigError: a package is missing.
    """
    check_trackers(names)
    opened = Trackers()
    opened.add("prometheus", partial(RayMetrics, run))
    for name in names:
        opened.add(name, partial(_TRACKERS[name], run))
    return opened


class Trackers:
    """Several trackers as one. One that fails is left out and named in `failed`: a run does not end for it."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}
        self.failed: dict[str, str] = {}  # name: reason

    def add(self, name: str, start: Callable[[], Tracker]) -> None:
        """Start one more."""
        with self._surviving(name):
            self._open[name] = start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of one step everywhere."""
        for name, tracker in [*self._open.items()]:
            with self._surviving(name):
                tracker.log(step, metrics)

    def close(self) -> None:
        """Nothing more comes."""
        for name, tracker in [*self._open.items()]:
            with self._surviving(name):
                tracker.close()
        self._open.clear()

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            self.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class TensorBoard:
    """Event files in the run's `tensorboard/`: `tensorboard --logdir RUNS_DIR` shows all runs beside each other."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # Whoever reads the files forgets earlier entries from `purge_step` on.
        self._writer = SummaryWriter(str(run.tensorboard_dir), purge_step=run.first_step, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of one step."""
        for name, value in metrics.items():
            self._writer.add_scalar(_titled(name), value, step)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class Mlflow:
    """An MLflow run on the server of MLFLOW_TRACKING_URI; without one in `mlflow.db` beside the run directories."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        beside_runs = f"sqlite:///{run.tensorboard_dir.parent.parent / 'mlflow.db'}"  # a worker's own directory is lost
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or beside_runs)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else self._client.create_experiment(experiment)
        earlier = self._client.search_runs([experiment_id], f"tags.`{_MLFLOW_RUN_TAG}` = '{run.name}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            # Metrics cannot be taken back: steps that an earlier attempt logged are not logged again.
            history = self._client.get_metric_history(self._id, "loss")
            self._logged = max((int(metric.step) for metric in history), default=0)
        else:
            tags = {_MLFLOW_RUN_TAG: run.name, "adapter": run.adapter, "base": run.base}
            self._id = self._client.create_run(experiment_id, tags=tags, run_name=run.name).info.run_id
            self._logged = 0
            for key, value in _flat(run.config).items():
                self._client.log_param(self._id, key, value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of one step."""
        from mlflow.entities import Metric

        if step > self._logged or "loss" not in metrics:  # the figures of the whole run come again
            now = int(time.time() * 1000)
            self._client.log_batch(self._id, [Metric(_plain(k), v, now, step) for k, v in metrics.items()])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


class Wandb:
    """A W&B run; WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and WANDB_API_KEY say how and where."""

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
        """Record the numbers of one step; W&B takes a step once only."""
        if step >= self._run.step:
            self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class RayMetrics:
    """Gauges on the metrics port of the node that trains; `ray_corral_train_loss` and others, for Prometheus."""

    def __init__(self, run: TrackedRun) -> None:
        from ray.util.metrics import Counter, Gauge

        tags = {"run": run.name, "adapter": run.adapter, "base": run.base}

        def made(kind: Any, name: str, about: str) -> Any:
            metric = kind(name, description=about, tag_keys=tuple(tags))
            metric.set_default_tags(tags)
            return metric

        self._gauges = {key: made(Gauge, name, about) for key, (name, about) in _GAUGES.items()}
        self._step = made(Gauge, "corral_train_step", "optimizer steps done")
        self._tokens = made(Counter, "corral_train_tokens_total", "tokens trained by this worker's run")
        self._seen_tokens = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauges to the numbers of one step."""
        self._step.set(step)
        for key, gauge in self._gauges.items():
            if key in metrics:
                gauge.set(metrics[key])
        if (tokens := metrics.get("num_tokens", 0.0)) > self._seen_tokens:
            self._tokens.inc(tokens - self._seen_tokens)
            self._seen_tokens = tokens

    def close(self) -> None:
        """A gauge keeps its last value until the worker ends."""


_TRACKERS: dict[TrackerName, type[TensorBoard] | type[Mlflow] | type[Wandb]] = {
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "wandb": Wandb,
}


def _titled(name: str) -> str:
    """TensorBoard groups what is named GROUP/NAME."""
    return name if "/" in name else f"{'eval' if 'eval' in name else 'train'}/{name}"


def _plain(name: str) -> str:
    """MLflow takes letters, digits, `_-. :/`."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: str(value)[:500]}
    return flat
