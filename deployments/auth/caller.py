"""Who sends a request, and how much they may ask for: what authentication tells the rest of the API.

`auth.py` makes a Caller out of a request's key, `keys.py` keeps the keys, `ledger.py` holds callers to their limits.
"""

import uuid
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Scope = Literal["chat", "admin"]
_Limit = Annotated[int | None, Field(ge=1)]


class KeyLimits(BaseModel):
    """What one key may use, over all replicas of the API; None is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rpm: _Limit = Field(None, description="requests a minute")
    tpm: _Limit = Field(None, description="tokens a minute, of prompts and answers together")
    streams: _Limit = Field(None, description="requests at the same time")


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from.

    Attributes:
        key_id: public id of the key, None where no keys exist and everybody on this machine may do everything.
        name: what the key was called when it was made.
    """

    key_id: str | None
    name: str
    scopes: frozenset[Scope]
    limits: KeyLimits = NO_LIMITS

    def identity(self, user: str | None) -> str:
        """Whom a canary takes or leaves: the request's user, else the key; what has neither is drawn for itself."""
        if user is not None:
            return f"user {user}"
        return f"key {self.key_id}" if self.key_id is not None else f"request {uuid.uuid4().hex}"


ANONYMOUS = Caller(None, "anonymous", frozenset({"chat", "admin"}))
