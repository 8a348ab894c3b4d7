"""`corral bench`: puts load on any chat server that speaks OpenAI's API, and measures it from the client's side.

Runs the levels one after another, each after its warm-up: a closed loop (so many streams, each with one request at a
time) or an open one (arrivals at a rate, whatever is still running). The server need not be Corral.
"""

import asyncio
import contextlib
import importlib.util
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from clients.bench.report import plot, print_tables
from clients.bench.results import Level, Load, Request, Results, Settings, read_results, summarize
from clients.bench.stream import Answer, ChatServer, RequestFailed
from clients.bench.workloads import Conversation, arrivals, conversations, loads, warm_up
from training.errors import ConfigError

_BUSY_CLIENT = 0.8  # cores
_TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go, but for the table: a JSON file (`-`: stdout, and no table), a PNG; and what to show beside."""

    json: Path | None = None
    plot: Path | None = None
    compare: tuple[Path, ...] = ()


def run_bench(settings: Settings, server: ChatServer, output: Output) -> Results:
    """Measure, show, and write; Ctrl-C ends the measuring only. No models in `settings` means the server's first.

    Raises:
        ConfigError: an output that cannot be written, or a file to compare with that cannot be read.
        RequestFailed: there is no such server, or it refuses the first request.
    """
    earlier = [(path.stem, read_results(path)) for path in output.compare]
    _check(output)
    results = asyncio.run(_measure(settings, server))
    for note in results.notes:
        print(f"note: {note}", file=sys.stderr)
    runs = [(run.settings.label or name, run) for name, run in [*earlier, ("this run", results)]]
    if output.json == Path("-"):
        print(results.as_json(), end="")
    elif results.levels:
        print_tables(runs)
    if output.json and output.json != Path("-"):
        output.json.write_text(results.as_json(), encoding="utf-8")
    if output.plot and results.levels:
        plot(runs, output.plot)
    return results


def _check(output: Output) -> None:
    """What would otherwise fail after all is measured."""
    for path in filter(None, (output.json, output.plot)):
        folder = path.absolute().parent
        if path != Path("-") and (not folder.is_dir() or path.is_dir()):
            raise ConfigError(f"{path} is no file that can be written: name one in a folder that exists")
    if output.plot and output.plot.suffix != ".png":
        raise ConfigError(f"--plot writes PNG, not {output.plot.name!r}: give a name that ends in .png")
    if output.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'matplotlib>=3.11,<3.12'")


async def _measure(settings: Settings, server: ChatServer) -> Results:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    levels: list[Level] = []
    notes: list[str] = []
    interrupted = False
    try:
        if not settings.models:
            settings = replace(settings, models=((await server.models())[0],))
        if not await _probe(settings, server):
            settings = replace(settings, ignore_eos=False)
            notes.append("the server refuses ignore_eos: answers may end before --max-tokens")
        for load in loads(settings):
            level = await _LevelRun(settings, load, server).run()
            levels += [level] if level else []
            if interrupted := level is None or level.interrupted:
                break
    except asyncio.CancelledError:
        interrupted = True
    finally:
        server.close()
    return Results(settings, started, tuple(levels), (*notes, *_notes(settings, levels)), interrupted)


async def _probe(settings: Settings, server: ChatServer) -> bool:
    """Ask each model for a few tokens, so that a wrong name shows at once and every adapter is loaded.

    Returns: False if the server answers only without `ignore_eos`, an extension of vLLM's.
    """

    async def takes_ignore_eos(model: str) -> bool:
        body = _body(settings, model, [{"role": "user", "content": "Say hello."}], settings.seed)
        body["max_tokens"] = min(settings.max_tokens, 16)
        try:
            await server.answer(body)
        except RequestFailed as error:
            if settings.ignore_eos and error.status in (400, 422):
                del body["ignore_eos"]
                await server.answer(body)
                return False
            if error.status is None or (400 <= error.status < 500 and error.status != 429):
                raise
        return True

    return all(await asyncio.gather(*map(takes_ignore_eos, dict.fromkeys(settings.models))))


class _LevelRun:
    """One level, while it runs."""

    def __init__(self, settings: Settings, load: Load, server: ChatServer) -> None:
        self._settings = settings
        self._load = load
        self._server = server
        self._conversations = conversations(settings, load)
        self._records: list[Request] = []
        self._begun = 0.0

    async def run(self) -> Level | None:
        """The level's figures: so far if it is cancelled, None if nothing had ended by then."""
        interrupted = False
        cpu_s = time.process_time()
        try:
            await self._converse(warm_up(self._settings, self._load))
            self._records.clear()
            cpu_s, self._begun = time.process_time(), time.perf_counter()
            async with _ticking(self._progress):
                await (self._closed_loop() if self._load.rate is None else self._open_loop(self._load.rate))
        except asyncio.CancelledError:
            interrupted = True
        if not self._records or not self._begun:
            return None
        client_cpu = (time.process_time() - cpu_s) / (time.perf_counter() - self._begun)
        return summarize(self._load, self._records, client_cpu=client_cpu, interrupted=interrupted)

    async def _closed_loop(self) -> None:
        pending = iter(self._conversations)

        async def stream() -> None:
            for conversation in pending:
                await self._converse(conversation)

        async with asyncio.TaskGroup() as streams:
            for _ in range(self._load.concurrency or 1):
                streams.create_task(stream())

    async def _open_loop(self, rate: float) -> None:
        async with asyncio.TaskGroup() as running:
            for at, conversation in zip(arrivals(rate, self._settings.seed), self._conversations, strict=False):
                await asyncio.sleep(max(0.0, self._begun + at - time.perf_counter()))
                running.create_task(self._converse(conversation))

    async def _converse(self, conversation: Conversation) -> None:
        """Ask its questions one after another, up to the first that fails."""
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for turn, question in enumerate(conversation.questions, start=1):
            messages.append({"role": "user", "content": question})
            body = _body(self._settings, conversation.model, messages, conversation.seed)
            sent_at = time.perf_counter()
            start_s = sent_at - self._begun
            try:
                answer = await self._server.answer(body, keep_text=turn < len(conversation.questions))
            except RequestFailed as error:
                latency_s = time.perf_counter() - sent_at
                self._records.append(Request(conversation.model, turn, start_s, latency_s, error=str(error)))
                return
            self._records.append(_request(conversation.model, turn, start_s, answer))
            messages.append({"role": "assistant", "content": answer.text})

    def _progress(self) -> str:
        num_requests = len(self._conversations) * self._settings.turns
        tokens = sum(record.completion_tokens for record in self._records)
        errors = sum(record.error is not None for record in self._records)
        elapsed_s = time.perf_counter() - self._begun
        failed = f", {errors} failed" if errors else ""
        return (
            f"{self._load}: {len(self._records)} of {num_requests} requests{failed}, "
            f"{tokens} tokens, {elapsed_s:.1f} s, {tokens / elapsed_s:.1f} tok/s"
        )


