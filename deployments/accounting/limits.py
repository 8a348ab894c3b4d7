"""What a key may use: requests and tokens a minute, and requests at the same time.

`ledger.py` holds one Limiter for all replicas of the API. Knows nothing of Ray, HTTP or time of day.

A minute is any sixty seconds, not the clock's: with windows that begin anew, or buckets that refill, twice the limit
passes around the turn. A request's tokens count from when it is admitted, first all that it may use, then what it did.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from deployments.auth.caller import KeyLimits

WINDOW_S = 60.0
LEASE_S = 10.0  # a running request that nobody vouched for so long has gone with its replica of the API
_STREAM_RETRY_S = 1  # nobody knows when an answer ends


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a request may run.

    Attributes:
        headers: for its answer, OpenAI's `x-ratelimit-*`, and `retry-after` with a refusal that time mends.
        refusal: why it may not run, None if it may.
    """

    headers: dict[str, str]
    refusal: str | None = None


class Limiter:
    """Holds keys to their limits. Not thread-safe.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys: dict[str, _Key] = {}

    def admit(self, key_id: str, request_id: str, limits: KeyLimits, num_tokens: int) -> Admission:
        """Let a request run if its key's limits have room for it; a refused one takes nothing.

        Args:
            request_id: what `settle` and `renew` call it.
            num_tokens: the most that it can use, prompt and answers together.
        """
        now = self._clock()
        key = self._keys.setdefault(key_id, _Key())
        key.forget_past(now)
        if limits.tpm is not None and num_tokens > limits.tpm:
            why = f"the request may take {num_tokens} tokens, and this key has {limits.tpm} a minute"
            headers = key.headers(limits, now) | {"x-should-retry": "false"}  # the openai client asks for this one
            return Admission(headers, f"{why}: shorten the prompt or lower max_tokens")
        waits = key.waits(limits, num_tokens, now)
        if waits:
            wait, why = max(waits)
            headers = key.headers(limits, now) | {"retry-after": str(wait)}
            return Admission(headers, f"{why}: try again in {wait} s")
        key.take(request_id, num_tokens, now, runs=limits.streams is not None)
        return Admission(key.headers(limits, now))

    def release(self, key_id: str, request_id: str, num_tokens: int) -> None:
        """The request has ended, and used so many tokens; unknown ones are ignored."""
        if (key := self._keys.get(key_id)) is not None:
            key.release(request_id, num_tokens)

    def renew(self, running: Mapping[str, Collection[str]]) -> None:
        """These requests of these keys still run, also where this limiter is younger than they are."""
        expires_at = self._clock() + LEASE_S
        for key_id, request_ids in running.items():
            self._keys.setdefault(key_id, _Key()).running |= dict.fromkeys(request_ids, expires_at)


@dataclass(slots=True)
class _Taken:
    expires_at: float
    num_tokens: int


@dataclass(slots=True)
class _Key:
    """What one key has taken in the last minute, oldest first, and what runs of it (id -> when its lease ends)."""

    taken: OrderedDict[str, _Taken] = field(default_factory=OrderedDict)
    num_tokens: int = 0  # of all that is taken
    running: dict[str, float] = field(default_factory=dict)

    def forget_past(self, now: float) -> None:
        while self.taken and next(iter(self.taken.values())).expires_at <= now:
            _, past = self.taken.popitem(last=False)
            self.num_tokens -= past.num_tokens
        self.running = {request_id: ends for request_id, ends in self.running.items() if ends > now}

    def waits(self, limits: KeyLimits, num_tokens: int, now: float) -> list[tuple[int, str]]:
        """For each limit that is reached, the whole seconds until it is not, and a sentence about it."""
        waits = []
        if limits.rpm is not None and len(self.taken) >= limits.rpm:
            wait = self._wait(len(self.taken) - limits.rpm + 1, 0, now)
            waits.append((wait, f"this key has {limits.rpm} requests a minute, and they are used up"))
        if limits.tpm is not None and self.num_tokens + num_tokens > limits.tpm:
            wait = self._wait(0, self.num_tokens + num_tokens - limits.tpm, now)
            used = f"{self.num_tokens} are used or reserved, and this request may take {num_tokens}"
            waits.append((wait, f"this key has {limits.tpm} tokens a minute; {used}"))
        if limits.streams is not None and len(self.running) >= limits.streams:
            waits.append((_STREAM_RETRY_S, f"this key has {limits.streams} requests at a time, and all are running"))
        return waits

    def _wait(self, num_requests: int, num_tokens: int, now: float) -> int:
        """Whole seconds until so many requests and tokens have left the window."""
        for count, taken in enumerate(self.taken.values(), 1):
            num_tokens -= taken.num_tokens
            if count >= num_requests and num_tokens <= 0:
                return max(1, math.ceil(taken.expires_at - now + 1e-3))  # a waiting client's clock is no finer
        raise AssertionError("more was to leave the window than is in it")

    def take(self, request_id: str, num_tokens: int, now: float, *, runs: bool) -> None:
        self.taken[request_id] = _Taken(now + WINDOW_S, num_tokens)
        self.num_tokens += num_tokens
        if runs:
            self.running[request_id] = now + LEASE_S

    def release(self, request_id: str, num_tokens: int) -> None:
        self.running.pop(request_id, None)
        if (taken := self.taken.get(request_id)) is not None:
            self.num_tokens += num_tokens - taken.num_tokens
            taken.num_tokens = num_tokens

    def headers(self, limits: KeyLimits, now: float) -> dict[str, str]:
        """OpenAI's names; reset is when all of the limit is there again if nothing more is taken."""
        last = next(reversed(self.taken.values())).expires_at if self.taken else now
        headers = {}
        for unit, limit, used in (("requests", limits.rpm, len(self.taken)), ("tokens", limits.tpm, self.num_tokens)):
            if limit is not None:
                headers[f"x-ratelimit-limit-{unit}"] = str(limit)
                headers[f"x-ratelimit-remaining-{unit}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{unit}"] = f"{last - now:.3f}s"
        return headers
