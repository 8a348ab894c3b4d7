"""`corral keys ...`: who may use the server, from a terminal on the machine that it runs on."""

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from deployments.auth.keys import ApiKey

app = typer.Typer(help="API keys of the server here: create, list, revoke.", no_args_is_help=True)

_Scope = Literal["chat", "admin"]  # deployments.auth.caller', not imported for `--help`
_Json = Annotated[bool, typer.Option("--json", help="print JSON")]
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@app.command()
def create(
    name: Annotated[str, typer.Option(help="who or what will use it")],
    scope: Annotated[_Scope, typer.Option(help="what it may do; admin includes chat")] = "chat",
    rpm: Annotated[int | None, typer.Option(min=1, help="requests a minute; default: no limit")] = None,
    tpm: Annotated[
        int | None, typer.Option(min=1, help="tokens a minute, prompts and answers; default: no limit")
    ] = None,
    streams: Annotated[int | None, typer.Option(min=1, help="requests at the same time; default: no limit")] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="such as 90d, 12h or 2030-01-31 (UTC); default: never")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Make a key and print it, this once. From the first key on everybody needs one, also on a running server."""
    from deployments.auth.caller import KeyLimits
    from deployments.auth.keys import KeyStore
    from training.errors import ConfigError

    until = None if expires is None else parse_expiry(expires)
    store = KeyStore()
    is_first = not store.required
    try:
        made, key = store.create(name, (scope,), KeyLimits(rpm=rpm, tpm=tpm, streams=streams), until)
    except ValueError:
        raise ConfigError(
            f"--name {name!r} is no name of a key: take 1 to 64 letters, digits, spaces or any of . _ - @ +"
        ) from None
    print(json.dumps({"key": key, **_record(made)}, indent=2) if as_json else key)
    told = f"key {made.id} for {made.name!r}: {', '.join(made.scopes)}, {_limits(made)}, expires {_time(made.expires)}"
    print(f"{told}\nIt is not shown again: only its hash is kept, in {store.path}", file=sys.stderr)
    if is_first:
        print("It is the first key: from now on every request needs one, and the chat page a login", file=sys.stderr)


@app.command("list")
def list_(as_json: _Json = False) -> None:
    """Every key that was ever made, without its secret."""
    from deployments.auth.keys import KeyStore

    keys = KeyStore().list()
    if as_json:
        print(json.dumps([_record(key) for key in keys], indent=2))
    elif not keys:
        print("there are no keys, so everybody on this machine may use the server: 'corral keys create --name NAME'")
    else:
        _print_table(keys)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="as 'corral keys list' shows it", show_default=False)],
) -> None:
    """Accept a key no more, and end the sessions that it began; a running server does so with the next request."""
    from deployments.auth.keys import KeyStore

    store = KeyStore()
    key = store.revoke(key_id)
    print(f"key {key.id} of {key.name!r} is revoked")
    if store.num_valid == 0:
        print(
            f"no valid key is left, so nobody gets in: create one, or remove {store.path} to let everybody on this "
            "machine in again",
            file=sys.stderr,
        )


def parse_expiry(text: str) -> datetime:
    """The time that `90d`, `12h`, `30m`, `2w` from now or an ISO date or time (UTC) means.

    Raises:
        ConfigError: it is none of these, or has passed.
    """
    from training.errors import ConfigError

    now = datetime.now(UTC).replace(microsecond=0)
    try:
        if span := re.fullmatch(r"(\d{1,6})([mhdw])", text):
            until = now + timedelta(**{_UNITS[span[2]]: int(span[1])})
        else:
            until = datetime.fromisoformat(text)
            until = until if until.tzinfo else until.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ConfigError(f"--expires {text!r} is no time: write for example 90d, 12h or 2030-01-31") from None
    if until <= now:
        raise ConfigError(f"--expires {text!r} has passed: write for example 90d, 12h or 2030-01-31")
    return until


def _record(key: "ApiKey") -> dict[str, Any]:
    return {**key.model_dump(mode="json", exclude={"sha256"}), "status": key.status}


def _print_table(keys: "list[ApiKey]") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("id", "name", "scopes", "limits", "created", "expires", "status", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for key in keys:
        scopes = ", ".join(key.scopes)
        row = (key.id, key.name, scopes, _limits(key), _time(key.created), _time(key.expires), key.status)
        table.add_row(*map(Text, row))
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=160)
    console.print(table)


def _limits(key: "ApiKey") -> str:
    limits = key.limits
    words = {"requests/min": limits.rpm, "tokens/min": limits.tpm, "at a time": limits.streams}
    return ", ".join(f"{number} {word}" for word, number in words.items() if number is not None) or "no limits"


def _time(at: datetime | None) -> str:
    return "never" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
