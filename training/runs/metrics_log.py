"""`metrics.jsonl` read back: what a run logged, step by step. The report and its pictures are made of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.runs.run_dir import MetricsLog, RunDir


@dataclass(frozen=True, slots=True)
class Metrics:
    """The logged steps, in order."""

    records: Sequence[Mapping[str, Any]]

    @property
    def steps(self) -> list[int]:
        """Which steps were logged."""
        return [int(record["step"]) for record in self.records]

    @property
    def times(self) -> list[float]:
        """When, in unix seconds."""
        return self.column("time")

    @property
    def num_steps(self) -> int:
        """How many steps the run was to have."""
        return int(self.records[-1]["num_steps"])

    def column(self, key: str) -> list[float]:
        """A figure of the steps that have it."""
        return [value for _, value in self.points(key)]

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, figure) of the steps that have it."""
        return [(int(record["step"]), float(record[key])) for record in self.records if key in record]


def read_metrics(run_dir: RunDir) -> Metrics:
    """What `metrics.jsonl` has; a line that a crash cut short is left out."""
    records = []
    for line in (run_dir.read_text(MetricsLog.FILE) or "").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return Metrics(records)
