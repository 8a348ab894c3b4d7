"""`corral keys ...`: create, list and revoke API keys, on the machine that the server runs on."""

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from deployments.auth.keys import ApiKey

app = typer.Typer(help="API keys of this machine's server: create, list, revoke.", no_args_is_help=True)

_Scope = Literal["chat", "admin"]  # as in deployments.auth.caller, too slow to import for `--help`
_Json = Annotated[bool, typer.Option("--json", help="print JSON")]
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@app.command()
def create(
    name: Annotated[str, typer.Option(help="who or what will use it")],
    scope: Annotated[_Scope, typer.Option(help="what it may do; admin includes chat")] = "chat",
    rpm: Annotated[int | None, typer.Option(min=1, help="requests per minute; default: no limit")] = None,
    tpm: Annotated[
        int | None, typer.Option(min=1, help="tokens per minute, prompts and answers; default: no limit")
    ] = None,
    streams: Annotated[int | None, typer.Option(min=1, help="concurrent requests; default: no limit")] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="such as 90d, 12h or 2030-01-31 (UTC); default: never")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Create a key and print it once. From the first key on every request needs one, on running servers too."""
    from deployments.auth.caller import KeyLimits
    from deployments.auth.keys import KeyStore
    from training.errors import ConfigError

    expiry = None if expires is None else parse_expiry(expires)
    store = KeyStore()
    is_first = not store.required
    try:
        record, key = store.create(name, (scope,), KeyLimits(rpm=rpm, tpm=tpm, streams=streams), expiry)
    except ValueError:
        raise ConfigError(
            f"--name {name!r} is not a valid key name: use 1 to 64 letters, digits, spaces or any of . _ - @ +"
        ) from None
    print(json.dumps({"key": key, **_record(record)}, indent=2) if as_json else key)
    scopes = ", ".join(record.scopes)
    print(
        f"key {record.id} for {record.name!r}: {scopes}, {_limits(record)}, expires {_time(record.expires)}\n"
        f"It is not shown again: only its hash is stored, in {store.path}",
        file=sys.stderr,
    )
    if is_first:
        print("This is the first key: every request now needs one, and the chat page requires a login", file=sys.stderr)


@app.command("list")
def list_(as_json: _Json = False) -> None:
    """List all keys ever created, without their secrets."""
    from deployments.auth.keys import KeyStore

    keys = KeyStore().list()
    if as_json:
        print(json.dumps([_record(key) for key in keys], indent=2))
    elif not keys:
        print("no keys: anyone on this machine can use the server. Create one with 'corral keys create --name NAME'")
    else:
        _print_table(keys)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="as 'corral keys list' shows it", show_default=False)],
) -> None:
    """Revoke a key and end its chat page sessions; running servers apply it from the next request on."""
    from deployments.auth.keys import KeyStore

    store = KeyStore()
    key = store.revoke(key_id)
    print(f"key {key.id} of {key.name!r} is revoked")
    if store.num_valid == 0:
        print(
            f"no valid key is left, so every request is refused: create one, or remove {store.path} to allow everyone "
            "on this machine again",
            file=sys.stderr,
        )


def parse_expiry(text: str) -> datetime:
    """Parse a span from now such as `90d`, `12h`, `30m` or `2w`, or an ISO date or time (UTC).

    Raises:
        ConfigError: `text` is neither, or in the past.
    """
    from training.errors import ConfigError

    now = datetime.now(UTC).replace(microsecond=0)
    try:
        if span := re.fullmatch(r"(\d{1,6})([mhdw])", text):
            expiry = now + timedelta(**{_UNITS[span[2]]: int(span[1])})
        else:
            expiry = datetime.fromisoformat(text)
            expiry = expiry if expiry.tzinfo else expiry.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ConfigError(f"--expires {text!r} is not a valid time: use for example 90d, 12h or 2030-01-31") from None
    if expiry <= now:
        raise ConfigError(f"--expires {text!r} is in the past: use for example 90d, 12h or 2030-01-31")
    return expiry


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
    values = {"requests/min": limits.rpm, "tokens/min": limits.tpm, "at a time": limits.streams}
    return ", ".join(f"{number} {unit}" for unit, number in values.items() if number is not None) or "no limits"


def _time(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
