"""What every part of the API's wire format is built from: closed objects, usage, errors."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator


class Closed(BaseModel):
    """A request type: unknown fields, other types than the field's, NaN and infinity are refused.

    An answer names one thing that is wrong. Looking for more of them in two megabytes of mistakes would hold up the
    event loop for seconds: lists are FailFast, and of unknown fields one is looked at.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, body: Any) -> Any:
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if not isinstance(body, dict) or body.keys() <= known:
            return body
        first = next(field for field in body if field not in known)
        return {field: value for field, value in body.items() if field in known or field == first}


TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True)]
FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """What the prompt's tokens cost."""

    cached_tokens: int = Field(0, description="tokens whose keys and values were there from earlier requests")


class Usage(BaseModel):
    """Exact token counts of one request: each prompt once, all of its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class ErrorDetail(BaseModel):
    """What was wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail
