"""Wire types of `POST /v1/completions`: texts or token ids in, texts out, with OpenAI's log-probabilities."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, field_validator

from deployments.protocol.base import FinishReason, TokenIds, Usage
from deployments.protocol.generation import MAX_LOGPROBS, GenerationFields

MAX_PROMPTS = 2048


class CompletionRequest(GenerationFields):
    """Body of `POST /v1/completions`. `echo`, `logprobs` and `max_tokens: 0` score a text."""

    prompt: (
        str | TokenIds | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)]
    ) = Field(description=f"a text, token ids, or up to {MAX_PROMPTS} of either")
    echo: bool = Field(False, description="prepend the prompt to each completion")
    max_tokens: int = Field(16, ge=0, description="default: 16, or what fits the context")
    min_tokens: int = Field(0, ge=0, description="a completion cannot end before so many tokens")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="most likely tokens to report")
    suffix: str | None = Field(None, description="not supported: Llama models do not infill")

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _prompts_not_empty(cls, prompt: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        if prompt in ("", []):
            raise ValueError("must not be empty: give text or token ids")
        if isinstance(prompt, list) and isinstance(prompt[0], str | list):
            if len(prompt) > MAX_PROMPTS:
                raise ValueError(f"{len(prompt)} prompts are too many: send at most {MAX_PROMPTS} in one request")
            if "" in prompt or [] in prompt:
                raise ValueError("one of the prompts is empty: give text or token ids")
        try:
            return validate(prompt)
        except ValidationError as error:
            raise ValueError("expected a string, a list of token ids (integers from 0), or a list of either") from error

    @field_validator("max_tokens")
    @classmethod
    def _zero_only_with_echo(cls, max_tokens: int, info: ValidationInfo) -> int:
        if max_tokens == 0 and not info.data.get("echo"):
            raise ValueError("may be 0 only with echo: true, which scores the prompt; otherwise give at least 1")
        return max_tokens

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, suffix: str | None) -> str | None:
        if suffix:
            raise ValueError("not supported, Llama models do not infill: leave it out")
        return suffix

    @property
    def requested_max_tokens(self) -> int | None:
        """The requested length, None for the default: `max_tokens`, or what fits the context."""
        return self.max_tokens if "max_tokens" in self.model_fields_set else None

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens to report at each position, None for no logprobs at all."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the positions of the prompt, which is always scored with `max_tokens: 0`."""
        if self.max_tokens == 0:
            return self.logprobs or 0
        return self.logprobs if self.echo else None

    def prompts(self) -> list[tuple[str, str | list[int]]]:
        """(path for error messages, prompt) of each prompt."""
        if isinstance(self.prompt, str):
            return [("prompt", self.prompt)]
        if isinstance(self.prompt[0], int):
            return [("prompt", self.prompt)]
        return [(f"prompt.{i}", cast(str | list[int], prompt)) for i, prompt in enumerate(self.prompt)]


class CompletionLogprobs(BaseModel):
    """One entry for each token of the text; the first token of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] = Field(description="includes the token itself")
    text_offset: list[int] = Field(description="where each token begins in the text, in characters")


class CompletionChoice(BaseModel):
    """One completion, or in a stream a part of it. Completion i of prompt p has the index p * n + i."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """Response of `POST /v1/completions`, and each server-sent event when it is streamed."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    service_tier: str | None = None
