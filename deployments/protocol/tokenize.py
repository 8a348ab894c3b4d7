"""Wire types of `/tokenize` and `/detokenize`, with vLLM's names."""

from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from deployments.protocol.base import Closed, TokenIds
from deployments.protocol.chat import ChatMessage


class TokenizeRequest(Closed):
    """Body of `POST /tokenize`: a text as `/v1/completions` takes it, or a dialog as `/v1/chat/completions` does."""

    model: str | None = Field(None, description="default: the base; an adapter's dialogs are in its own chat format")
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(
        None,
        description="begin a prompt with the model's BOS token, if it has one (default: true); "
        "a dialog has the tokens of its chat format, and no others",
    )
    return_token_strs: bool = Field(False, description="the tokens' names in the vocabulary too")

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens: the chat format of the messages has its own, leave it out")
        return self


class TokenizeResponse(BaseModel):
    """Token ids; a dialog's are exactly those that an answer to it would begin from."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Closed):
    """Body of `POST /detokenize`."""

    model: str | None = Field(None, description="default: the base, whose vocabulary its adapters share")
    tokens: TokenIds


class DetokenizeResponse(BaseModel):
    """The text, control tokens written out; bytes that are no UTF-8 are U+FFFD."""

    prompt: str
