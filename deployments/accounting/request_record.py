"""What is recorded of one request: caller, model, status, tokens and latencies.

A `RequestTrace` is filled in while the request is served; the `RequestRecord` made from it at the end is what is
counted. Knows nothing of Ray or HTTP.
"""

import time
from dataclasses import dataclass, field

from deployments.auth.caller import Caller
from deployments.protocol.base import Usage

CLIENT_CLOSED_REQUEST = 499  # nginx's code for a client that disconnected before its response was complete
_NO_USAGE = Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0)


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as the ledger counts it.

    Attributes:
        route: path template, such as /v1/models/{model_id:path}.
        status: of the response; an error after its headers were sent counts as that error's status.
        ended_at: seconds since the epoch.
        model: id with version, None where the request named no model that is served.
        key_id: None for requests without a key.
        first_token_s: from the request to the first token, None without one.
        token_s: between two tokens of a completion, on average.
        duration_s: from the request to the last token.
    """

    route: str
    status: int
    ended_at: float
    model: str | None = None
    key_id: str | None = None
    key_name: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    token_s: float | None = None
    duration_s: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the server refused or aborted it; a client that disconnects is not a failure."""
        return self.status >= 400 and self.status != CLIENT_CLOSED_REQUEST


@dataclass(slots=True)
class RequestTrace:
    """A request while it is served; times are `time.monotonic()`.

    Attributes:
        status: of the response, 0 before it starts.
        headers: response headers about the key's limits.
        usage: as in the response's `usage`, also of a response that was aborted.
        num_completions: that share the completion tokens.
    """

    route: str = "other"
    caller: Caller | None = None
    model: str | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    usage: Usage | None = None
    num_completions: int = 1
    started_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    last_token_at: float | None = None

    def mark_token(self) -> None:
        """Tokens have arrived from the replica."""
        self.last_token_at = time.monotonic()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at

    @property
    def counted_usage(self) -> Usage:
        """Usage that is charged to the key: none where the server failed before the first token."""
        if self.usage is None or (self.status >= 500 and self.first_token_at is None):
            return _NO_USAGE
        return self.usage

    def record(self) -> RequestRecord:
        """The request as it stands."""
        usage, first, last = self.counted_usage, self.first_token_at, self.last_token_at
        first_token_s = token_s = duration_s = None
        if first is not None and last is not None:
            duration_s = last - self.started_at
            if usage.completion_tokens:
                first_token_s = first - self.started_at
            if usage.completion_tokens > self.num_completions:
                token_s = (last - first) / (usage.completion_tokens / self.num_completions - 1)
        return RequestRecord(
            route=self.route,
            status=self.status,
            ended_at=time.time(),
            model=self.model,
            key_id=self.caller.key_id if self.caller else None,
            key_name=self.caller.name if self.caller else None,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens,
            completion_tokens=usage.completion_tokens,
            first_token_s=first_token_s,
            token_s=token_s,
            duration_s=duration_s,
        )
