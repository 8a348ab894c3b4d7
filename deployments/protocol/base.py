"""Base types of the API's wire format: strict request models, usage, errors."""

import difflib
import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from deployments.protocol.extra_fields import ExtraField


def _null_means_not_given(schema: dict[str, Any]) -> None:
    """Mark every field that has a default as nullable in the OpenAPI schema, and every other field as null only."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", []) and {"type": "null"} not in field.get("anyOf", []):
            annotations = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [*field.get("anyOf", [field]), {"type": "null"}], **annotations}
    schema["additionalProperties"] = {"type": "null"}


class StrictModel(BaseModel):
    """A request type that refuses values of another type than the field's, NaN and infinity, and misspelt fields.

    A field that is null has its default. `extra_fields` are accepted without effect, or refused with a sentence. An
    error response names one mistake: collecting all mistakes of a 2 MB body would block the event loop for seconds, so
    lists are FailFast, and the first field that is not accepted ends the validation.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_null_means_not_given)
    extra_fields: ClassVar[Mapping[str, ExtraField]] = {}

    @model_validator(mode="before")
    @classmethod
    def _given_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        is_required = _is_required_by_name(cls)
        fields_given: dict[str, Any] = {}
        for name, value in body.items():
            if name in is_required:
                if value is not None or is_required[name]:
                    fields_given[name] = value
            elif value is not None:
                cls._check_extra(name, value)
        return fields_given

    @classmethod
    def _check_extra(cls, name: Any, value: Any) -> None:
        extra = cls.extra_fields.get(name)
        if extra is None:
            known_names = [*_is_required_by_name(cls), *cls.extra_fields]
            nearest = difflib.get_close_matches(str(name)[:64], known_names, 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "leave it out, or see the fields at /docs"
            raise field_error(cls, name, f"unknown field: {hint}", value)
        if not extra.accepts(value):
            problem = "not supported with this value" if extra.values else "not supported"
            raise field_error(cls, name, f"{problem}: {extra.instead}", value)


@functools.cache
def _is_required_by_name(model: type[StrictModel]) -> dict[str, bool]:
    """The names of a type's fields, as JSON has them, and whether each is required."""
    return {field.alias or name: field.is_required() for name, field in model.model_fields.items()}


def field_error(model: type[BaseModel], name: Any, message: str, value: Any) -> ValidationError:
    """An error in one field, for validators of a whole object."""
    problem = PydanticCustomError("needed" if value is None else "value_error", "{message}", {"message": message})
    return ValidationError.from_exception_data(
        model.__name__, [InitErrorDetails(type=problem, loc=(name,), input=value)]
    )


TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True)]
FinishReason = Literal["stop", "length"]
ChatFinishReason = FinishReason | Literal["tool_calls"]


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
