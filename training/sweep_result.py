"""What came of a sweep's trials, read from their directories: ranked, as JSON and as a Markdown table.

`training.sweep` makes it, `corral sweep` shows it. Imports neither torch nor Ray.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.registry import AdapterManifest
from training.sweep_config import Trial, Value


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial.

    Attributes:
        status: `stopped` is by the scheduler, before its end.
        metrics: of a finished trial, as `training.sft.SftResult` has them.
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
    run_dir: Path
    metric: str
    outcomes: list[Outcome]
    manifest: AdapterManifest | None = None
    refused: str | None = None  # why the best one is not registered

    @property
    def best(self) -> Outcome | None:
        """The finished trial with the best metric."""
        first = self.outcomes[0]
        return first if first.status == "finished" and math.isfinite(first.metrics.get(self.metric, math.nan)) else None


def trial_dir(run_dir: Path, number: int) -> Path:
    """Where a trial's files lie."""
    return run_dir / "trials" / f"{number:03d}"


def is_done(directory: Path) -> bool:
    """Whether the trial in `directory` needs no other attempt."""
    return any((directory / name).exists() for name in ("result.json", "failure.json"))


def read_outcome(trial: Trial, run_dir: Path, crash: str | None) -> Outcome:
    """What the trial's files say; `crash` is why its process ended, if it did."""
    directory = trial_dir(run_dir, trial.number)

    def read(name: str) -> Any:
        return json.loads((directory / name).read_text()) if (directory / name).exists() else None

    result, failure = read("result.json"), read("failure.json")
    steps = (directory / "metrics.jsonl").read_text().splitlines() if (directory / "metrics.jsonl").exists() else []
    num_steps = int(json.loads(steps[-1])["step"]) if steps else 0
    if result:
        return Outcome(trial.number, trial.values, "finished", result["metrics"], num_steps, None)
    if failure or crash:
        reason = failure["message"] if failure else crash
        return Outcome(trial.number, trial.values, "failed", {}, num_steps, reason)
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
        "run_dir": str(result.run_dir),
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


def report(result: SweepResult) -> str:
    """`sweep.md`: the searched keys and a table of the trials, the best first."""
    keys = list(result.outcomes[0].values)
    header = ["trial", *keys, result.metric, "status", "steps"]
    lines = [f"# {result.name}", "", f"Searched {', '.join(keys)}; {len(result.outcomes)} trials.", ""]
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for outcome in result.outcomes:
        metric = outcome.metrics.get(result.metric)
        cells = [outcome.number, *(outcome.values[key] for key in keys), "" if metric is None else f"{metric:.4f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, outcome.status, outcome.num_steps]))} |")
    lines += [""] + [f"- trial {o.number} failed: {o.reason}" for o in result.outcomes if o.reason]
    registered = f"Registered: {result.manifest.model_id}" if result.manifest else f"Not registered: {result.refused}"
    return "\n".join([*lines, "", registered, ""])
