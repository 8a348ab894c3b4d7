"""Wire types of `GET /v1/models`: the base model and its adapters."""

import time
from typing import Literal

from pydantic import BaseModel, Field


class Model(BaseModel):
    """A base model, an adapter (its champion, else its newest version) or a version of one: what a request names."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default_factory=lambda: int(time.time()))
    owned_by: str = "corral"
    parent: str | None = Field(None, description="for an adapter, its base model")
    root: str = Field(description="for a base model, where it was loaded from; for an adapter, its name")
    version: int | None = Field(None, description="of an adapter; the one that answers if the id names none")
    aliases: list[str] = Field([], description="aliases that point at this version")
    canary_percent: float | None = Field(None, description="share of the champion's traffic, if it is the canary")
    max_model_len: int


class ModelList(BaseModel):
    """Response of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]
