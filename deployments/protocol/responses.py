"""A response as it is returned, streamed and stored: wire types of `/v1/responses`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.protocol.chat import ChatTokenLogprob
from deployments.protocol.response_items import OutputItem, OutputText


class ResponseError(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why a response ended early."""

    reason: Literal["max_output_tokens"]


class InputTokensDetails(BaseModel):
    """Breakdown of the input tokens."""

    cached_tokens: int = Field(0, description="input tokens served from the prefix cache")
    cache_write_tokens: int = Field(0, description="always 0: writing to the cache is not counted")


class OutputTokensDetails(BaseModel):
    """Breakdown of the output tokens."""

    reasoning_tokens: int = Field(0, description="always 0: the models here do not reason")


class ResponseUsage(BaseModel):
    """Exact token counts of one response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class PlainFormat(BaseModel):
    """`text.format` of a response without a schema."""

    type: Literal["text", "json_object"]


class SchemaFormat(BaseModel):
    """`text.format` of a response with a schema."""

    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["json_schema"] = "json_schema"
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextConfig(BaseModel):
    """`text` of a response."""

    format: PlainFormat | SchemaFormat
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(BaseModel):
    """`reasoning` of a response."""

    effort: None = None
    summary: None = None


class FunctionTool(BaseModel):
    """One of `tools` of a response."""

    type: Literal["function"] = "function"
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseObject(BaseModel):
    """A response with its output and the settings of its request."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None = None
    model: str = Field(description="the version that answered")
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    reasoning: ReasoningConfig = ReasoningConfig()
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: TextConfig
    tool_choice: str | dict[str, Any]
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]


class DeletedResponse(BaseModel):
    """Response of `DELETE /v1/responses/{response_id}`."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class StreamEvent(BaseModel):
    """A server-sent event; `sequence_number` counts from 0."""

    type: str
    sequence_number: int


class LifecycleEvent(StreamEvent):
    """The response begins or ends."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: ResponseObject


class OutputItemEvent(StreamEvent):
    """An output item begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class _PartEvent(StreamEvent):
    item_id: str
    output_index: int
    content_index: int


class ContentPartEvent(_PartEvent):
    """A part of a message begins or ends."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class TextDeltaEvent(_PartEvent):
    """Text that continues a part, and its tokens if log-probabilities were requested."""

    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    delta: str
    logprobs: list[ChatTokenLogprob] = []


class TextDoneEvent(_PartEvent):
    """The whole text of a part."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    text: str
    logprobs: list[ChatTokenLogprob] = []


class _CallEvent(StreamEvent):
    item_id: str
    output_index: int


class ArgumentsDeltaEvent(_CallEvent):
    """JSON text that continues the arguments of a call."""

    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    delta: str


class ArgumentsDoneEvent(_CallEvent):
    """The whole arguments of a call."""

    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    name: str
    arguments: str
