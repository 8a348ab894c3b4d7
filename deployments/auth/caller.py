"""Callers and their limits: the result of authentication. Knows nothing of HTTP, or of how keys are stored."""

import uuid
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Scope = Literal["chat", "admin"]
_Limit = Annotated[int | None, Field(ge=1)]


class KeyLimits(BaseModel):
    """Limits of one key over all replicas of the API; None is unlimited."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rpm: _Limit = Field(None, description="requests per minute")
    tpm: _Limit = Field(None, description="tokens per minute, prompts and completions together")
    streams: _Limit = Field(None, description="concurrent requests")


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request.

    Attributes:
        key_id: public id of the key, None on a server without keys.
        name: of the key.
    """

    key_id: str | None
    name: str
    scopes: frozenset[Scope]
    limits: KeyLimits = NO_LIMITS

    def identity(self, user: str | None) -> str:
        """What a canary is assigned by: the request's user, else the key, else a random id."""
        if user is not None:
            return f"user {user}"
        return f"key {self.key_id}" if self.key_id is not None else f"request {uuid.uuid4().hex}"


ANONYMOUS = Caller(None, "anonymous", frozenset({"chat", "admin"}))
