"""`POST /v1/completions`: texts or token ids in, texts out, with OpenAI's log-probabilities."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, field_validator

from deployments.protocol.base import FinishReason, TokenIds, Usage
from deployments.protocol.generation import MAX_ANSWERS, MAX_LOGPROBS, GenerationFields

MAX_PROMPTS = 16


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
    def requested_max_tokens(self) -> int | None:
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
