"""The results of a benchmark: settings, requests, and the figures of each level, with their JSON form.

Pure computation on finished requests. Knows neither how they were sent nor how results are shown. Durations are in
seconds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from training.errors import ConfigError, CorralError

Workload = Literal["chat", "prompt-length", "shared-prefix"]


class BenchError(CorralError):
    """Some requests of a run failed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a run, as it was carried out.

    Attributes:
        models: used in turn, one per conversation.
        concurrency: streams of each closed-loop level; empty in an open loop.
        rates: conversations per second of each open-loop level; empty in a closed loop.
        num_requests: per level; None: `turns`, at least 2, per stream, or ten seconds of arrivals.
        prompt_tokens: sizes of the prompts of `prompt-length`, in words of about one token.
        prefix_tokens: size of the system prompt of `shared-prefix`, likewise.
        num_prefixes: number of different system prompts; None: one per conversation.
        turns: questions per conversation.
        seed: of prompts, arrivals and, above temperature 0, sampling.

    Raises ConfigError if options conflict.
    """

    url: str
    models: tuple[str, ...]
    workload: Workload
    concurrency: tuple[int, ...]
    rates: tuple[float, ...]
    num_requests: int | None
    max_tokens: int
    prompt_tokens: tuple[int, ...]
    prefix_tokens: int | None
    num_prefixes: int | None
    turns: int
    temperature: float
    ignore_eos: bool
    seed: int
    label: str

    def __post_init__(self) -> None:
        if self.rates and self.concurrency:
            raise ConfigError("--concurrency and --rate cannot be combined: give one of them")
        if self.prompt_tokens and self.workload != "prompt-length":
            raise ConfigError(f"--prompt-tokens is for --workload prompt-length, not {self.workload!r}")
        if (self.prefix_tokens or self.num_prefixes or self.turns > 1) and self.workload != "shared-prefix":
            raise ConfigError(
                f"--prefix-tokens, --num-prefixes and --turns are for --workload shared-prefix, not {self.workload!r}"
            )


@dataclass(frozen=True, slots=True)
class Load:
    """The load of one level: a number of streams, or of arrivals per second."""

    concurrency: int | None
    rate: float | None
    prompt_tokens: int | None = None

    def __str__(self) -> str:
        load = f"{self.concurrency} streams" if self.rate is None else f"{self.rate:g}/s"
        load = load if self.concurrency != 1 else "1 stream"
        return load if self.prompt_tokens is None else f"{load}, {self.prompt_tokens} tok"


@dataclass(frozen=True, slots=True)
class Request:
    """One finished request.

    Attributes:
        turn: 1 for the first of its conversation.
        start_s: send time, since the start of its level.
        ttft_s: time to the first text; None if there was none.
        tpot_s: time per output token after the first; None if there was only one token or one piece of text.
        gaps_s: times between consecutive pieces of text.
        completion_tokens: as reported by the server; the number of pieces of text if it sends no usage.
        prompt_tokens, cached_tokens: as reported by the server; None if it does not report them.
        error: why it failed; its figures are then empty.
    """

    model: str
    turn: int
    start_s: float
    latency_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    gaps_s: tuple[float, ...] = ()
    completion_tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of one measure over the requests of a level."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Turn:
    """The same turn of all conversations of a level; tokens are means per request."""

    turn: int
    requests: int
    prompt_tokens: float | None
    cached_tokens: float | None
    ttft_s: Percentiles | None


@dataclass(frozen=True, slots=True)
class Level:
    """The figures of one level. Failed requests count in `requests`, `errors` and `elapsed_s` only.

    Attributes:
        elapsed_s: from the start to the end of the last request.
        client_cpu: CPU cores used by the load generator; near 1, it is the bottleneck and not the server.
        interrupted: whether it was stopped before all requests had finished.
    """

    load: Load
    elapsed_s: float
    requests: int
    errors: int
    first_error: str | None
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    prompt_tokens: float | None
    cached_tokens: float | None
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    gap_s: Percentiles | None
    latency_s: Percentiles | None
    turns: tuple[Turn, ...]
    client_cpu: float
    interrupted: bool
    records: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Results:
    """A complete run, or the part of it before it was interrupted.

    Attributes:
        started: date and time in UTC, ISO 8601.
        notes: caveats about the figures, for the reader.
    """

    settings: Settings
    started: str
    levels: tuple[Level, ...]
    notes: tuple[str, ...]
    interrupted: bool
    format: Literal["corral-bench/1"] = "corral-bench/1"

    def raise_for_errors(self) -> None:
        """Raise BenchError if any request failed, with the number of failures and the first error."""
        failed = sum(level.errors for level in self.levels)
        if failed:
            first = next(level.first_error for level in self.levels if level.errors)
            requests = sum(level.requests for level in self.levels)
            raise BenchError(f"{failed} of {requests} requests failed, the first with: {first}")

    def as_json(self) -> str:
        """Everything, indented; `read_results` reads it back."""
        return _RESULTS.dump_json(self, indent=2).decode() + "\n"


_RESULTS = TypeAdapter(Results)


Number = TypeVar("Number", int, float)


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """The distinct positive numbers in `text`, such as "1,8,32". Raises ConfigError, naming the option."""
    try:
        values = tuple(dict.fromkeys(kind(part) for part in text.split(",") if part.strip()))
    except ValueError:
        values = ()
    if text and (not values or not all(0 < number < math.inf for number in values)):
        raise ConfigError(f"{option} {text!r} is not a list of positive numbers: use for example {option} 1,8,32")
    return values


def read_results(path: Path) -> Results:
    """The results in a file that `--json` wrote. Raises ConfigError."""
    try:
        return _RESULTS.validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give a file that --json wrote") from error
    except ValidationError as error:
        location = ".".join(map(str, error.errors()[0]["loc"])) or "its beginning"
        raise ConfigError(
            f"{path} is not a result of corral bench (at {location}): give a file that --json wrote"
        ) from error


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile of at least one value, interpolated linearly between the two nearest ranks."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    lower = int(rank)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (rank - lower)


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """p50, p90 and p99; None if there are no values."""
    return Percentiles(*(percentile(values, percent) for percent in (50, 90, 99))) if values else None


def summarize(load: Load, records: Sequence[Request], *, client_cpu: float, interrupted: bool = False) -> Level:
    """The figures of one level, from at least one request, in any order."""
    successes = [record for record in records if record.error is None]
    elapsed_s = max(record.start_s + record.latency_s for record in records)
    output_tokens = sum(record.completion_tokens for record in successes)
    return Level(
        load=load,
        elapsed_s=elapsed_s,
        requests=len(records),
        errors=len(records) - len(successes),
        first_error=next((record.error for record in records if record.error is not None), None),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / elapsed_s,
        requests_per_s=len(successes) / elapsed_s,
        prompt_tokens=_mean([record.prompt_tokens for record in successes]),
        cached_tokens=_mean([record.cached_tokens for record in successes]),
        ttft_s=percentiles([record.ttft_s for record in successes if record.ttft_s is not None]),
        tpot_s=percentiles([record.tpot_s for record in successes if record.tpot_s is not None]),
        gap_s=percentiles([gap for record in successes for gap in record.gaps_s]),
        latency_s=percentiles([record.latency_s for record in successes]),
        turns=tuple(_turn(turn, successes) for turn in sorted({record.turn for record in successes})),
        client_cpu=client_cpu,
        interrupted=interrupted,
        records=tuple(records),
    )


def _turn(turn: int, records: Sequence[Request]) -> Turn:
    turn_records = [record for record in records if record.turn == turn]
    return Turn(
        turn,
        len(turn_records),
        _mean([record.prompt_tokens for record in turn_records]),
        _mean([record.cached_tokens for record in turn_records]),
        percentiles([record.ttft_s for record in turn_records if record.ttft_s is not None]),
    )


def _mean(values: Sequence[int | None]) -> float | None:
    counts = [value for value in values if value is not None]
    return sum(counts) / len(counts) if counts else None
