"""`corral train` and `corral sweep`, here or as a job of a Ray cluster."""

from pathlib import Path
from typing import Annotated

import typer

_Submit = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="as a job of the Ray cluster with that dashboard: http://HOST:8265, or auto"),
]
_SubmissionId = Annotated[
    str | None, typer.Option(metavar="ID", help="with --submit: the job's, and the run's; the same is one run")
]
_Env = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY[=VALUE]", help="with --submit: a variable for the job; again for more"),
]
_Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="with --submit: show the job's output")]


def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="such as configs/train/quickstart.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="such as lora.r=8 learning_rate=1e-4")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print configuration, rows, steps and memory, and stop")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print --dry-run as JSON")] = False,
    force: Annotated[bool, typer.Option("--force", help="register even if the held-out loss is no better")] = False,
    submit: _Submit = None,
    submission_id: _SubmissionId = None,
    env: _Env = None,
    wait: _Wait = True,
) -> None:
    """Train an adapter and register it, here or with --submit on a Ray cluster."""
    from training.errors import ConfigError
    from training.sweep.config import SweepConfig, load_run_config

    settings = load_run_config(config, overrides or [])
    if isinstance(settings, SweepConfig):
        raise ConfigError(f"{config} has search, it describes a sweep: 'corral sweep {config}' runs it")
    if dry_run:
        from training.planning import plan

        print(plan.dry_run(settings, as_json=as_json))
        return
    if _submitted(submit, config, overrides, submission_id=submission_id, env=env, force=force, wait=wait):
        return
    from training.__main__ import run_training

    run_training(settings, force=force, debug=context.obj)


def sweep(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="such as configs/sweep/quickstart.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="such as sweep.num_samples=8 max_steps=50")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the trials and stop")] = False,
    force: Annotated[bool, typer.Option("--force", help="register even if the held-out loss is no better")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    submit: _Submit = None,
    submission_id: _SubmissionId = None,
    env: _Env = None,
    wait: _Wait = True,
) -> int:
    """Train once for each point of a search, and register the best, here or with --submit on a Ray cluster."""
    from training.errors import ConfigError
    from training.sweep.config import load_sweep, plan
    from training.sweep.report import print_plan

    settings = load_sweep(config, overrides or [])
    if dry_run:
        print_plan(plan(settings), json_=as_json)
        return 0
    if submit and as_json:
        raise ConfigError("--json is not for a job: sweep.json in the sweep's directory has the same")
    if _submitted(submit, config, overrides, submission_id=submission_id, env=env, force=force, wait=wait):
        return 0
    from training.__main__ import run_search

    return run_search(settings, force=force, as_json=as_json, debug=context.obj)


def _submitted(
    submit: str | None,
    config: Path,
    overrides: list[str] | None,
    *,
    submission_id: str | None,
    env: list[str] | None,
    force: bool,
    wait: bool,
) -> bool:
    """Send it as a job, if it is to be one."""
    from training.errors import ConfigError

    if submit:
        from clients.jobs.jobs import submit_training

        submit_training(
            submit, config, overrides or [], submission_id=submission_id, env=env or [], force=force, wait=wait
        )
    elif submission_id or env or not wait:
        raise ConfigError("--submission-id, --env and --no-wait are for a job: add --submit http://HOST:8265")
    return bool(submit)
