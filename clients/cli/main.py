"""`corral`: the command line. Each command is a few lines around the module that does the work.

Exit codes are 0 ok, 1 failure, 2 usage; an error is one line on stderr, with a traceback only under `--debug`.
Nothing heavy is imported before the command that needs it runs.
"""

import contextlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer._click.exceptions import ClickException
from typer.core import TyperGroup

from clients.cli import adapters, bench, certs, data, keys, runs, serve, train, usage


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


app.command()(serve.demo)
app.command()(train.train)
app.command()(train.sweep)
app.command()(serve.serve)
app.command()(serve.chat)
app.command()(bench.bench)
app.command()(usage.usage)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> int:
    """Check that this machine can train and serve, and say what to do where it cannot."""
    from clients.doctor.check import report
    from clients.doctor.doctor import run_checks

    checks = run_checks()
    print(report(checks, as_json=as_json))
    return 1 if any(check.status == "error" for check in checks) else 0


def main() -> None:
    """Entry point of `corral`."""
    app()
