"""`corral sweep`: a search over training configurations from a terminal. The work is `training.sweep`'s."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from training.sweep_config import Value
    from training.sweep_result import SweepResult


def run(config: Path, overrides: Sequence[str], *, dry_run: bool, force: bool, as_json: bool, debug: bool) -> int:
    """Run the sweep of a YAML and print its trials, the best first; returns the exit code, 1 if nothing was registered.

    Raises:
        CorralError: the configuration, data or machine does not fit.
    """
    from training.sweep_config import load_sweep, plan

    settings = load_sweep(config, overrides)
    if dry_run:
        trials = plan(settings)
        if as_json:
            print(json.dumps([{"number": trial.number, "values": dict(trial.values)} for trial in trials], indent=2))
        else:
            _print_table(list(settings.search), [(trial.number, trial.values, []) for trial in trials], [])
        return 0
    from training.sweep import run_sweep
    from training.sweep_result import as_json as plain

    result = run_sweep(settings, force=force, debug=debug)
    if as_json:
        print(json.dumps(plain(result), indent=2))
    else:
        _print(result)
    return 0 if result.manifest else 1


def _print(result: "SweepResult") -> None:
    keys = list(result.outcomes[0].values)
    rows = []
    for outcome in result.outcomes:
        metric = outcome.metrics.get(result.metric, math.nan)
        base = outcome.metrics.get(f"base_{result.metric}", math.nan)
        figures = ["" if math.isnan(value) else f"{value:.4f}" for value in (metric, base)]
        rows.append((outcome.number, outcome.values, [*figures, outcome.status, str(outcome.num_steps)]))
    _print_table(keys, rows, [result.metric, f"base_{result.metric}", "status", "steps"])
    for outcome in result.outcomes:
        if outcome.reason:
            print(f"trial {outcome.number} failed: {outcome.reason}")
    if result.manifest:
        print(f"{result.manifest.model_id} is registered, of trial {result.outcomes[0].number}")
    else:
        print(f"nothing is registered: {result.refused}")
    print(f"sweep {result.address}")


def _print_table(
    keys: Sequence[str], rows: Sequence[tuple[int, Mapping[str, "Value"], Sequence[str]]], more: Sequence[str]
) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("trial", *keys, *more):
        table.add_column(name, justify="right", overflow="fold")
    for number, values, figures in rows:
        table.add_row(str(number), *(str(values[key]) for key in keys), *figures)
    Console(highlight=False).print(table)
