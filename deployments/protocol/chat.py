"""Wire types of `POST /v1/chat/completions`, shared by server and clients. Unknown request fields are refused."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from deployments.protocol.base import ChatFinishReason, StrictModel, Usage, field_error
from deployments.protocol.completions import CompletionRequest
from deployments.protocol.extra_fields import CHAT, MESSAGE, TEXT_PART
from deployments.protocol.generation import MAX_LOGPROBS, GenerationFields
from deployments.protocol.tools import AnswerToolCall, MessageToolCall, ToolCallDelta, ToolCallFields
from training.chat.messages import ROLE_ALIASES, Message
from training.chat.tools import with_tools


class TextPart(StrictModel):
    """One part of a message's content. Only text is accepted."""

    extra_fields = TEXT_PART

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, part_type: Any) -> Any:
        if part_type in ("input_text", "output_text"):  # their names in OpenAI's Responses API
            return "text"
        if isinstance(part_type, str) and any(word in part_type for word in ("image", "audio", "video", "file")):
            raise ValueError(f"{part_type:.40} is not supported: the models here read text only")
        return part_type


class ChatMessage(StrictModel):
    """One message of a conversation. Which orders of roles can be rendered depends on the chat format.

    The messages of an assistant and of a tool may lack content.
    """

    extra_fields = MESSAGE

    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = Field(None, description="accepted but not used")
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True)] = Field([], description="of an assistant")
    tool_call_id: str | None = Field(None, description="of a tool's message: the call that it is the result of")

    @model_validator(mode="after")
    def _fields_of_its_role(self) -> "ChatMessage":
        if self.content in (None, []) and self.role not in ("assistant", "tool"):
            raise field_error(type(self), "content", f"a message from the {self.role:.40} needs text", self.content)
        if self.tool_calls and self.role != "assistant":
            raise field_error(type(self), "tool_calls", f"only an assistant calls tools, not the {self.role:.40}", "")
        if self.tool_call_id and self.role != "tool":
            raise field_error(type(self), "tool_call_id", f"only a tool's message has one, not the {self.role:.40}", "")
        return self

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])


def dialog(messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] = ()) -> list[Message]:
    """Messages and tools for a chat format, which checks the roles."""
    turns = [
        Message(
            ROLE_ALIASES.get(message.role, message.role),  # type: ignore[arg-type]  # any str so far
            message.text(),
            tool_calls=tuple(call.to_call() for call in message.tool_calls),
            tool_call_id=message.tool_call_id or "",
        )
        for message in messages
    ]
    return with_tools(turns, tools)


class JsonSchemaFormat(StrictModel):
    """`response_format.json_schema`: the schema that the completion must follow."""

    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="accepted but not used")
    description: str | None = Field(None, description="accepted but not used")
    schema_: dict[str, Any] = Field(alias="schema", description="JSON Schema 2020-12; unsupported keywords are refused")
    strict: bool | None = Field(None, description="true: every object must have additionalProperties: false")


class ResponseFormat(StrictModel):
    """`response_format`: any text, any JSON object, or JSON that follows a schema.

    Completions are constrained to it, with or without `strict`.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(None, description="only with type json_schema, which requires it")
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="llama.cpp's place for the schema, with type json_object or json_schema"
    )

    @model_validator(mode="after")
    def _schema_only_for_its_type(self) -> "ResponseFormat":
        if self.schema_ is not None:
            if self.json_schema is not None or self.type == "text":
                raise field_error(type(self), "schema", "send type json_schema with json_schema.schema", self.schema_)
        elif (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError(f"type {self.type} {'needs' if self.json_schema is None else 'does not take'} json_schema")
        return self


class ChatCompletionRequest(GenerationFields, ToolCallFields):
    """Body of `POST /v1/chat/completions`."""

    extra_fields = CHAT

    messages: list[ChatMessage] = Field(fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, description="default: what fits the context")
    max_completion_tokens: int | None = Field(None, ge=1, description="newer name of max_tokens")
    min_tokens: int = Field(0, ge=0, description="a completion cannot end before so many tokens")
    logprobs: bool = False
    top_logprobs: int = Field(
        0, ge=0, le=MAX_LOGPROBS, description="most likely tokens to report; requires logprobs: true"
    )
    response_format: ResponseFormat | None = Field(None, description="default: any text")

    @field_validator("max_completion_tokens")
    @classmethod
    def _max_tokens_agree(cls, max_completion_tokens: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("max_tokens") not in (None, max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ: set one of them")
        return max_completion_tokens

    @field_validator("top_logprobs")
    @classmethod
    def _top_logprobs_require_logprobs(cls, top_logprobs: int, info: ValidationInfo) -> int:
        if not info.data.get("logprobs"):
            raise ValueError("requires logprobs: true")
        return top_logprobs

    @property
    def requested_max_tokens(self) -> int | None:
        """The requested length, None for the default: what fits the context."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens to report at each position, None for no logprobs at all."""
        return self.top_logprobs if self.logprobs else None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the positions of the prompt."""
        return None

    def dialog(self) -> list[Message]:
        """The messages for a chat format."""
        return dialog(self.messages, self.tool_definitions())


AnyCompletionRequest = ChatCompletionRequest | CompletionRequest


class TopLogprob(BaseModel):
    """A candidate token at a position, with its log-probability (at least -9999).

    A token that is not valid UTF-8 by itself is written like `bytes:\\xf0\\x9f`.
    """

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A generated token, and the most likely tokens at its position, most likely first."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message or of a chunk, without those of a stop string."""

    content: list[ChatTokenLogprob]


class AssistantMessage(BaseModel):
    """The generated message."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null if the answer has calls and no text")
    tool_calls: list[AnswerToolCall] | None = Field(None, exclude_if=lambda calls: calls is None)


class Choice(BaseModel):
    """One of the `n` completions."""

    index: int = 0
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason


class ChatCompletion(BaseModel):
    """Response of `POST /v1/chat/completions` without streaming."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    service_tier: str | None = None


class ChoiceDelta(BaseModel):
    """What a chunk adds to its choice."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    """The choice of a chunk."""

    index: int = 0
    delta: ChoiceDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """One server-sent event of a streamed response; the usage chunk has no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    service_tier: str | None = None
