"""`corral bench`: puts load on any OpenAI-compatible chat server and measures it from the client's side.

Runs the levels one after another, each after a warm-up: a closed loop (a number of streams, each with one request at a
time) or an open loop (arrivals at a rate, however many requests are still running).
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
    """Outputs besides the table: a JSON file (`-`: stdout, without the table), a PNG; and results to compare with."""

    json: Path | None = None
    plot: Path | None = None
    compare: tuple[Path, ...] = ()


def run_bench(settings: Settings, server: ChatServer, output: Output) -> Results:
    """Measure, then print and write the results, also after Ctrl-C. Without models in `settings`: the server's first.

    Raises:
        ConfigError: an output cannot be written, or a file to compare with cannot be read.
        RequestFailed: the server cannot be reached, or refuses the first request.
    """
    earlier_runs = [(path.stem, read_results(path)) for path in output.compare]
    _check_output(output)
    results = asyncio.run(_measure(settings, server))
    for note in results.notes:
        print(f"note: {note}", file=sys.stderr)
    runs = [(run.settings.label or name, run) for name, run in [*earlier_runs, ("this run", results)]]
    if output.json == Path("-"):
        print(results.as_json(), end="")
    elif results.levels:
        print_tables(runs)
    if output.json and output.json != Path("-"):
        output.json.write_text(results.as_json(), encoding="utf-8")
    if output.plot and results.levels:
        plot(runs, output.plot)
    return results


def _check_output(output: Output) -> None:
    """Raise before measuring what would otherwise fail after it."""
    for path in filter(None, (output.json, output.plot)):
        folder = path.absolute().parent
        if path != Path("-") and (not folder.is_dir() or path.is_dir()):
            raise ConfigError(f"{path} cannot be written: give a file in a folder that exists")
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
    """Request a few tokens from each model, so that a wrong name fails at once and every adapter is loaded.

    Returns: False if the server answers only without `ignore_eos`, an extension of vLLM's.
    """

    async def accepts_ignore_eos(model: str) -> bool:
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

    return all(await asyncio.gather(*map(accepts_ignore_eos, dict.fromkeys(settings.models))))


class _LevelRun:
    """A level while it is running."""

    def __init__(self, settings: Settings, load: Load, server: ChatServer) -> None:
        self._settings = settings
        self._load = load
        self._server = server
        self._conversations = conversations(settings, load)
        self._records: list[Request] = []
        self._started_at = 0.0

    async def run(self) -> Level | None:
        """The figures of the level. If it is cancelled, those so far, or None if no request had finished."""
        interrupted = False
        cpu_s = time.process_time()
        try:
            await self._converse(warm_up(self._settings, self._load))
            self._records.clear()
            cpu_s, self._started_at = time.process_time(), time.perf_counter()
            async with _live_progress(self._progress):
                await (self._closed_loop() if self._load.rate is None else self._open_loop(self._load.rate))
        except asyncio.CancelledError:
            interrupted = True
        if not self._records or not self._started_at:
            return None
        client_cpu = (time.process_time() - cpu_s) / (time.perf_counter() - self._started_at)
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
            for arrival_s, conversation in zip(arrivals(rate, self._settings.seed), self._conversations, strict=False):
                await asyncio.sleep(max(0.0, self._started_at + arrival_s - time.perf_counter()))
                running.create_task(self._converse(conversation))

    async def _converse(self, conversation: Conversation) -> None:
        """Send the questions one after another, up to the first that fails."""
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for turn, question in enumerate(conversation.questions, start=1):
            messages.append({"role": "user", "content": question})
            body = _body(self._settings, conversation.model, messages, conversation.seed)
            sent_at = time.perf_counter()
            start_s = sent_at - self._started_at
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
        elapsed_s = time.perf_counter() - self._started_at
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
    successes = [record for level in levels for record in level.records if record.error is None]
    num_short = sum(record.completion_tokens < settings.max_tokens for record in successes)
    max_cpu = max((level.client_cpu for level in levels), default=0.0)
    notes = []
    if any(record.prompt_tokens is None for record in successes):
        notes.append("the server sends no usage: pieces of text are counted as tokens")
    if settings.ignore_eos and num_short:
        notes.append(f"{num_short} of {len(successes)} answers are shorter than --max-tokens {settings.max_tokens}")
    if max_cpu > _BUSY_CLIENT:
        notes.append(f"the load generator used {max_cpu:.2f} of a core: the server may be faster than measured")
    return notes


@contextlib.asynccontextmanager
async def _live_progress(line: Callable[[], str]) -> AsyncIterator[None]:
    """Keep `line` up to date on the terminal, and leave its last state; without a terminal, print only that."""

    async def tick() -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            print(f"\r\x1b[K{line()}", end="", file=sys.stderr, flush=True)

    is_terminal = sys.stderr.isatty()
    ticks = asyncio.create_task(tick()) if is_terminal else None
    try:
        yield
    finally:
        if ticks:
            ticks.cancel()
        print("\r\x1b[K" * is_terminal + line(), file=sys.stderr, flush=True)