def _body(settings: Settings, model: str, messages: Sequence[Mapping[str, str]], seed: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.ignore_eos:
        body["ignore_eos"] = True
    if settings.temperature > 0:
        body["seed"] = seed
    return body


def _request(model: str, turn: int, start_s: float, answer: Answer) -> Request:
    text_at, usage = answer.text_at, answer.usage
    tokens = usage.completion_tokens if usage and usage.completion_tokens is not None else len(text_at)
    return Request(
        model,
        turn,
        start_s,
        latency_s=answer.ended_at - answer.sent_at,
        ttft_s=text_at[0] - answer.sent_at if text_at else None,
        tpot_s=(text_at[-1] - text_at[0]) / (tokens - 1) if len(text_at) > 1 and tokens > 1 else None,
        gaps_s=tuple(round(after - before, 6) for before, after in pairwise(text_at)),
        completion_tokens=tokens,
        prompt_tokens=usage.prompt_tokens if usage else None,
        cached_tokens=usage.cached_tokens if usage else None,
    )


def _notes(settings: Settings, levels: Sequence[Level]) -> list[str]:
    good = [record for level in levels for record in level.records if record.error is None]
    short = sum(record.completion_tokens < settings.max_tokens for record in good)
    busiest = max((level.client_cpu for level in levels), default=0.0)
    notes = []
    if any(record.prompt_tokens is None for record in good):
        notes.append("the server sends no usage: pieces of text are counted as tokens")
    if settings.ignore_eos and short:
        notes.append(f"{short} of {len(good)} answers are shorter than --max-tokens {settings.max_tokens}")
    if busiest > _BUSY_CLIENT:
        notes.append(f"the load generator used {busiest:.2f} of a core: the server may be faster than it can tell")
    return notes


@contextlib.asynccontextmanager
async def _ticking(line: Callable[[], str]) -> AsyncIterator[None]:
    """Keep `line` on the terminal, up to date, and leave its last state; only that where stderr is no terminal."""

    async def tick() -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            print(f"\r\x1b[K{line()}", end="", file=sys.stderr, flush=True)

    live = sys.stderr.isatty()
    ticks = asyncio.create_task(tick()) if live else None
    try:
        yield
    finally:
        if ticks:
            ticks.cancel()
        print("\r\x1b[K" * live + line(), file=sys.stderr, flush=True)
