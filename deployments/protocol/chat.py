"""OpenAI's wire types as Corral speaks them: pydantic only, closed, shared by the ingress and its callers."""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from training.chat.chat_format import Message

MAX_STOP_STRINGS = 16
MAX_LOGIT_BIASES = 1024
MAX_ANSWERS = 8
MAX_PROMPTS = 16
MAX_LOGPROBS = 20


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


class StreamOptions(Closed):
    """`stream_options` of a request."""

    include_usage: bool = False


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


def _nullable(schema: dict[str, Any]) -> None:
    """In the docs too, every field that has a default may be null."""
    for name, field in schema["properties"].items():
        if name not in schema["required"] and {"type": "null"} not in field.get("anyOf", []):
            about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [*field.get("anyOf", [field]), {"type": "null"}], **about}


class GenerationFields(Closed):
    """What both kinds of completion take. A field that is null has its default, as OpenAI has it.

    Names, defaults and ranges are OpenAI's; top_k, min_p, repetition_penalty, min_tokens and ignore_eos are vLLM's.
    """

    model_config = ConfigDict(json_schema_extra=_nullable)

    model: str
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 keeps all tokens")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, max_length=MAX_LOGIT_BIASES, description="token id -> what is added to its logit"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    n: int = Field(1, ge=1, le=MAX_ANSWERS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="whose request it is: a canary takes all of a user's requests or none")
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}

    @field_validator("logit_bias")
    @classmethod
    def _biases_of_token_ids(cls, logit_bias: dict[str, float]) -> dict[str, float]:
        for key in logit_bias:
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ValueError(f'{key[:20]!r} is no token id: its keys are token ids, such as "42"')
        return logit_bias

    @field_validator("stop")
    @classmethod
    def _few_stop_strings(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > MAX_STOP_STRINGS or any(not 0 < len(s) <= 256 for s in strings):
            raise ValueError(f"give up to {MAX_STOP_STRINGS} stop strings of 1 to 256 characters")
        return stop

    @field_validator("stream_options")
    @classmethod
    def _options_of_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("it needs stream: true")
        return options

    @field_validator("min_tokens", check_fields=False)
    @classmethod
    def _min_within_max(cls, min_tokens: int, info: ValidationInfo) -> int:
        for name in ("max_tokens", "max_completion_tokens"):
            limit = info.data.get(name)
            if limit is not None and min_tokens > limit:
                raise ValueError(f"it may be from 0 to {name}, which is {limit}")
        return min_tokens

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def token_biases(self) -> dict[int, float]:
        """`logit_bias` by token id."""
        return {int(token_id): bias for token_id, bias in self.logit_bias.items()}


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
    def asked_tokens(self) -> int | None:
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


TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True)]


class CompletionRequest(GenerationFields):
    """Body of `POST /v1/completions`. With echo, logprobs and max_tokens 0 it scores a text."""

    prompt: (
        str | TokenIds | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)]
    ) = Field(description=f"a text, token ids, or up to {MAX_PROMPTS} of either")
    echo: bool = Field(False, description="the answer begins with the prompt")
    max_tokens: int = Field(16, ge=0, description="default: 16, or less where the context has less room")
    min_tokens: int = Field(0, ge=0, description="the answer cannot end before so many")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="likeliest tokens to report")
    suffix: str | None = Field(None, description="not offered: Llama models cannot fill in")
    best_of: int | None = Field(None, description="not offered: use n")

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _some_prompts(cls, prompt: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        if prompt in ("", []):
            raise ValueError("it is empty: give some text or token ids")
        if isinstance(prompt, list) and isinstance(prompt[0], str | list):
            if len(prompt) > MAX_PROMPTS:
                raise ValueError(f"{len(prompt)} prompts are too many: give up to {MAX_PROMPTS} in one request")
            if "" in prompt or [] in prompt:
                raise ValueError("one of its prompts is empty: give some text or token ids")
        try:
            return validate(prompt)
        except ValidationError as error:
            raise ValueError("give a string, a list of token ids (integers from 0 on), or a list of either") from error

    @field_validator("max_tokens")
    @classmethod
    def _no_tokens_only_to_score(cls, max_tokens: int, info: ValidationInfo) -> int:
        if max_tokens == 0 and not info.data.get("echo"):
            raise ValueError("it may be 0 only with echo: true, which scores the prompt; else give at least 1")
        return max_tokens

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, suffix: str | None) -> str | None:
        if suffix:
            raise ValueError("Llama models cannot fill in before a suffix: leave it out")
        return suffix

    @field_validator("best_of")
    @classmethod
    def _no_best_of(cls, best_of: int | None) -> int | None:
        if best_of not in (None, 1):
            raise ValueError(f"it may only be 1: ask for n answers (up to {MAX_ANSWERS}) and choose among them")
        return best_of

    @property
    def asked_tokens(self) -> int | None:
        """The length that was asked for, None for the default: `max_tokens`, or what the context has room for."""
        return self.max_tokens if "max_tokens" in self.model_fields_set else None

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report at each place, None for no logprobs at all."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the places of the prompt; it is always scored where nothing else is done."""
        if self.max_tokens == 0:
            return self.logprobs or 0
        return self.logprobs if self.echo else None

    def prompts(self) -> list[tuple[str, str | list[int]]]:
        """Each prompt with the name that an error gives it."""
        if isinstance(self.prompt, str):
            return [("prompt", self.prompt)]
        if isinstance(self.prompt[0], int):
            return [("prompt", self.prompt)]
        return [(f"prompt.{i}", cast(str | list[int], prompt)) for i, prompt in enumerate(self.prompt)]


AnyCompletionRequest = ChatCompletionRequest | CompletionRequest


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


class CompletionLogprobs(BaseModel):
    """One entry for each token of the text; the first token of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] = Field(description="the token itself is among them")
    text_offset: list[int] = Field(description="where the token begins in the text, in characters")


class CompletionChoice(BaseModel):
    """One answer of a completion; answer i to prompt p has the index p * n + i. In a stream, a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """Answer of `POST /v1/completions`, and each of its events when it is streamed."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


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


class ErrorDetail(BaseModel):
    """What was wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail
