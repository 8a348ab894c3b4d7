"""What `corral bench` found: settings, requests, and the figures of each level, with their JSON form.

Pure: takes finished requests and computes. Knows neither how they were sent nor how they are shown. Durations are in
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
    """A run of which requests failed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for, as it was run.

    Attributes:
        models: used in turn, one per conversation.
        concurrency: streams of each closed-loop level; empty in an open loop.
        rates: conversations per second of each open-loop level; empty in a closed loop.
        num_requests: of each level; None: `turns`, at least 2, per stream, or ten seconds' worth of arrivals.
        prompt_tokens: sizes of the prompts of `prompt-length`, in words of about one token.
        prefix_tokens: size of the system prompt of `shared-prefix`, likewise.
        num_prefixes: how many different ones; None: each conversation has its own.
        turns: questions of each conversation.
        seed: of prompts, arrivals and, above temperature 0, sampling.

    Raises ConfigError if options do not go together.
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
            raise ConfigError("--concurrency and --rate are two kinds of load: give one of them")
        if self.prompt_tokens and self.workload != "prompt-length":
            raise ConfigError(f"--prompt-tokens is for --workload prompt-length, not {self.workload!r}")
        if (self.prefix_tokens or self.num_prefixes or self.turns > 1) and self.workload != "shared-prefix":
            raise ConfigError(
                f"--prefix-tokens, --num-prefixes and --turns are for --workload shared-prefix, not {self.workload!r}"
            )


@dataclass(frozen=True, slots=True)
class Load:
    """What one level puts on the server: so many streams, or so many arrivals per second."""

    concurrency: int | None
    rate: float | None
    prompt_tokens: int | None = None

    def __str__(self) -> str:
        load = f"{self.concurrency} streams" if self.rate is None else f"{self.rate:g}/s"
        load = load if self.concurrency != 1 else "1 stream"
        return load if self.prompt_tokens is None else f"{load}, {self.prompt_tokens} tok"


@dataclass(frozen=True, slots=True)
class Request:
    """One request that ended.

    Attributes:
        turn: 1 is the first of its conversation.
        start_s: when it was sent, since its level began.
        ttft_s: to the first text; None if there was none.
        tpot_s: per output token after the first; None if there was but one, or one piece of text.
        gaps_s: between one piece of text and the next.
        completion_tokens: as the server counts; pieces of text where it sends no usage.
        prompt_tokens, cached_tokens: as the server counts; None where it does not say.
        error: why it failed; the figures are then empty.
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
    """Of one measure over the requests of a level."""

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
    """The figures of one level. What failed counts in `requests`, `errors` and `elapsed_s` alone.

    Attributes:
        elapsed_s: from the start to the end of the last request.
        client_cpu: cores that the load generator itself was busy on; near 1, it and not the server is measured.
        interrupted: whether it was stopped before all requests had ended.
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
    """A whole run, or what there was of it when it was interrupted.

    Attributes:
        started: date and time in UTC, ISO 8601.
        notes: what the figures depend on, for whoever reads them.
    """

    settings: Settings
    started: str
    levels: tuple[Level, ...]
    notes: tuple[str, ...]
    interrupted: bool
    format: Literal["corral-bench/1"] = "corral-bench/1"

    def raise_for_errors(self) -> None:
        """Raise BenchError if a request failed, with how many did and why the first."""
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
    """The different numbers in `text`, such as "1,8,32", all above 0. Raises ConfigError, naming the option."""
    try:
        found = tuple(dict.fromkeys(kind(part) for part in text.split(",") if part.strip()))
    except ValueError:
        found = ()
    if text and (not found or not all(0 < number < math.inf for number in found)):
        raise ConfigError(f"{option} {text!r} is no list of numbers above 0: write for example {option} 1,8,32")
    return found


def read_results(path: Path) -> Results:
    """The results in a file that `--json` wrote. Raises ConfigError."""
    try:
        return _RESULTS.validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give a file that --json wrote") from error
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "its beginning"
        raise ConfigError(f"{path} is no result of corral bench (at {where}): give a file that --json wrote") from error


def percentile(values: Sequence[float], percent: float) -> float:
    """Of at least one value, interpolated linearly between the two nearest ranks."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """None of no values."""
    return Percentiles(*(percentile(values, percent) for percent in (50, 90, 99))) if values else None


def summarize(load: Load, records: Sequence[Request], *, client_cpu: float, interrupted: bool = False) -> Level:
    """The figures of the requests of one level, in any order, at least one."""
    good = [record for record in records if record.error is None]
    elapsed_s = max(record.start_s + record.latency_s for record in records)
    output_tokens = sum(record.completion_tokens for record in good)
    return Level(
        load=load,
        elapsed_s=elapsed_s,
        requests=len(records),
        errors=len(records) - len(good),
        first_error=next((record.error for record in records if record.error is not None), None),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / elapsed_s,
        requests_per_s=len(good) / elapsed_s,
        prompt_tokens=_mean([record.prompt_tokens for record in good]),
        cached_tokens=_mean([record.cached_tokens for record in good]),
        ttft_s=percentiles([record.ttft_s for record in good if record.ttft_s is not None]),
        tpot_s=percentiles([record.tpot_s for record in good if record.tpot_s is not None]),
        gap_s=percentiles([gap for record in good for gap in record.gaps_s]),
        latency_s=percentiles([record.latency_s for record in good]),
        turns=tuple(_turn(turn, good) for turn in sorted({record.turn for record in good})),
        client_cpu=client_cpu,
        interrupted=interrupted,
        records=tuple(records),
    )


def _turn(turn: int, records: Sequence[Request]) -> Turn:
    of_turn = [record for record in records if record.turn == turn]
    return Turn(
        turn,
        len(of_turn),
        _mean([record.prompt_tokens for record in of_turn]),
        _mean([record.cached_tokens for record in of_turn]),
        percentiles([record.ttft_s for record in of_turn if record.ttft_s is not None]),
    )


def _mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
