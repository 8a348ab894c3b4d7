"""Wire types of `/tokenize` and `/detokenize`, named as in vLLM."""

from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from deployments.protocol.base import StrictModel, TokenIds, field_error
from deployments.protocol.chat import ChatMessage
from deployments.protocol.extra_fields import TOKENIZE
from deployments.protocol.tools import ToolFields


class TokenizeRequest(ToolFields):
    """Body of `POST /tokenize`: a text as `/v1/completions` takes it, or messages as `/v1/chat/completions` does."""

    extra_fields = TOKENIZE

    model: str | None = Field(None, description="default: the base model; adapters have their own chat formats")
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(
        None,
        description="prepend the model's BOS token to a prompt, if the model has one (default: true); "
        "messages have the special tokens of their chat format, and no others",
    )
    return_token_strs: bool = Field(False, description="also return the tokens as they are named in the vocabulary")

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens: the chat format of the messages adds its own, leave it out")
        if self.messages is None and self.tools:
            raise field_error(type(self), "tools", "a prompt is encoded as it is: send messages with tools", "")
        return self


class TokenizeResponse(BaseModel):
    """Token ids; those of messages are exactly the prompt of a chat completion."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(StrictModel):
    """Body of `POST /detokenize`."""

    model: str | None = Field(None, description="default: the base model, whose vocabulary its adapters share")
    tokens: TokenIds


class DetokenizeResponse(BaseModel):
    """The text, including control tokens; invalid UTF-8 becomes U+FFFD."""

    prompt: str
