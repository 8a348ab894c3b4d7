"""`corral usage`: who asked how much of which model, read from the ledger's file; no server needs to run."""

import json
import re
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training.errors import ConfigError

if TYPE_CHECKING:
    from deployments.accounting.usage import UsageRow


def usage(
    since: Annotated[str, typer.Option(metavar="DAYS|DATE", help="days such as 7d, or from a date on, in UTC")] = "7d",
    by: Annotated[Literal["key", "model", "day"] | None, typer.Option(help="default: key and model")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Requests and tokens of each key and model, whether a server runs or not."""
    from deployments.accounting.usage import read_usage, usage_path

    first_day = _first_day(since)
    rows = read_usage(usage_path(), first_day, by)
    if as_json:
        print(json.dumps([{k: v for k, v in asdict(row).items() if v is not None} for row in rows], indent=2))
    elif not rows:
        print(f"no requests since {first_day} (UTC) in {usage_path()}")
    else:
        print(_table(rows, first_day))


def _first_day(since: str) -> date:
    """`7d` is today and the six days before, in UTC."""
    if (days := re.fullmatch(r"([1-9]\d{0,4})d", since)) is not None:
        return datetime.now(UTC).date() - timedelta(days=int(days[1]) - 1)
    try:
        return date.fromisoformat(since)
    except ValueError:
        raise ConfigError(f"--since {since}: give days, such as 7d, or a date, such as 2026-01-31") from None


def _table(rows: "list[UsageRow]", first_day: date) -> str:
    from rich.console import Console
    from rich.table import Table

    labels = [name for name in ("day", "key", "model") if getattr(rows[0], name) is not None]
    numbers = ("requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens")
    table = Table(title=f"since {first_day} (UTC)", title_justify="left", box=None, pad_edge=False)
    for label in labels:
        table.add_column(label, overflow="fold")
    for number in numbers:
        table.add_column(number.replace("_tokens", " tokens"), justify="right")
    for row in rows:
        figures = (f"{getattr(row, number):,}" for number in numbers)
        table.add_row(*(getattr(row, label) for label in labels), *figures)
    terminal = Console(highlight=False)
    console = terminal if terminal.is_terminal else Console(highlight=False, width=120)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")
