"""What one request turned out to be: who asked, which model, how it ended, how many tokens and seconds it took.

A `RequestTrace` is open while the request is served and filled in on the way; the ledger counts the `RequestRecord`
made from it at the end. Knows nothing of Ray or HTTP.
"""

import time
from dataclasses import dataclass, field

from deployments.auth.caller import Caller
from deployments.protocol.base import Usage

CLIENT_LEFT = 499  # nginx's word for a client that closed the connection before its answer was whole
_NOTHING = Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0)


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as the ledger counts it.

    Attributes:
        route: as the API names it, such as /v1/chat/completions.
        status: of the answer, also where it broke off after its headers were sent.
        ended_at: seconds since the epoch.
        model: id with version, None where the request named none that is served.
        key_id: None for requests without a key.
        first_token_s: from the request to the first token, None without one.
        token_s: from one token of an answer to the next, on average.
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
        """Whether the server refused it or broke it off; a client that leaves does neither."""
        return self.status >= 400 and self.status != CLIENT_LEFT


@dataclass(slots=True)
class RequestTrace:
    """A request while it is served; times are `time.monotonic()`.

    Attributes:
        status: of the answer so far, 0 before there is one.
        headers: what the limits of the key have to say in the answer.
        usage: what a replica was asked for and gave, as the answer's `usage` tells it.
        num_answers: over which the tokens are spread.
    """

    route: str = "other"
    caller: Caller | None = None
    model: str | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    usage: Usage | None = None
    num_answers: int = 1
    started_at: float = field(default_factory=time.monotonic)
    first_piece_at: float | None = None
    last_piece_at: float | None = None

    def mark_token(self) -> None:
        """A piece of an answer came from the replica."""
        self.last_piece_at = time.monotonic()
        if self.first_piece_at is None:
            self.first_piece_at = self.last_piece_at

    @property
    def used(self) -> Usage:
        """What counts: nothing where the server failed before the first token."""
        if self.usage is None or (self.status >= 500 and self.first_piece_at is None):
            return _NOTHING
        return self.usage

    def record(self) -> RequestRecord:
        """The request as it stands, for the ledger."""
        used, first, last = self.used, self.first_piece_at, self.last_piece_at
        first_token_s = token_s = duration_s = None
        if first is not None and last is not None:
            duration_s = last - self.started_at
            if used.completion_tokens:
                first_token_s = first - self.started_at
            if used.completion_tokens > self.num_answers:
                token_s = (last - first) / (used.completion_tokens / self.num_answers - 1)
        return RequestRecord(
            route=self.route,
            status=self.status,
            ended_at=time.time(),
            model=self.model,
            key_id=self.caller.key_id if self.caller else None,
            key_name=self.caller.name if self.caller else None,
            prompt_tokens=used.prompt_tokens,
            cached_tokens=used.prompt_tokens_details.cached_tokens,
            completion_tokens=used.completion_tokens,
            first_token_s=first_token_s,
            token_s=token_s,
            duration_s=duration_s,
        )
