"""`metrics.jsonl` read back: what a run logged, step by step. The report and its pictures are made of it."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.runs.run_dir import RunDir


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


class PhaseLog:
    """`phases.json` of a run: what it did in turn, each with when it began."""

    FILE = "phases.json"

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._begun: list[dict[str, Any]] = []

    def add(self, phase: str) -> None:
        """`phase` begins now."""
        self._begun.append({"phase": phase, "time": time.time()})
        self._run_dir.write_json(self.FILE, self._begun)


class MetricsLog:
    """`metrics.jsonl` of a run: a line per logged step. In an object store it is written anew every few seconds.

    Args:
        step: a resumed run takes the later steps again; their lines, and one that a crash cut short, are dropped.
    """

    FILE = "metrics.jsonl"

    def __init__(self, run_dir: RunDir, step: int) -> None:
        self._run_dir = run_dir
        kept = [line for line in (run_dir.read_text(self.FILE) or "").splitlines() if _step_of(line) <= step]
        self._text = "".join(line + "\n" for line in kept)
        run_dir.write_text(self.FILE, self._text)

    def add(self, record: Mapping[str, float]) -> None:
        """One step's figures."""
        line = json.dumps(record)
        if self._run_dir.is_local:
            self._run_dir.append(self.FILE, line)
        else:
            self._text += line + "\n"

    def flush(self) -> None:
        """Make sure that readers see every line."""
        if not self._run_dir.is_local:
            self._run_dir.write_text(self.FILE, self._text)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
