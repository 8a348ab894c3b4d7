"""`GET /v1/models`: the base and its adapters."""

import time
from typing import Literal

from pydantic import BaseModel, Field


class Model(BaseModel):
    """A base or an adapter version that can be named as `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default_factory=lambda: int(time.time()))
    owned_by: str = "corral"
    parent: str | None = Field(None, description="the base, for an adapter")
    root: str = Field(description="what the base was loaded from, or the adapter's name")
    version: int | None = None
    aliases: list[str] = Field([], description="that point at this version")
    canary_percent: float | None = Field(
        None, description="its share of the champion's traffic, where it is the canary"
    )
    max_model_len: int


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]
