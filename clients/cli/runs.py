"""`corral runs ...`: training runs from a terminal, by their directories or, with `--address`, as jobs of a cluster."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from clients.jobs.jobs import TrainingJob
    from training.runs.status import RunStatus

app = typer.Typer(help="List, inspect, follow and stop training runs.", no_args_is_help=True)

_POLL_S = 1.0
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 60

_Name = Annotated[str, typer.Argument(metavar="RUN", help="its name", show_default=False)]
_Address = Annotated[
    str | None, typer.Option("--address", metavar="ADDRESS", help="a Ray cluster's dashboard, or auto: jobs there")
]
_Storage = Annotated[
    str | None, typer.Option("--storage", metavar="PATH", help="any fsspec path; default: CORRAL_HOME/runs")
]
_Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command("list")
def list_(address: _Address = None, storage: _Storage = None, as_json: _Json = False) -> None:
    """Every run: what it does or how it ended."""
    if address:
        from clients.jobs.jobs import TrainingJobs

        jobs = TrainingJobs(address).all()
        _print_list(jobs, as_json, ("run", "job", "status", "adapter", "started", "took", "command"), _job_row)
    else:
        from training.runs.status import read_runs, runs_address

        runs = read_runs(runs_address(storage))
        _print_list(runs, as_json, ("run", "state", "adapter", "step", "loss", "started", "took"), _run_row)


@app.command()
def show(name: _Name, address: _Address = None, storage: _Storage = None, as_json: _Json = False) -> None:
    """One run: figures, the curve of its loss, its files, and the adapter version that it became."""
    if address:
        from clients.jobs.jobs import TrainingJobs

        job = TrainingJobs(address).find(name)
        print(json.dumps(asdict(job), indent=2) if as_json else _job_summary(job))
        return
    from training.registry.registry import AdapterRegistry
    from training.runs.status import read_metrics, read_run, run_files, runs_address

    run = read_run(runs_address(storage), name)
    # Of a sweep its best trial became a version.
    became = [m.model_id for m in AdapterRegistry().list() if f"{m.run_name}/".startswith(f"{name}/")]
    if as_json:
        print(json.dumps({**asdict(run), "registered_as": became}, indent=2))
    else:
        print(_run_summary(run, [step["loss"] for step in read_metrics(run)], run_files(run), became))


@app.command()
def stop(name: _Name, address: _Address = None, storage: _Storage = None) -> None:
    """End a run in order; its name resumes it from its last checkpoint."""
    if address:
        from clients.jobs.jobs import TrainingJobs

        jobs = TrainingJobs(address)
        job = jobs.find(name)
        print(f"job {job.submission_id} has ended already: {job.status}" if job.has_ended else _stopped(jobs.stop(job)))
        return
    from training.runs.status import read_run, runs_address, stop_run

    run = read_run(runs_address(storage), name)
    if run.state != "running":
        print(f"run {name} has ended already: {run.state}")
        return
    stop_run(run)
    print(f"run {name} is stopped: run_name={name} resumes it from its last checkpoint")


@app.command()
def logs(
    name: _Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the run ends")] = False,
    address: _Address = None,
    storage: _Storage = None,
) -> None:
    """A run's logged steps; with --address what its job printed."""
    if not address:
        from training.runs.status import runs_address

        _print_steps(runs_address(storage), name, follow)
        return
    from clients.jobs.jobs import TrainingJobs, wait_for

    jobs = TrainingJobs(address)
    job = jobs.find(name)
    if follow:
        wait_for(jobs, job)
    else:
        print(jobs.logs(job), end="")


def _print_steps(address: str, name: str, follow: bool) -> None:
    from training.runs.status import read_metrics, read_run

    last_step, last_phase = 0, ""
    while True:
        run = read_run(address, name)  # before its steps: nothing is logged after a run has ended
        steps = read_metrics(run)
        if not steps and run.phase != last_phase:  # a sweep's steps are its trials'
            last_phase = run.phase
            print(last_phase, flush=True)
        if steps and steps[-1]["step"] < last_step:  # resumed from an earlier checkpoint
            last_step = 0
        for step in steps:
            if step["step"] > last_step:
                print(_step_line(step), flush=True)
        last_step = steps[-1]["step"] if steps else 0
        if run.state != "running" or not follow:
            print(f"{run.state}" + (f": {run.failure}" if run.failure else ""))
            return
        time.sleep(_POLL_S)


