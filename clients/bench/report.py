"""Tables and plots of benchmark results: tables on stdout, a plot as PNG.

Takes runs as (name, results) pairs and shows them side by side, level by level. matplotlib is imported only for plots.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from clients.bench.results import Level, Percentiles, Results

Run = tuple[str, Results]
_WIDTH = 1000  # more than any table needs: a narrow terminal wraps lines, but no digit is lost
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
_DASHES: dict[str, Literal["-", "--", ":"]] = {"p50": "-", "p90": "--", "p99": ":"}


def print_tables(runs: Sequence[Run]) -> None:
    """Print the settings of each run, a row per level and, where there are several turns, a row per turn."""
    console = Console(width=_WIDTH, highlight=False, markup=False)
    for name, results in runs:
        settings = results.settings
        workload = f"{', '.join(settings.models)}, {settings.workload}, {settings.max_tokens} tokens"
        console.print(f"{name}: {settings.url}, {workload}, {results.started}")
    console.print(_level_table(runs))
    if any(len(level.turns) > 1 for _, results in runs for level in results.levels):
        console.print(_turn_table(runs))


def _level_table(runs: Sequence[Run]) -> Table:
    columns = (
        *("load", "run", "requests", "output\ntok/s", "\nreq/s", "prompt\ntok", "cached\ntok"),
        *("TTFT ms\np50", "\np90", "\np99", "TPOT ms\np50", "\np90", "\np99"),
        *("gap ms\np99", "latency\nms p50", "\np99"),
    )
    rows = []
    for name, level in _side_by_side(runs):
        failed = f", {level.errors} failed" if level.errors else ""
        stopped = ", stopped" if level.interrupted else ""
        rows.append(
            (
                *(str(level.load), name, f"{level.requests}{failed}{stopped}"),
                *(f"{level.output_tokens_per_s:.1f}", f"{level.requests_per_s:.2f}"),
                *(_tokens(level.prompt_tokens), _tokens(level.cached_tokens)),
                *(*_ms_cells(level.ttft_s), *_ms_cells(level.tpot_s)),
                *(_ms_cells(level.gap_s)[2], _ms_cells(level.latency_s)[0], _ms_cells(level.latency_s)[2]),
            )
        )
    return _table(columns, rows)


def _turn_table(runs: Sequence[Run]) -> Table:
    columns = (
        *("load", "run", "turn", "requests", "prompt\ntok", "cached\ntok"),
        *("TTFT ms\np50", "\np90", "\np99", "times\nfaster"),
    )
    rows = []
    for name, level in _side_by_side(runs):
        for turn in level.turns:
            first_ttft, ttft = level.turns[0].ttft_s, turn.ttft_s
            faster = f"{first_ttft.p50 / ttft.p50:.1f}" if first_ttft and ttft and turn.turn > 1 else ""
            counts = (str(turn.turn), str(turn.requests), _tokens(turn.prompt_tokens), _tokens(turn.cached_tokens))
            rows.append((str(level.load), name, *counts, *_ms_cells(ttft), faster))
    return _table(columns, rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of `rows`, without columns that are empty."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    column_indices = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    for index in column_indices:
        table.add_column(columns[index], justify="left" if columns[index] in ("load", "run") else "right")
    for row in rows:
        table.add_row(*(row[index] for index in column_indices))
    return table


def _side_by_side(runs: Sequence[Run]) -> Iterator[tuple[str, Level]]:
    """Levels of the same load next to each other, runs in the order given; a single run needs no name."""
    for load in dict.fromkeys(level.load for _, results in reversed(runs) for level in results.levels):
        for name, results in runs:
            yield from ((name if len(runs) > 1 else "", level) for level in results.levels if level.load == load)


def _tokens(mean: float | None) -> str:
    return "" if mean is None else f"{mean:.0f}"


def _ms_cells(seconds: Percentiles | None) -> tuple[str, str, str]:
    """p50, p90 and p99 in milliseconds, with about three digits."""

    def ms(value: float) -> str:
        return f"{value * 1e3:.{2 if value < 0.01 else 1 if value < 0.1 else 0}f}"

    return (ms(seconds.p50), ms(seconds.p90), ms(seconds.p99)) if seconds else ("", "", "")


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw throughput, TTFT and TPOT against streams, arrivals per second or prompt size, and write them as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(15, 5), layout="constrained")
    throughput, ttft, tpot = figure.subplots(1, 3)
    x_label, lines = _lines(runs)
    for color, (name, points) in zip(cycle(_COLORS), lines.items(), strict=False):
        points.sort(key=lambda point: point[0])
        xs = [x for x, _ in points]
        throughput.plot(xs, [level.output_tokens_per_s for _, level in points], "o-", color=color, label=name)
        for percentile, dashes in _DASHES.items():
            ttft.plot(xs, [_ms(level.ttft_s, percentile) for _, level in points], dashes, marker=".", color=color)
            tpot.plot(xs, [_ms(level.tpot_s, percentile) for _, level in points], dashes, marker=".", color=color)
    titles = ("output tokens/s", "time to first token, ms", "time per output token, ms")
    for axes, title in zip((throughput, ttft, tpot), titles, strict=True):
        axes.set(title=title, xlabel=x_label, ylim=(0, 1.1 * axes.get_ylim()[1]))
        axes.grid(alpha=0.3)
    throughput.legend()
    for axes in (ttft, tpot):
        axes.legend([Line2D([], [], linestyle=dashes, color="gray") for dashes in _DASHES.values()], list(_DASHES))
    figure.savefig(path, format="png", dpi=120)


def _ms(seconds: Percentiles | None, percentile: str) -> float:
    return 1e3 * float(getattr(seconds, percentile)) if seconds else math.nan


def _lines(runs: Sequence[Run]) -> tuple[str, dict[str, list[tuple[float, Level]]]]:
    """The label of the x axis, and the points of each line by its name, as pairs of x and level."""
    loads = {level.load for _, results in runs for level in results.levels}
    by_size = len({(load.concurrency, load.rate) for load in loads}) == 1 and all(load.prompt_tokens for load in loads)
    lines: dict[str, list[tuple[float, Level]]] = {}
    for name, results in runs:
        for level in results.levels:
            load = level.load
            x = load.prompt_tokens if by_size else load.concurrency or load.rate
            size = f", {load.prompt_tokens} tok" if load.prompt_tokens and not by_size else ""
            lines.setdefault(name + size, []).append((x or 0, level))
    units = [
        *(["streams"] if any(load.concurrency for load in loads) else []),
        *(["conversations per second"] if any(load.rate for load in loads) else []),
    ]
    return "prompt tokens" if by_size else " or ".join(units), lines
