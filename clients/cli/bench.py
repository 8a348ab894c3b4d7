"""`corral bench`: benchmark any OpenAI-compatible server."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from clients.cli.serve import DEFAULT_URL


def bench(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help=f"any OpenAI-compatible server; default: {DEFAULT_URL}")
    ] = None,
    serve_config: Annotated[
        Path | None, typer.Option("--serve", metavar="CONFIG", help="start a Corral server for this run instead")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="repeatable, used in turn; default: the server's first")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="streams of one request at a time each; default: 1,8,32")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="R,R,...", help="Poisson arrivals instead, in conversations per second")
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="per level; default: 2 per stream, or 10 s of arrivals")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="per answer")] = 64,
    workload: Annotated[
        Literal["chat", "prompt-length", "shared-prefix"],
        typer.Option(help="everyday questions; prompts of given sizes; dialogs after a long system prompt"),
    ] = "chat",
    prompt_tokens: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="approximate, for prompt-length; default: 128,512,1024")
    ] = None,
    prefix_tokens: Annotated[
        int | None, typer.Option(min=1, help="approximate size of shared-prefix's system prompt; default: 1000")
    ] = None,
    num_prefixes: Annotated[
        int | None, typer.Option(min=1, help="different system prompts for shared-prefix; default: one per dialog")
    ] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="questions per dialog of shared-prefix; default: 2")] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos/--no-ignore-eos", help="answers of exactly --max-tokens, where supported"),
    ] = True,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="repeats prompts and arrivals, which a prefix cache may then hold")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=["CORRAL_API_KEY", "OPENAI_API_KEY"], show_default=False, help="sent to URL as a bearer token"
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="accept any certificate")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds per request")] = 600.0,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write all results; - is stdout, instead of the table")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw throughput and latencies")] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="earlier --json file to compare with; repeatable")
    ] = None,
    label: Annotated[str, typer.Option(help="name of this run in comparisons")] = "",
) -> None:
    """Benchmark a chat server: tokens per second, time to first token, time per output token."""
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
    shared_prefix = workload == "shared-prefix"
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
        prefix_tokens=prefix_tokens or (1000 if shared_prefix else None),
        num_prefixes=num_prefixes,
        turns=turns or (2 if shared_prefix else 1),
        temperature=temperature,
        ignore_eos=ignore_eos,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        label=label,
    )
    try:
        with contextlib.ExitStack() as stack:
            if content is not None:
                settings = replace(settings, url=stack.enter_context(serve_in_background(content)).url)
                api_key = stack.enter_context(temporary_key("corral bench"))
            server = ChatServer(settings.url, api_key, verify=not insecure, timeout_s=timeout)
            results = run_bench(replace(settings, url=server.url), server, Output(json, plot, tuple(compare or ())))
    except KeyboardInterrupt:
        sys.exit(130)
    if results.interrupted:
        sys.exit(130)
    results.raise_for_errors()