def _step_line(step: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(step["time"]).strftime("%H:%M:%S")
    speed = f"  {step['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in step else ""
    return f"{when}  step {step['step']}/{step['num_steps']}  loss {step['loss']:.3f}{speed}"


def _print_list(
    items: "Sequence[RunStatus] | Sequence[TrainingJob]",
    as_json: bool,
    columns: Sequence[str],
    row: Callable[[Any], list[str]],
) -> None:
    if as_json:
        print(json.dumps([asdict(item) for item in items], indent=2))
        return
    if not items:
        print("no training run is there: start one with 'corral train configs/train/quickstart.yaml'")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for item in items:
        table.add_row(*row(item))
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=160)
    console.print(table)


def _run_row(run: "RunStatus") -> list[str]:
    step = f"{run.step}/{run.num_steps}" if run.step else run.phase
    loss = "-" if run.loss is None else f"{run.loss:.3f}"
    return [run.name, run.state, run.adapter, step, loss, _date(run.started), _took(run.started, run.ended)]


def _job_row(job: "TrainingJob") -> list[str]:
    took = _took(job.started, job.ended)
    return [job.run_name, job.submission_id, job.status, job.adapter, _date(job.started), took, job.entrypoint]


def _run_summary(run: "RunStatus", losses: Sequence[float], files: Sequence[str], became: Sequence[str]) -> str:
    metrics = run.metrics
    lines = [f"{run.name}: {run.state}" + (f", {run.phase}" if run.state == "running" else "")]
    if run.failure:
        lines.append(f"  because        {run.failure}")
    lines.append(f"  adapter        {run.adapter} on {run.base_model}")
    lines.append(f"  registered     {', '.join(became) or 'not yet'}")
    if run.started:
        lines.append(f"  started        {_date(run.started)}, took {_took(run.started, run.ended)}")
    if run.step:
        left = "" if run.eta_s is None or run.state != "running" else f", {_duration(run.eta_s)} left"
        lines.append(f"  step           {run.step}/{run.num_steps}{left}")
    if losses:
        lines.append(f"  loss           {losses[0]:.3f} {sparkline(losses)} {losses[-1]:.3f}")
    if "eval_loss" in metrics and "base_eval_loss" in metrics:
        base, adapter = metrics["base_eval_loss"], metrics["eval_loss"]
        lines.append(f"  held-out loss  base {base:.3f}, adapter {adapter:.3f} ({adapter / base:.0%})")
    if run.tokens_per_s:
        lines.append(f"  speed          {run.tokens_per_s:.0f} tokens/s")
    lines.append(f"  files          {run.directory}: {', '.join(files)}")
    if run.state in ("stopped", "interrupted", "failed") and "/" not in run.name:
        command = "sweep" if "search" in run.config else "train"
        lines.append(f"  resume it      corral {command} CONFIG run_name={run.name}")
    return "\n".join(lines)


def _job_summary(job: "TrainingJob") -> str:
    lines = [f"{job.run_name}: {job.status}"]
    if job.status == "FAILED":
        lines.append(f"  because   {' '.join(job.message.split())[-300:]}")
    lines.append(f"  job       {job.submission_id}")
    lines.append(f"  adapter   {job.adapter}")
    lines.append(f"  started   {_date(job.started)}, took {_took(job.started, job.ended)}")
    lines.append(f"  command   {job.entrypoint}")
    return "\n".join(lines)


def _stopped(job: "TrainingJob") -> str:
    return f"job {job.submission_id} is {job.status}: submit run {job.run_name} again to resume it"


def sparkline(values: Sequence[float], width: int = _SPARKLINE_WIDTH) -> str:
    """`values` as a line of up to `width` bars, each the mean of its share of them; NaN and infinity are left out."""
    finite = [value for value in values if abs(value) < float("inf")]
    num_bars = min(width, len(finite))
    edges = [round(index * len(finite) / num_bars) for index in range(num_bars + 1)] if finite else []
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


def _date(moment: float | None) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC" if moment else "-"


def _took(started: float | None, ended: float | None) -> str:
    return _duration((ended or time.time()) - started) if started else "-"


def _duration(seconds: float) -> str:
    hours, rest = divmod(max(0, round(seconds)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
