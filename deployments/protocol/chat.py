"""OpenAI's wire types as Corral speaks them: pydantic only, closed, shared by the ingress and its callers."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deployments.protocol.base import Closed, FinishReason, Usage
from deployments.protocol.completions import CompletionRequest
from deployments.protocol.generation import MAX_LOGPROBS, GenerationFields
from training.chat.messages import Message


class TextPart(Closed):
    """One part of a message's content. Only text is accepted."""

    type: Literal["text"]
    text: str


class ChatMessage(Closed):
    """One message of a dialog. Which order of roles is accepted is the chat format's matter."""

    role: str
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: str | None = None

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def dialog(messages: Sequence[ChatMessage]) -> list[Message]:
    """Messages as the chat formats take them; roles are checked there."""
    return [Message(message.role, message.text()) for message in messages]  # type: ignore[arg-type]


class JsonSchemaFormat(Closed):
    """`response_format.json_schema`: what the answer's JSON must be like."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="accepted and not used")
    description: str | None = Field(None, description="accepted and not used")
    schema_: dict[str, Any] = Field(alias="schema", description="JSON Schema 2020-12; what is not supported is refused")
    strict: bool | None = Field(None, description="true: every object must say additionalProperties: false")


class ResponseFormat(Closed):
    """`response_format`: any text, some JSON object, or JSON of a schema. Answers are held to it with or without
    `strict`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(None, description="for type json_schema, and only there")

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError(f"type {self.type} {'needs' if self.json_schema is None else 'does not take'} json_schema")
        return self


class ChatCompletionRequest(GenerationFields):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, description="default: as many as the context has room for")
    max_completion_tokens: int | None = Field(None, ge=1, description="newer name of max_tokens")
    min_tokens: int = Field(0, ge=0, description="the answer cannot end before so many")
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description="likeliest tokens to report; needs logprobs: true")
    response_format: ResponseFormat | None = Field(None, description="default: any text")

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, max_completion_tokens: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("max_tokens") not in (None, max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ: give one")
        return max_completion_tokens

    @field_validator("top_logprobs")
    @classmethod
    def _top_of_logprobs(cls, top_logprobs: int, info: ValidationInfo) -> int:
        if not info.data.get("logprobs"):
            raise ValueError("it needs logprobs: true")
        return top_logprobs

    @property
    def requested_max_tokens(self) -> int | None:
        """The length that was asked for, None for the default: what the context has room for."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report at each place, None for no logprobs at all."""
        return self.top_logprobs if self.logprobs else None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the places of the prompt."""
        return None

    def dialog(self) -> list[Message]:
        """The messages as the chat formats take them."""
        return dialog(self.messages)


AnyCompletionRequest = ChatCompletionRequest | CompletionRequest


class TopLogprob(BaseModel):
    """A token that could stand at a place, with its log-probability there (-9999 at the least).

    A token that is no whole UTF-8 text is written like `bytes:\\xf0\\x9f`.
    """

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A token of an answer, and the likeliest at its place, likeliest first."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message or of a chunk, those of a stop string left out."""

    content: list[ChatTokenLogprob]


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """One answer of a chat completion."""

    index: int = 0
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Answer of `POST /v1/chat/completions` without streaming."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ChoiceDelta(BaseModel):
    """What one chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The choice of a chunk."""

    index: int = 0
    delta: ChoiceDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """One server-sent event of a streamed answer; the usage chunk has no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
