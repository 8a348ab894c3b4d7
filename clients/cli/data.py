"""`corral data ...`: a dataset from a terminal, before anything is trained on it."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from training.config.train_config import TrainConfig
    from training.data.report import DataReport, RowNote, Segment

app = typer.Typer(help="Look at a dataset before training on it.", no_args_is_help=True)

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
_SHOWN_NOTES = 5
_SHOWN_TURNS = 8
_SHOWN_CHARS = 600  # of a row
_BAR_WIDTH = 40
_BAR_PARTS = " ▏▎▍▌▋▊▉█"
_STYLES = {"context": "dim", "trained": "bold green", "rejected": "red"}
_MARKS = {"context": ("", ""), "trained": ("«", "»"), "rejected": ("[-", "-]")}  # where there are no colours

_Method = Literal["sft", "dpo", "kto"]


@app.callback()
def _data() -> None:
    """Keeps `check` a command of its own while it is the only one."""


@app.command()
def check(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE ...] [KEY=VALUE ...]",
            help="files, folders, globs or hub ids; and settings such as data.columns='{prompt: question}'",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="CONFIG", help="a training YAML: its data, base and max_length")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="M", help="whose tokens; default: the embedded")] = None,
    chat_format: Annotated[str | None, typer.Option(help="auto, llama-2, llama-3 or chatml")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="tokens that a row may have; default: 1024")] = None,
    method: Annotated[_Method | None, typer.Option(help="which rows are wanted: sft, dpo or kto; default: sft")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What a training run would see: formats, lengths, bad rows, duplicates, the split, and what is trained."""
    given = what or []
    files = [text for text in given if Path(text).exists() or not _OVERRIDE.fullmatch(text)]
    overrides = [text for text in given if text not in files]
    named = {"base_model": base, "chat_format": chat_format, "max_length": max_length, "method": method}
    overrides += [f"{key}={value}" for key, value in named.items() if value is not None]
    report = _examine(_settings(config, files, overrides))
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        _print(report)


def _settings(path: Path | None, files: Sequence[str], overrides: Sequence[str]) -> "TrainConfig":
    from training.config.load import build_config, read_yaml
    from training.errors import ConfigError

    values: dict[str, Any] = read_yaml(path) if path else {"adapter": "unnamed", "data": {}}
    if files:
        values["data"] = {**(values.get("data") or {}), "path": [*files]}
    elif path is None and not any(override.startswith("data.path=") for override in overrides):
        raise ConfigError("no data is named: give files, folders, globs or hub ids, or --config with a training YAML")
    return build_config(values, overrides, str(path or "command line"))


def _examine(config: "TrainConfig") -> "DataReport":
    """Everything that is wrong is counted, nothing refused."""
    from training.data.run_inputs import read_data

    too_long = "truncate" if config.data.on_too_long == "truncate" else "skip"
    lenient = config.data.model_copy(update={"on_bad_row": "skip", "on_too_long": too_long})
    return read_data(config.model_copy(update={"data": lenient})).report


def _print(report: "DataReport") -> None:
    from rich.console import Console
    from rich.text import Text

    terminal = Console(highlight=False)
    console = terminal if terminal.is_terminal else Console(highlight=False, width=120)
    _columns(console, _facts(report))
    if len(report.sources) > 1:
        console.print("\n[bold]Sources[/bold]", _sources(report))
    console.print("\n[bold]Tokens per row[/bold]")
    _columns(console, _histogram(report))
    for title, notes, count in (
        ("Rows that cannot be used", report.skipped, report.num_skipped),
        ("Rows that are too long", report.too_long, report.num_too_long),
        ("Rows that are shortened", report.truncated, report.num_truncated),
        ("Duplicates" + ("" if report.deduplicated else ", kept"), report.duplicates, report.num_duplicates),
    ):
        if count:
            console.print(f"\n[bold]{title}: {count:,}[/bold]")
            _print_notes(console, notes, count)
    console.print(f"\n[bold]{_legend(report, console)}[/bold]")
    for row in report.samples:
        console.print(_coloured(row, console), Text(), soft_wrap=True, sep="\n")
    for warning in report.warnings:
        console.print(f"note: {warning}", style="yellow", soft_wrap=True, markup=False)


