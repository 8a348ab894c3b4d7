"""Wire types of the adapters API (`/v1/adapters`), shared by server and clients."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from deployments.protocol.base import StrictModel


def _not_a_number(alias: str) -> str:
    if alias.isdecimal():
        raise ValueError("a number names a version, not an alias")
    return alias


# Repeats the registry's pattern, so that clients need not import the registry.
_Alias = Annotated[
    str, Field(pattern="^[a-z0-9][a-z0-9._-]{0,62}$", description="name of the alias"), AfterValidator(_not_a_number)
]


class Canary(BaseModel):
    """A version that receives a share of the champion's traffic."""

    version: int
    percent: float


class AdapterVersion(BaseModel):
    """Summary of one version, for deciding on its promotion; its manifest has the rest."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # metrics of a forced version may be NaN

    model_id: str = Field(description="model id that requests exactly this version")
    version: int
    base_model: str
    aliases: list[str] = Field(description="aliases that point at this version")
    canary_percent: float | None = Field(None, description="share of the champion's traffic, if it is the canary")
    created: datetime
    chat_format: str
    method: str | None = Field(description="sft, dpo or kto, if known")
    trained_from: str | None = Field(description="the version that training continued from")
    run_name: str | None
    metrics: dict[str, float]
    forced: bool = Field(description="registered although it failed a check")
    forced_because: str | None


class Adapter(BaseModel):
    """An adapter, its versions, and where its traffic goes."""

    object: Literal["adapter"] = "adapter"
    name: str
    aliases: dict[str, int]
    canary: Canary | None
    versions: list[AdapterVersion] = Field(description="oldest first")


class AdapterList(BaseModel):
    """Response of `GET /v1/adapters`."""

    object: Literal["list"] = "list"
    data: list[Adapter]


class PromoteRequest(StrictModel):
    """Body of `POST /v1/adapters/{name}/promote`."""

    version: int = Field(ge=1, lt=10**9)
    percent: float = Field(100, gt=0, le=100, description="below 100: share of a canary beside the champion")
    alias: _Alias = "champion"


class RollbackRequest(StrictModel):
    """Body of `POST /v1/adapters/{name}/rollback`; optional."""

    alias: _Alias = "champion"


class AdapterChange(BaseModel):
    """Where an alias's traffic goes after a promotion or rollback, and where it went before."""

    object: Literal["adapter.alias"] = "adapter.alias"
    name: str
    base_model: str
    alias: str
    version: int
    canary: Canary | None
    previous_version: int | None = Field(description="null if the alias is new")
    previous_canary: Canary | None


class DeletedVersion(BaseModel):
    """Response of `DELETE /v1/adapters/{name}/versions/{version}`."""

    object: Literal["adapter.version"] = "adapter.version"
    name: str
    version: int
    deleted: Literal[True] = True
