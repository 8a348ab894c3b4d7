"""Body of `POST /v1/responses`. Unknown fields are refused."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from deployments.protocol.base import StrictModel, field_error
from deployments.protocol.chat import JsonSchemaFormat, ResponseFormat
from deployments.protocol.extra_fields import PROMPT_CACHE_OPTIONS, REASONING, RESPONSE, RESPONSE_STREAM_OPTIONS
from deployments.protocol.generation import MAX_LOGPROBS, SamplingFields
from deployments.protocol.response_items import EchoedText, ItemParam
from deployments.protocol.response_tools import ResponseToolFields

MAX_METADATA = 16
OUTPUT_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (
    OUTPUT_LOGPROBS,
    # What these add belongs to items that no response here has.
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)


class TextFormat(StrictModel):
    """`text.format`: any text, any JSON object, or JSON that follows `schema`. It is flat, unlike `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="echoed")
    description: EchoedText | None = Field(None, description="echoed")
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="JSON Schema 2020-12; unsupported keywords are refused"
    )
    strict: bool | None = Field(None, description="true: every object must have additionalProperties: false")

    @model_validator(mode="after")
    def _schema_only_for_its_type(self) -> "TextFormat":
        if self.type == "json_schema" and self.schema_ is None:
            raise field_error(type(self), "schema", "type json_schema needs schema", None)
        for name, value in (("schema", self.schema_), ("strict", self.strict)):
            if self.type != "json_schema" and value:
                raise field_error(type(self), name, f"type {self.type} does not take {name}: send json_schema", value)
        return self

    def response_format(self) -> ResponseFormat:
        """The same, as chat completions have it."""
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        json_schema = JsonSchemaFormat.model_validate({"schema": self.schema_, "strict": self.strict})
        return ResponseFormat(type=self.type, json_schema=json_schema)


class TextOptions(StrictModel):
    """`text` of a request."""

    format: TextFormat | None = Field(None, description="default: any text")
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="echoed, and not used")

    @field_validator("format", mode="before")
    @classmethod
    def _empty_is_not_given(cls, text_format: Any) -> Any:
        return None if text_format in ({}, []) else text_format


class ReasoningOptions(StrictModel):
    """`reasoning` of a request. The models here do not reason before they answer."""

    extra_fields = REASONING


class PromptCacheOptions(StrictModel):
    """`prompt_cache_options` of a request. All prompts share one prefix cache, which needs none."""

    extra_fields = PROMPT_CACHE_OPTIONS


class ResponseStreamOptions(StrictModel):
    """`stream_options` of a request."""

    extra_fields = RESPONSE_STREAM_OPTIONS


class ResponseRequest(SamplingFields, ResponseToolFields):
    """Body of `POST /v1/responses`."""

    extra_fields = RESPONSE

    input: EchoedText | Annotated[list[ItemParam], Field(fail_fast=True)] = Field(
        description="a text from the user, or messages and references to stored items"
    )
    instructions: EchoedText | None = Field(
        None, description="a system message before all others; not inherited from previous_response_id"
    )
    previous_response_id: EchoedText | None = Field(
        None, description="a stored response of the same key: its input and output come before this input"
    )
    store: bool = Field(True, description="false: nothing is stored, so nothing can be retrieved or continued")
    max_output_tokens: int | None = Field(None, ge=1, description="default: what fits the context")
    min_tokens: int = Field(0, ge=0, description="a response cannot end before so many tokens")
    text: TextOptions | None = Field(None, description="default: any text")
    include: Annotated[list[str], Field(fail_fast=True)] = Field([], description=f"{OUTPUT_LOGPROBS} has an effect")
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description="most likely tokens to report for each token")
    metadata: dict[EchoedText, EchoedText] = Field({}, description="up to 16 pairs, echoed")
    user: EchoedText | None = Field(None, description="id of the end user: a canary gets all of their requests or none")
    safety_identifier: EchoedText | None = Field(None, description="newer name of user")
    prompt_cache_key: EchoedText | None = Field(None, description="echoed: all prompts share one prefix cache")
    prompt_cache_retention: EchoedText | None = Field(None, description="echoed, and not used")
    prompt_cache_options: PromptCacheOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream_options: ResponseStreamOptions | None = None

    @field_validator("input")
    @classmethod
    def _some_input(cls, given: Any) -> Any:
        if not given:
            raise ValueError("must not be empty: give a text or messages")
        return given

    @field_validator("include")
    @classmethod
    def _known_members(cls, include: list[str]) -> list[str]:
        if unknown := [name for name in include if name not in _INCLUDABLE]:
            raise ValueError(f"{unknown[0]!r:.80} is not known: expected {OUTPUT_LOGPROBS}, or leave it out")
        return include

    @field_validator("metadata", mode="before")
    @classmethod
    def _without_null(cls, metadata: Any) -> Any:
        if isinstance(metadata, dict):
            return {key: value for key, value in metadata.items() if value not in (None, [], {})}
        return {} if metadata == [] else metadata

    @field_validator("metadata")
    @classmethod
    def _few_short_pairs(cls, metadata: dict[str, str]) -> dict[str, str]:
        if len(metadata) > MAX_METADATA:
            raise ValueError(f"{len(metadata)} pairs are too many: expected at most {MAX_METADATA}")
        for key, value in metadata.items():
            if len(key) > 64 or len(value) > 512:
                raise ValueError(f"{key[:64]!r} is too long: expected keys of up to 64 characters, values of up to 512")
        return metadata

    @property
    def with_logprobs(self) -> bool:
        """Whether the response has the log-probability of every token; `top_logprobs` asks for them, too."""
        return OUTPUT_LOGPROBS in self.include or self.top_logprobs > 0

    @property
    def text_format(self) -> TextFormat:
        """What the output text must be."""
        return (self.text and self.text.format) or TextFormat(type="text")
