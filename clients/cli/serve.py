"""`corral serve`, `corral demo` and `corral chat`."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8000"  # clients.api has it too, but importing that takes long for `--help`


def demo(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="stop everything at the end")] = False,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="default: what the serve YAML says")] = None,
) -> None:
    """Train, register, serve and ask: the whole main job on the embedded model."""
    from clients.demo import run_demo

    with _stopped_by_signal(code=1):  # before its end: not done
        run_demo(once=once, port=port, debug=context.obj)


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
    from clients.local_server import (
        format_urls,
        read_serve_config,
        serve_in_background,
        startup_warnings,
        wait_for_signal,
    )

    content = read_serve_config(config, port, tls=tls)
    for warning in startup_warnings(content):
        print(f"warning: {warning}", file=sys.stderr)
    with _stopped_by_signal(code=0), serve_in_background(content, debug=context.obj) as server:
        print(format_urls(server), flush=True)
        wait_for_signal()


def chat(
    prompt: Annotated[str | None, typer.Argument(help="without it: a conversation, or what is piped in")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="a model id; default: the server's base")] = None,
    url: Annotated[str, typer.Option(help="where the server is")] = DEFAULT_URL,
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


@contextlib.contextmanager
def _stopped_by_signal(code: int) -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, and exit with `code` after either."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ray's own SIGTERM handler exits
        print("stopped", file=sys.stderr)
        raise typer.Exit(code) from None
