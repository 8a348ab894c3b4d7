"""`corral bench`: load on any OpenAI-compatible server."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from clients.cli.serve import DEFAULT_URL


def bench(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help=f"any server that speaks OpenAI's API; default: {DEFAULT_URL}")
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
    from clients.local_server import read_serve_config, serve_in_background, temporary_key
    from training.errors import ConfigError

    if url and serve_config:
        raise ConfigError(f"{url} and --serve {serve_config}: give one of them")
    content = read_serve_config(serve_config) if serve_config else None
    several_turns = workload == "shared-prefix"
    settings = Settings(
        url=url or DEFAULT_URL,
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
                settings = replace(settings, url=up.enter_context(serve_in_background(content)).url)
                api_key = up.enter_context(temporary_key("corral bench"))
            server = ChatServer(settings.url, api_key, verify=not insecure, timeout_s=timeout)
            results = run_bench(replace(settings, url=server.url), server, Output(json, plot, tuple(compare or ())))
    except KeyboardInterrupt:
        sys.exit(130)
    if results.interrupted:
        sys.exit(130)
    results.raise_for_errors()
