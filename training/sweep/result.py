"""What came of a sweep's trials, read from their directories: ranked, and as plain values.

`training.sweep.run` makes it, `corral sweep` shows it. Imports neither torch nor Ray.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from training.registry.manifest import AdapterManifest
from training.runs.metrics_log import MetricsLog
from training.runs.run_dir import RunDir
from training.sweep.config import Trial, Value


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial.

    Attributes:
        status: `stopped` is by the scheduler, before its end.
        metrics: of a finished trial, as `training.trainer.train.TrainResult` has them.
        num_steps: optimizer steps that were taken.
        reason: why it failed.
    """

    number: int
    values: Mapping[str, Value]
    status: Literal["finished", "stopped", "failed"]
    metrics: Mapping[str, float]
    num_steps: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A sweep's trials, the best first, and what was registered of it."""

    name: str
    address: str  # of its run directory
    metric: str
    outcomes: list[Outcome]
    manifest: AdapterManifest | None = None
    refused: str | None = None  # why the best one is not registered

    @property
    def best(self) -> Outcome | None:
        """The finished trial with the best metric."""
        first = self.outcomes[0]
        return first if first.status == "finished" and math.isfinite(first.metrics.get(self.metric, math.nan)) else None


def trial_dir(sweep_dir: RunDir, number: int) -> RunDir:
    """Where a trial's files lie."""
    return RunDir(sweep_dir.parent, f"{sweep_dir.name}/trials/{number:03d}")


def is_done(run_dir: RunDir) -> bool:
    """Whether the trial in `run_dir` needs no other attempt."""
    return any(run_dir.read_json(file) for file in ("result.json", "failure.json"))


def read_outcome(trial: Trial, run_dir: RunDir, crash: str | None) -> Outcome:
    """What the trial's files say; `crash` is why its process ended, if it did."""
    result, failure = run_dir.read_json("result.json"), run_dir.read_json("failure.json")
    steps = (run_dir.read_text(MetricsLog.FILE) or "").splitlines()
    num_steps = int(json.loads(steps[-1])["step"]) if steps else 0
    if result:
        return Outcome(trial.number, trial.values, "finished", result["metrics"], num_steps, None)
    if failure or crash:
        return Outcome(trial.number, trial.values, "failed", {}, num_steps, failure["message"] if failure else crash)
    return Outcome(trial.number, trial.values, "stopped", {}, num_steps, None)


def ranked(outcomes: Sequence[Outcome], metric: str, mode: Literal["min", "max"]) -> list[Outcome]:
    """The best first: finished trials by metric, then stopped ones by how far they came, then failed ones."""
    sign = 1 if mode == "min" else -1
    return sorted(outcomes, key=lambda outcome: _rank(outcome, metric, sign))


def _rank(outcome: Outcome, metric: str, sign: int) -> tuple[int, float, int]:
    value = sign * outcome.metrics.get(metric, math.nan)
    if outcome.status == "finished":
        return (0, value, outcome.number) if math.isfinite(value) else (1, 0.0, outcome.number)
    return (2 if outcome.status == "stopped" else 3, -outcome.num_steps, outcome.number)


def as_json(result: SweepResult) -> dict[str, Any]:
    """The result as plain values; what `sweep.json` and `corral sweep --json` hold."""
    return {
        "name": result.name,
        "address": result.address,
        "metric": result.metric,
        "best": result.best.number if result.best else None,
        "registered": result.manifest.model_id if result.manifest else None,
        "refused": result.refused,
        "trials": [
            {
                "number": outcome.number,
                "values": dict(outcome.values),
                "status": outcome.status,
                "metrics": dict(outcome.metrics),
                "num_steps": outcome.num_steps,
                "reason": outcome.reason,
            }
            for outcome in result.outcomes
        ],
    }
