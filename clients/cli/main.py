"""`corral`: the command line. Each command is a few lines around the module that does the work.

Exit codes are 0 ok, 1 failure, 2 usage; an error is one line on stderr, with a traceback only under `--debug`.
Nothing heavy is imported before the command that needs it runs.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer._click.exceptions import ClickException
from typer.core import TyperGroup

from clients.cli import adapters, certs, data, keys, runs

_DEFAULT_URL = "http://127.0.0.1:8000"  # clients.api has it too, but is not imported for `--help`


class _Corral(TyperGroup):
    """The group of all commands: takes `--debug` anywhere, and turns exceptions into one line and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        options = given[: given.index("--")] if "--" in given else given
        debug = "--debug" in options
        if debug:
            given = ["--debug", *(o for o in options if o != "--debug"), *given[len(options) :]]
        sys.exit(_run(lambda: super(_Corral, self).main(given, "corral", complete_var, False, **extra), debug))


def _run(command: Callable[[], Any], debug: bool) -> int:
    from training.errors import ConfigError, CorralError

    def fail(error: Exception, message: str, code: int) -> int:
        if debug:
            traceback.print_exception(error)
        return _fail(message, code)

    try:
        code = command()
    except ClickException as error:
        return _fail(error.format_message() or "no command given: see 'corral --help'", 2)
    except typer.Abort:
        return _fail("stopped", 1)
    except CorralError as error:
        usage = isinstance(error, ConfigError) or type(error).__name__ == "ServeConfigError"  # not imported for a name
        return fail(error, str(error), 2 if usage else 1)
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return fail(error, f"{what} (unexpected: run it again with --debug and report what it prints)", 1)
    if code == 130:  # what typer makes of Ctrl-C
        return _fail("stopped", 1)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


app = typer.Typer(
    cls=_Corral,
    help="Fine-tune Llama chat models with QLoRA, and serve every adapter from one 4-bit base.",
    epilog="--debug, anywhere on the line, shows tracebacks and Ray's own log.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(adapters.app, name="adapters")
app.add_typer(keys.app, name="keys")
app.add_typer(runs.app, name="runs")
app.add_typer(data.app, name="data")
app.add_typer(certs.app, name="certs")


@app.callback(invoke_without_command=True)
def _corral(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and Ray's own log")] = False,
) -> None:
    context.obj = debug
    if context.invoked_subcommand is None:
        context.get_help()  # typer prints it
        raise typer.Exit(2)


@app.command()
def demo(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="stop everything at the end")] = False,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="default: what the serve YAML says")] = None,
) -> None:
    """Train, register, serve and ask: the whole main job on the embedded model."""
    from clients.demo import run_demo

    with _stopped_by_signal(code=1):  # before its end: not done
        run_demo(once=once, port=port, debug=context.obj)


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


@app.command()
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


@app.command()
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


@app.command()
def serve(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="a serve YAML; default: configs/serve/quickstart.yaml")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="instead of the YAML's")] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="HTTPS, with the certificate of 'corral certs'; made if there is none")
    ] = False,
) -> None:
    """Serve a base and its adapters here until Ctrl-C."""
    from clients.local_server import read_serve_config, running, urls, wait_for_signal, warnings

    content = read_serve_config(config, port, tls=tls)
    for warning in warnings(content):
        print(f"warning: {warning}", file=sys.stderr)
    with _stopped_by_signal(code=0), running(content, debug=context.obj) as server:
        print(urls(server), flush=True)
        wait_for_signal()


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="without it: a conversation, or what is piped in")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="a model id; default: the server's base")] = None,
    url: Annotated[str, typer.Option(help="where the server is")] = _DEFAULT_URL,
    ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="CORRAL_CA", help="certificate to trust, of a 'corral serve --tls'"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="default: as many as fit")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed, the same answer")] = None,
) -> None:
    """Talk to a server: one question, or a conversation with /clear and /quit; CORRAL_API_KEY is its key."""
    from clients.api import CorralClient, Sampling
    from clients.cli.terminal_chat import TerminalChat

    sampling: Sampling = {}
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if temperature is not None:
        sampling["temperature"] = temperature
    if seed is not None:
        sampling["seed"] = seed
    with CorralClient(url, os.environ.get("CORRAL_API_KEY"), ca=ca) as client:
        conversation = TerminalChat(client, model or client.models()[0].id, system, sampling)
        if prompt is None and sys.stdin.isatty():
            conversation.loop()
        else:
            conversation.ask(sys.stdin.read() if prompt is None else prompt)


