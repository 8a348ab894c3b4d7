"""Rate limits of API keys: requests per minute, tokens per minute, and concurrent requests.

The window slides over any sixty seconds: fixed windows and token buckets would let through up to twice the limit within
a minute. A request's tokens count from its admission, first as the most that it can use, then as what it used. Knows
nothing of Ray, HTTP or the time of day.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from deployments.auth.caller import KeyLimits

WINDOW_S = 60.0
LEASE_S = 10.0  # a running request that is not renewed for so long has died with its replica of the API
_STREAM_RETRY_S = 1  # when a running request will end is unknown


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a request may run.

    Attributes:
        headers: of the response: OpenAI's `x-ratelimit-*`, and `retry-after` with a refusal that waiting resolves.
        refusal: why it may not run, None if it may.
        num_tokens: the most that it may use, prompt and completions together.
    """

    headers: dict[str, str]
    refusal: str | None = None
    num_tokens: int = 0


class Limiter:
    """Enforces the limits of keys. Not thread-safe.

    Args:
        clock: monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys: dict[str, _KeyUsage] = {}

    def admit(
        self, key_id: str, request_id: str, limits: KeyLimits, num_tokens: int, min_tokens: int | None = None
    ) -> Admission:
        """Admit a request if its key's limits have room for it; a refused request reserves nothing.

        Args:
            request_id: identifies the request in `release` and `renew`.
            num_tokens: the most that it can use, prompt and completions together.
            min_tokens: with how few it may be admitted if there are not as many; default: `num_tokens`.
        """
        now = self._clock()
        key = self._keys.setdefault(key_id, _KeyUsage())
        key.expire(now)
        if min_tokens is not None and limits.tpm is not None:
            num_tokens = max(min_tokens, min(num_tokens, limits.tpm - key.num_tokens))
        if limits.tpm is not None and num_tokens > limits.tpm:
            reason = f"the request may use {num_tokens} tokens, but this key is limited to {limits.tpm} per minute"
            headers = key.headers(limits, now) | {"x-should-retry": "false"}  # the openai client heeds this header
            return Admission(headers, f"{reason}: shorten the prompt or lower max_tokens")
        exceeded = key.exceeded_limits(limits, num_tokens, now)
        if exceeded:
            wait_s, reason = max(exceeded)
            headers = key.headers(limits, now) | {"retry-after": str(wait_s)}
            return Admission(headers, f"{reason}: try again in {wait_s} s")
        key.reserve(request_id, num_tokens, now, track_running=limits.streams is not None)
        return Admission(key.headers(limits, now), num_tokens=num_tokens)

    def release(self, key_id: str, request_id: str, num_tokens: int) -> None:
        """End a request that used `num_tokens`; unknown requests are ignored."""
        if (key := self._keys.get(key_id)) is not None:
            key.release(request_id, num_tokens)

    def renew(self, running: Mapping[str, Collection[str]]) -> None:
        """Extend the lease of running requests (key id -> request ids), including those admitted before a restart."""
        expires_at = self._clock() + LEASE_S
        for key_id, request_ids in running.items():
            self._keys.setdefault(key_id, _KeyUsage()).running |= dict.fromkeys(request_ids, expires_at)


@dataclass(slots=True)
class _Reservation:
    expires_at: float
    num_tokens: int


@dataclass(slots=True)
class _KeyUsage:
    """Reservations of one key in the last minute, oldest first, and its running requests (id -> end of the lease)."""

    window: OrderedDict[str, _Reservation] = field(default_factory=OrderedDict)
    num_tokens: int = 0  # of all reservations
    running: dict[str, float] = field(default_factory=dict)

    def expire(self, now: float) -> None:
        while self.window and next(iter(self.window.values())).expires_at <= now:
            _, expired = self.window.popitem(last=False)
            self.num_tokens -= expired.num_tokens
        self.running = {request_id: ends_at for request_id, ends_at in self.running.items() if ends_at > now}

    def exceeded_limits(self, limits: KeyLimits, num_tokens: int, now: float) -> list[tuple[int, str]]:
        """For each limit without room for the request: seconds to wait, and the reason for the user."""
        exceeded = []
        if limits.rpm is not None and len(self.window) >= limits.rpm:
            wait_s = self._seconds_until_free(len(self.window) - limits.rpm + 1, 0, now)
            exceeded.append((wait_s, f"this key's request limit is used up ({limits.rpm} per minute)"))
        if limits.tpm is not None and self.num_tokens + num_tokens > limits.tpm:
            wait_s = self._seconds_until_free(0, self.num_tokens + num_tokens - limits.tpm, now)
            use = f"{self.num_tokens} are used or reserved, and this request may use {num_tokens}"
            exceeded.append((wait_s, f"this key's token limit would be exceeded ({limits.tpm} per minute; {use})"))
        if limits.streams is not None and len(self.running) >= limits.streams:
            exceeded.append((_STREAM_RETRY_S, f"this key's limit on concurrent requests is reached ({limits.streams})"))
        return exceeded

    def _seconds_until_free(self, num_requests: int, num_tokens: int, now: float) -> int:
        """Whole seconds until so many requests and tokens have left the window."""
        for count, reservation in enumerate(self.window.values(), 1):
            num_tokens -= reservation.num_tokens
            if count >= num_requests and num_tokens <= 0:
                return max(1, math.ceil(reservation.expires_at - now + 1e-3))  # clients' timers are no more precise
        raise AssertionError("the window holds fewer requests or tokens than must leave it")

    def reserve(self, request_id: str, num_tokens: int, now: float, *, track_running: bool) -> None:
        self.window[request_id] = _Reservation(now + WINDOW_S, num_tokens)
        self.num_tokens += num_tokens
        if track_running:
            self.running[request_id] = now + LEASE_S

    def release(self, request_id: str, num_tokens: int) -> None:
        self.running.pop(request_id, None)
        if (reservation := self.window.get(request_id)) is not None:
            self.num_tokens += num_tokens - reservation.num_tokens
            reservation.num_tokens = num_tokens

    def headers(self, limits: KeyLimits, now: float) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`; reset is when all of the limit is available again if nothing more is reserved."""
        reset_at = next(reversed(self.window.values())).expires_at if self.window else now
        headers = {}
        for unit, limit, used in (("requests", limits.rpm, len(self.window)), ("tokens", limits.tpm, self.num_tokens)):
            if limit is not None:
                headers[f"x-ratelimit-limit-{unit}"] = str(limit)
                headers[f"x-ratelimit-remaining-{unit}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{unit}"] = f"{reset_at - now:.3f}s"
        return headers
