"""Reports of a sweep: its plan and its results as tables on the terminal, and the results as `sweep.md`.

Imports neither torch nor Ray.
"""

import json
import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from training.sweep.config import Trial, Value
from training.sweep.result import SweepResult, as_json


def print_plan(trials: Sequence[Trial], *, json_: bool) -> None:
    """Print the trials that a sweep will run."""
    if json_:
        print(json.dumps([{"number": trial.number, "values": dict(trial.values)} for trial in trials], indent=2))
    else:
        _print_table([(trial.number, trial.values, []) for trial in trials], [])


def print_result(result: SweepResult, *, json_: bool) -> None:
    """Print the trials, the best first, and what was registered."""
    if json_:
        print(json.dumps(as_json(result), indent=2))
        return
    rows = []
    for outcome in result.outcomes:
        metric = outcome.metrics.get(result.metric, math.nan)
        base = outcome.metrics.get(f"base_{result.metric}", math.nan)
        cells = ["" if math.isnan(value) else f"{value:.4f}" for value in (metric, base)]
        rows.append((outcome.number, outcome.values, [*cells, outcome.status, str(outcome.num_steps)]))
    _print_table(rows, [result.metric, f"base_{result.metric}", "status", "steps"])
    for outcome in result.outcomes:
        if outcome.reason:
            print(f"trial {outcome.number} failed: {outcome.reason}")
    if result.manifest:
        print(f"registered {result.manifest.model_id} from trial {result.outcomes[0].number}")
    else:
        print(f"nothing was registered: {result.refused}")
    print(f"sweep {result.address}")


def _print_table(rows: Sequence[tuple[int, Mapping[str, Value], Sequence[str]]], extra_columns: Sequence[str]) -> None:
    keys = list(rows[0][1])
    table = Table(box=None, pad_edge=False)
    for name in ("trial", *keys, *extra_columns):
        table.add_column(name, justify="right", overflow="fold")
    for number, values, extra_cells in rows:
        table.add_row(str(number), *(str(values[key]) for key in keys), *extra_cells)
    terminal = Console(highlight=False)
    (terminal if terminal.is_terminal else Console(highlight=False, width=160)).print(table)


def report(result: SweepResult) -> str:
    """The text of `sweep.md`: the searched keys and a table of the trials, the best first."""
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
