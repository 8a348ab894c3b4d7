"""Items of a response: what a client may send as `input`, and what is stored, returned and listed.

A kind of item has one type for what clients send, which is lenient, and one for what they get, which is complete.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from deployments.protocol.base import StrictModel, field_error
from deployments.protocol.chat import ChatTokenLogprob, TextPart
from deployments.protocol.extra_fields import RESPONSE_CALL, RESPONSE_MESSAGE, RESPONSE_PART

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
            raise ValueError(f"{item_type:.40} is not supported: send messages, function calls or their outputs")
        return item_type

    @model_validator(mode="after")
    def _content_unless_assistant(self) -> "MessageParam":
        if self.content in (None, []) and self.role != "assistant":
            raise field_error(type(self), "content", f"a message from the {self.role} needs text", self.content)
        return self

    def texts(self) -> list[str]:
        """The text of each part."""
        return [self.content] if isinstance(self.content, str) else [part.text for part in self.content or []]


class FunctionCallParam(StrictModel):
    """A call of a function by the model."""

    extra_fields = RESPONSE_CALL

    type: Literal["function_call"]
    id: ItemId | None = Field(None, description="of an item that the API returned")
    status: ItemStatus | None = Field(None, description="of an item that the API returned")
    call_id: ItemId
    name: EchoedText
    arguments: EchoedText = Field("", description="JSON text of an object")


class FunctionCallOutputParam(StrictModel):
    """What a called function returned."""

    extra_fields = RESPONSE_CALL

    type: Literal["function_call_output"]
    id: ItemId | None = Field(None, description="of an item that the API returned")
    status: ItemStatus | None = Field(None, description="of an item that the API returned")
    call_id: ItemId = Field(description="of the call that it is the result of")
    name: EchoedText | None = Field(None, description="accepted but not used")
    output: EchoedText | Annotated[list[ContentPart], Field(fail_fast=True)] = ""

    def text(self) -> str:
        """The output as one string."""
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class ItemReferenceParam(StrictModel):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: ItemId


class ReasoningParam(BaseModel):
    """What another model thought; it is accepted, and is not part of a prompt."""

    type: Literal["reasoning"]


_OTHER_KINDS = ("item_reference", "reasoning", "function_call", "function_call_output")


def _kind(item: Any) -> str:
    """The tag of an item's type. What is none of the others is taken for a message, whose type names the mistake."""
    if not isinstance(item, dict):
        return str(getattr(item, "type", "message"))
    if item.get("type") is None and item.get("role") is None and item.get("id") is not None:
        return "item_reference"
    return item["type"] if item.get("type") in _OTHER_KINDS else "message"


ItemParam = Annotated[
    Annotated[MessageParam, Tag("message")]
    | Annotated[ItemReferenceParam, Tag("item_reference")]
    | Annotated[ReasoningParam, Tag("reasoning")]
    | Annotated[FunctionCallParam, Tag("function_call")]
    | Annotated[FunctionCallOutputParam, Tag("function_call_output")],
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


class FunctionCallItem(BaseModel):
    """A call of a function by the model; `arguments` is JSON text, cut off if the status is incomplete."""

    type: Literal["function_call"] = "function_call"
    id: str
    status: ItemStatus = "completed"
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(BaseModel):
    """What a called function returned."""

    type: Literal["function_call_output"] = "function_call_output"
    id: str
    status: ItemStatus = "completed"
    call_id: str
    output: str


OutputItem = OutputMessage | FunctionCallItem
Item = InputMessage | OutputMessage | FunctionCallItem | FunctionCallOutputItem


class ItemList(BaseModel):
    """Response of `GET /v1/responses/{response_id}/input_items`."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = Field(description="null if the list is empty")
    last_id: str | None = Field(description="null if the list is empty")
    has_more: bool