@app.command()
def bench(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help=f"any server that speaks OpenAI's API; default: {_DEFAULT_URL}")
    ] = None,
    serve_config: Annotated[
        Path | None, typer.Option("--serve", metavar="CONFIG", help="instead: start a server of Corral for this run")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="several take turns; default: the server's first")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="streams with one request at a time each; default: 1,8,32")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="R,R,...", help="instead: conversations that arrive per second, Poisson")
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="per level; default: 2 per stream, or 10 s of arrivals")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="of each answer")] = 64,
    workload: Annotated[
        Literal["chat", "prompt-length", "shared-prefix"],
        typer.Option(help="everyday questions; prompts of given sizes; dialogs that go on from a long system prompt"),
    ] = "chat",
    prompt_tokens: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="of prompt-length, roughly; default: 128,512,1024")
    ] = None,
    prefix_tokens: Annotated[
        int | None, typer.Option(min=1, help="system prompt of shared-prefix, roughly; default: 1000")
    ] = None,
    num_prefixes: Annotated[
        int | None, typer.Option(min=1, help="system prompts of shared-prefix; default: one per dialog")
    ] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="of a dialog of shared-prefix; default: 2")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="answers of --max-tokens, where the server can")
    ] = True,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="the same prompts and arrivals again; a prefix cache may know them")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=["CORRAL_API_KEY", "OPENAI_API_KEY"], show_default=False, help="sent as bearer token to URL"
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="take any certificate of an https server")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds that a request may take")] = 600.0,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write everything; - is stdout, instead of the table")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw throughput and latencies")] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="earlier --json to show beside; again for more")
    ] = None,
    label: Annotated[str, typer.Option(help="what to call this run beside others")] = "",
) -> None:
    """Put load on a chat server: tokens per second, time to first token, time per output token."""
    import secrets
    from dataclasses import replace

    from clients.bench.results import Settings, numbers
    from clients.bench.run import Output, run_bench
    from clients.bench.stream import ChatServer
    from clients.local_server import own_key, read_serve_config, running
    from training.errors import ConfigError

    if url and serve_config:
        raise ConfigError(f"{url} and --serve {serve_config}: give one of them")
    content = read_serve_config(serve_config) if serve_config else None
    several_turns = workload == "shared-prefix"
    settings = Settings(
        url=url or _DEFAULT_URL,
        models=tuple(models or ()),
        workload=workload,
        concurrency=numbers("--concurrency", concurrency or ("" if rate else "1,8,32"), int),
        rates=numbers("--rate", rate or "", float),
        num_requests=num_requests,
        max_tokens=max_tokens,
        prompt_tokens=numbers(
            "--prompt-tokens", prompt_tokens or ("128,512,1024" if workload == "prompt-length" else ""), int
        ),
        prefix_tokens=prefix_tokens or (1000 if several_turns else None),
        num_prefixes=num_prefixes,
        turns=turns or (2 if several_turns else 1),
        temperature=temperature,
        ignore_eos=ignore_eos,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        label=label,
    )
    try:
        with contextlib.ExitStack() as up:
            if content is not None:
                settings = replace(settings, url=up.enter_context(running(content)).url)
                api_key = up.enter_context(own_key("corral bench"))
            server = ChatServer(settings.url, api_key, verify=not insecure, timeout_s=timeout)
            results = run_bench(replace(settings, url=server.url), server, Output(json, plot, tuple(compare or ())))
    except KeyboardInterrupt:
        sys.exit(130)
    if results.interrupted:
        sys.exit(130)
    results.raise_for_errors()


@app.command()
def usage(
    since: Annotated[str, typer.Option(metavar="DAYS|DATE", help="days such as 7d, or from a date on, in UTC")] = "7d",
    by: Annotated[Literal["key", "model", "day"] | None, typer.Option(help="default: key and model")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Requests and tokens of each key and model, whether a server runs or not."""
    from clients.cli import usage

    print(usage.usage(since, by, as_json=as_json))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> int:
    """Check that this machine can train and serve, and say what to do where it cannot."""
    from clients.doctor.doctor import examine, report

    checks = examine()
    print(report(checks, as_json=as_json))
    return 1 if any(check.status == "broken" for check in checks) else 0


@contextlib.contextmanager
def _stopped_by_signal(code: int) -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, and exit with `code` after either."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ray's own SIGTERM handler exits
        print("stopped", file=sys.stderr)
        raise typer.Exit(code) from None


def main() -> None:
    """Entry point of `corral`."""
    app()
