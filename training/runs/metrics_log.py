"""A run's logs: `metrics.jsonl`, a line per logged step, and `phases.json`. Written during a run, read at any time."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.runs.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Metrics:
    """The logged steps of a run, in order.

    Attributes:
        records: step, num_steps, time, loss, tokens_per_s and more for each step.
    """

    records: Sequence[Mapping[str, Any]]

    @property
    def steps(self) -> list[int]:
        """The numbers of the logged steps."""
        return [int(record["step"]) for record in self.records]

    @property
    def times(self) -> list[float]:
        """When each step was logged, in Unix seconds."""
        return self.column("time")

    @property
    def num_steps(self) -> int:
        """The planned number of steps."""
        return int(self.records[-1]["num_steps"])

    def column(self, key: str) -> list[float]:
        """The values of `key`, for the steps that have it."""
        return [value for _, value in self.points(key)]

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) pairs of `key`, for the steps that have it."""
        return [(int(record["step"]), float(record[key])) for record in self.records if key in record]


def read_metrics(run_dir: RunDir) -> Metrics:
    """Read `metrics.jsonl`; an incomplete line is left out."""
    records = []
    for line in (run_dir.read_text(MetricsLog.FILE) or "").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return Metrics(records)


class PhaseLog:
    """`phases.json` of a run: its phases in order, each with its start time."""

    FILE = "phases.json"

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._phases: list[dict[str, Any]] = []

    def add(self, phase: str) -> None:
        """Record that `phase` starts now."""
        self._phases.append({"phase": phase, "time": time.time()})
        self._run_dir.write_json(self.FILE, self._phases)


class MetricsLog:
    """Writes `metrics.jsonl`, a line per logged step. In an object store, `flush` rewrites the complete file.

    Args:
        step: the step that the run resumes from. Lines of later steps, which will be logged again, are dropped, and
            so is an incomplete line.
    """

    FILE = "metrics.jsonl"

    def __init__(self, run_dir: RunDir, step: int) -> None:
        self._run_dir = run_dir
        kept = [line for line in (run_dir.read_text(self.FILE) or "").splitlines() if _step_of(line) <= step]
        self._text = "".join(line + "\n" for line in kept)
        run_dir.write_text(self.FILE, self._text)

    def add(self, record: Mapping[str, float]) -> None:
        """Add one step's metrics."""
        line = json.dumps(record)
        if self._run_dir.is_local:
            self._run_dir.append(self.FILE, line)
        else:
            self._text += line + "\n"

    def flush(self) -> None:
        """Make every line visible to readers."""
        if not self._run_dir.is_local:
            self._run_dir.write_text(self.FILE, self._text)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
