"""Base types of the API's wire format: strict request models, usage, errors."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator


class StrictModel(BaseModel):
    """A request type that refuses unknown fields, values of another type than the field's, NaN and infinity.

    An error response names one mistake. Collecting all mistakes of a 2 MB body would block the event loop for seconds,
    so lists are FailFast, and only the first unknown field is looked at.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, body: Any) -> Any:
        known_fields = {field.alias or name for name, field in cls.model_fields.items()}
        if not isinstance(body, dict) or body.keys() <= known_fields:
            return body
        unknown_field = next(field for field in body if field not in known_fields)
        return {field: value for field, value in body.items() if field in known_fields or field == unknown_field}


TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True)]
FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """Breakdown of the prompt tokens."""

    cached_tokens: int = Field(0, description="prompt tokens served from the prefix cache")


class Usage(BaseModel):
    """Exact token counts of one request; each prompt counts once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every error response."""

    error: ErrorDetail
