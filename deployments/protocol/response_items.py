"""Items of a response: what a client may send as `input`, and what is stored, returned and listed.

A kind of item has one type for what clients send, which is lenient, and one for what they get, which is complete.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from deployments.protocol.base import StrictModel, field_error
from deployments.protocol.chat import ChatTokenLogprob, TextPart
from deployments.protocol.extra_fields import RESPONSE_MESSAGE, RESPONSE_PART

ItemStatus = Literal["in_progress", "completed", "incomplete"]


def _valid_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("contains half a UTF-16 surrogate pair: expected valid Unicode text") from None
    return text


EchoedText = Annotated[str, AfterValidator(_valid_unicode)]
ItemId = Annotated[EchoedText, Field(min_length=1, max_length=128)]


class ContentPart(TextPart):
    """A part of a message: `input_text`, `output_text` or `text`."""

    extra_fields = RESPONSE_PART

    text: EchoedText


class MessageParam(StrictModel):
    """A message, with or without what the API adds to one. Only an assistant's message may lack content."""

    extra_fields = RESPONSE_MESSAGE

    type: Literal["message"] = "message"
    id: ItemId | None = Field(None, description="of an item that the API returned")
    status: ItemStatus | None = Field(None, description="of an item that the API returned")
    role: Literal["user", "assistant", "system", "developer"]
    content: EchoedText | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _only_messages(cls, item_type: Any) -> Any:
        if isinstance(item_type, str) and item_type != "message":
            if item_type in ("function_call", "function_call_output"):
                raise ValueError(f"{item_type} is not supported yet: send what it says as a message")
            raise ValueError(f"{item_type:.40} is not supported: send items of type message or item_reference")
        return item_type

    @model_validator(mode="after")
    def _content_unless_assistant(self) -> "MessageParam":
        if self.content in (None, []) and self.role != "assistant":
            raise field_error(type(self), "content", f"a message from the {self.role} needs text", self.content)
        return self

    def texts(self) -> list[str]:
        """The text of each part."""
        return [self.content] if isinstance(self.content, str) else [part.text for part in self.content or []]


class ItemReferenceParam(StrictModel):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: ItemId


class ReasoningParam(BaseModel):
    """What another model thought; it is accepted, and is not part of a prompt."""

    type: Literal["reasoning"]


def _kind(item: Any) -> str:
    """The tag of an item's type. What is none of the others is taken for a message, whose type names the mistake."""
    if not isinstance(item, dict):
        return str(getattr(item, "type", "message"))
    if item.get("type") is None and item.get("role") is None and item.get("id") is not None:
        return "item_reference"
    return item["type"] if item.get("type") in ("item_reference", "reasoning") else "message"


ItemParam = Annotated[
    Annotated[MessageParam, Tag("message")]
    | Annotated[ItemReferenceParam, Tag("item_reference")]
    | Annotated[ReasoningParam, Tag("reasoning")],
    Discriminator(_kind),
]


class InputText(BaseModel):
    """A part of a message to the model."""

    type: Literal["input_text"] = "input_text"
    text: str


class OutputText(BaseModel):
    """A part of a message from the model."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[dict[str, Any]] = Field([], description="always empty")
    logprobs: list[ChatTokenLogprob] = Field([], description="with include message.output_text.logprobs")


class InputMessage(BaseModel):
    """A message to the model."""

    type: Literal["message"] = "message"
    id: str
    status: ItemStatus = "completed"
    role: Literal["user", "system", "developer"]
    content: list[InputText]


class OutputMessage(BaseModel):
    """A message from the model."""

    type: Literal["message"] = "message"
    id: str
    status: ItemStatus = "completed"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


OutputItem = OutputMessage
Item = Annotated[InputMessage | OutputMessage, Field(discriminator="role")]


class ItemList(BaseModel):
    """Response of `GET /v1/responses/{response_id}/input_items`."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = Field(description="null if the list is empty")
    last_id: str | None = Field(description="null if the list is empty")
    has_more: bool
