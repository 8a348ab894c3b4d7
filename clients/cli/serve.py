"""`corral serve`, `corral demo` and `corral chat`."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_URL = "http://127.0.0.1:8000"  # as in clients.api, too slow to import for `--help`


def demo(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="stop the server at the end")] = False,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="default: the serve YAML's")] = None,
) -> None:
    """Train an adapter of the embedded model, register it, serve it and query it; keeps serving until Ctrl-C."""
    from clients.demo import run_demo

    with _exit_on_signal(code=1):  # interrupted before the demo was complete
        run_demo(once=once, port=port, debug=context.obj)


def serve(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="a serve YAML; default: configs/serve/quickstart.yaml")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="overrides the YAML's")] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="serve HTTPS with the certificate of 'corral certs', created if missing")
    ] = False,
) -> None:
    """Serve a base and its adapters on this machine until Ctrl-C."""
    from clients.local_server import (
        RUNNING_NOTICE,
        format_urls,
        read_serve_config,
        serve_in_background,
        startup_warnings,
        wait_for_signal,
    )

    content = read_serve_config(config, port, tls=tls)
    for warning in startup_warnings(content):
        print(f"warning: {warning}", file=sys.stderr)
    with _exit_on_signal(code=0), serve_in_background(content, debug=context.obj) as server:
        print(f"{format_urls(server)}\n{RUNNING_NOTICE}", flush=True)
        wait_for_signal()


def chat(
    prompt: Annotated[str | None, typer.Argument(help="default: what is piped in, else a conversation")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="a model id; default: the server's base")] = None,
    url: Annotated[str, typer.Option(help="the server's address")] = DEFAULT_URL,
    ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="CORRAL_CA", help="certificate to trust, such as the server's own"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="default: as many as fit")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    seed: Annotated[int | None, typer.Option(help="makes sampling reproducible")] = None,
    tools: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON list of tools as OpenAI's API takes them; you type their results"),
    ] = None,
) -> None:
    """Chat with a server: one question, or a conversation with /clear and /quit. CORRAL_API_KEY is sent as its key."""
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
        conversation = TerminalChat(client, model or client.models()[0].id, system, sampling, _read_tools(tools))
        if prompt is None and sys.stdin.isatty():
            conversation.loop()
        else:
            conversation.ask(sys.stdin.read() if prompt is None else prompt)


def _read_tools(path: Path | None) -> list[dict[str, Any]]:
    import json

    from training.errors import ConfigError

    if path is None:
        return []
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tools {str(path)!r} cannot be read: {error}") from error
    if not isinstance(tools, list):
        raise ConfigError(f'--tools {str(path)!r}: expected a list such as [{{"type": "function", "function": ...}}]')
    return tools


@contextlib.contextmanager
def _exit_on_signal(code: int) -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, and exit with `code` after either."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ray's own SIGTERM handler exits
        print("stopped", file=sys.stderr)
        raise typer.Exit(code) from None