def _columns(console: "Console", rows: Sequence[tuple[str, str]]) -> None:
    """Two columns, the first aligned to the right; nothing is wrapped or padded, so that it can be copied."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"{name:>{width}}  {value}".rstrip(), soft_wrap=True, markup=False)


def _facts(report: "DataReport") -> list[tuple[str, str]]:
    unusable = report.num_skipped + report.num_too_long
    left_out = report.num_duplicates if report.deduplicated else 0
    leaked = f", {report.num_leaked:,} left out of training because they are held out" if report.num_leaked else ""
    facts = [
        ("format", _counts(report.formats)),
        ("rows", f"{report.num_rows_read:,} read, {unusable:,} cannot be used, {left_out:,} duplicates left out"),
        ("split", f"{report.num_train_rows:,} for training, {report.num_held_out:,} held out{leaked}"),
        ("turns", ", ".join(f"{n} ({count:,} rows)" for n, count in [*report.turns.items()][:_SHOWN_TURNS])),
        ("roles", _counts(report.roles)),
        ("not used", report.unused),
        ("tokens", f"{report.num_train_tokens:,} an epoch, {report.trained_share:.0%} of them trained"),
        ("in pieces", f"{report.num_split:,} texts are longer than max_length" if report.num_split else ""),
        ("rendered for", f"{report.base}, chat format {report.chat_format}, max_length {report.max_length}"),
    ]
    return [(name, value) for name, value in facts if value]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())


def _sources(report: "DataReport") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("source")
    for column in ("weight", "rows read", "duplicates", "training rows", "share", "held out"):
        table.add_column(column, justify="right")
    for source in report.sources:
        table.add_row(
            source.path,
            f"{source.weight:g}",
            f"{source.num_rows_read:,}",
            f"{source.num_duplicates:,}",
            f"{source.num_train_rows:,}",
            f"{source.num_train_rows / report.num_train_rows:.0%}",
            f"{source.num_held_out:,}",
        )
    return table


def _histogram(report: "DataReport") -> list[tuple[str, str]]:
    lengths = report.lengths
    highest = max(count for _, count in lengths.histogram)
    rows = []
    below = 0
    for bound, count in lengths.histogram:
        over = " too long" if count and below >= report.max_length else ""
        rows.append((f"{below + 1:,}-{bound:,}", f"{_bar(count / highest)} {count:,}{over}".lstrip()))
        below = bound
    left_out = ", ".join(f"{n:,} ({count:,} rows)" for n, count in lengths.longer_than.items())
    return [
        *rows,
        ("", f"mean {lengths.mean:.0f}, p50 {lengths.p50:,}, p95 {lengths.p95:,}, max {lengths.max:,}"),
        ("", f"a max_length leaves out: {left_out}"),
    ]


def _bar(share: float) -> str:
    eighths = max(round(share * _BAR_WIDTH * 8), 1 if share else 0)
    whole, part = divmod(eighths, 8)
    return "█" * whole + (_BAR_PARTS[part] if part else "")


def _print_notes(console: "Console", notes: Sequence["RowNote"], count: int) -> None:
    for note in notes[:_SHOWN_NOTES]:
        text = f"  {note.source} {note.reason}\n    it starts with {note.excerpt!r}"
        console.print(text, soft_wrap=True, markup=False)
    if count > _SHOWN_NOTES:
        console.print(f"  and {count - _SHOWN_NOTES:,} more; --json names the first thousand")


def _legend(report: "DataReport", console: "Console") -> str:
    if _has_colours(console):
        return "As the model sees them, the trained tokens in [green]green[/green]"
    kinds = {segment.use for row in report.samples for segment in row}
    rejected = ", rejected answers in [--]" if "rejected" in kinds else ""
    return f"As the model sees them, the trained tokens in «»{rejected}"


def _coloured(row: Sequence["Segment"], console: "Console") -> "Text":
    from rich.text import Text

    text = Text()
    for use, part in _shortened(row):
        before, after = ("", "") if _has_colours(console) else _MARKS[use]
        text.append(f"{before}{part}{after}", style=_STYLES[use])
    text.rstrip()
    return text


def _shortened(row: Sequence["Segment"]) -> Iterator[tuple[str, str]]:
    """At most so many characters of every segment that the row fits onto a screen."""
    room = max(80, _SHOWN_CHARS // len(row))
    for segment in row:
        half = room // 2
        whole = len(segment.text) <= room
        yield segment.use, segment.text if whole else f"{segment.text[:half]} [...] {segment.text[-half:]}"


def _has_colours(console: "Console") -> bool:
    return console.color_system is not None
