"""Wire types of the adapters API (`/v1/adapters`): pydantic only, shared by the ingress and its clients."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from deployments.protocol.base import Closed


def _no_number(alias: str) -> str:
    if alias.isdecimal():
        raise ValueError("a number names a version, not an alias")
    return alias


# As the registry has it, whose module clients do not import.
_Alias = Annotated[
    str, Field(pattern="^[a-z0-9][a-z0-9._-]{0,62}$", description="which alias"), AfterValidator(_no_number)
]


class Canary(BaseModel):
    """A version that gets a share of what is asked of the champion."""

    version: int
    percent: float


class AdapterVersion(BaseModel):
    """What there is to know of one version before it is promoted; its manifest has the rest."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # metrics of a forced version may be NaN

    model_id: str = Field(description="what a request names to get exactly this version")
    version: int
    base_model: str
    aliases: list[str] = Field(description="that point at it")
    canary_percent: float | None = Field(
        None, description="its share of the champion's traffic, where it is the canary"
    )
    created: datetime
    chat_format: str
    method: str | None = Field(description="sft, dpo or kto, where it is known")
    trained_from: str | None = Field(description="the version that training went on from")
    run_name: str | None
    metrics: dict[str, float]
    forced: bool = Field(description="registered although it failed a check")
    forced_because: str | None


class Adapter(BaseModel):
    """An adapter, and where its traffic goes."""

    object: Literal["adapter"] = "adapter"
    name: str
    aliases: dict[str, int]
    canary: Canary | None
    versions: list[AdapterVersion] = Field(description="oldest first")


class AdapterList(BaseModel):
    """Answer of `GET /v1/adapters`."""

    object: Literal["list"] = "list"
    data: list[Adapter]


class PromoteRequest(Closed):
    """Body of `POST /v1/adapters/{name}/promote`."""

    version: int = Field(ge=1, lt=10**9)
    percent: float = Field(100, gt=0, le=100, description="below 100: as a canary beside the champion, for this share")
    alias: _Alias = "champion"


class RollbackRequest(Closed):
    """Body of `POST /v1/adapters/{name}/rollback`; it may be left out."""

    alias: _Alias = "champion"


class AdapterChange(BaseModel):
    """Where an alias' traffic goes after a promotion or rollback, and where it went before."""

    object: Literal["adapter.alias"] = "adapter.alias"
    name: str
    base_model: str
    alias: str
    version: int
    canary: Canary | None
    previous_version: int | None = Field(description="null where the alias is new")
    previous_canary: Canary | None


class DeletedVersion(BaseModel):
    """Answer of `DELETE /v1/adapters/{name}/versions/{version}`."""

    object: Literal["adapter.version"] = "adapter.version"
    name: str
    version: int
    deleted: Literal[True] = True
