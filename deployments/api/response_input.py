"""A response's input, together with what is stored before it -> items to store, and the chat that renders them.

A kind of item is read in `_item`, and becomes part of the chat in `_add_to_chat`. Errors in the chat are raised with
the places of the response's request. Knows nothing of HTTP.
"""

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from deployments.errors import (
    ContextLengthExceeded,
    InputRefused,
    PreviousResponseNotFound,
    ResponseFormatRefused,
    ResponseNotFound,
)
from deployments.protocol.chat import ChatCompletionRequest, ChatMessage
from deployments.protocol.generation import SamplingFields
from deployments.protocol.response_items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionCallOutputParam,
    FunctionCallParam,
    InputMessage,
    InputText,
    Item,
    ItemReferenceParam,
    MessageParam,
    OutputMessage,
    OutputText,
    ReasoningParam,
)
from deployments.protocol.response_request import ResponseRequest
from deployments.protocol.tools import CalledFunction, MessageToolCall, ToolCallFields
from deployments.responses.store import Earlier, StoredItem
from training.errors import ChatFormatError

_ITEM: TypeAdapter[Item] = TypeAdapter(Item)
_SCHEMA_PLACES = ((r"^tools\.(\d+)\.function\.", r"tools.\1."), (r"^response_format\.json_schema\.", "text.format."))


@dataclass(frozen=True, slots=True)
class ResponseInput:
    """What a response is made from.

    Attributes:
        items: those of earlier responses first; instructions are none.
        messages: what the model reads.
        places: where each message comes from in the request.
    """

    items: list[StoredItem]
    messages: list[ChatMessage]
    places: list[str]

    def chat_request(self, body: ResponseRequest) -> ChatCompletionRequest:
        """The chat completion that answers a request with this input."""
        fields: dict[str, Any] = {name: getattr(body, name) for name in SamplingFields.model_fields}
        tools = body.tool_fields()
        fields |= {name: getattr(tools, name) for name in ToolCallFields.model_fields}
        if body.with_logprobs:
            fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
        return ChatCompletionRequest(
            **fields,
            messages=self.messages,
            max_tokens=body.max_output_tokens,
            min_tokens=body.min_tokens,
            response_format=body.text_format.response_format(),
        )

    @contextmanager
    def placed_errors(self) -> Iterator[None]:
        """Raise errors of the block, which renders the chat, with their places in the response's request."""
        try:
            yield
        except ChatFormatError as error:
            if error.message_index is None:
                raise InputRefused("input has no messages: expected at least one", "input") from error
            place = self.places[error.message_index]
            message = (
                str(error).removeprefix(f"messages[{error.message_index}]").replace(".tool_call_id", ".call_id", 1)
            )
            raise InputRefused(f"{place}{message}", place) from error
        except ContextLengthExceeded as error:
            message = str(error).replace("the messages take", "the input takes")
            message = message.replace("lower max_tokens", "lower max_output_tokens")
            param = {"messages": "input", "max_tokens": "max_output_tokens"}.get(error.param or "", error.param)
            raise ContextLengthExceeded(message, param) from error
        except ResponseFormatRefused as error:
            message, param = _schema_place(str(error)), _schema_place(error.param or "")
            raise ResponseFormatRefused(message, param) from error


def referenced_ids(body: ResponseRequest) -> list[str]:
    """The ids of the stored items that the input refers to."""
    return [item.id for item in body.input if isinstance(item, ItemReferenceParam)]


def read_input(body: ResponseRequest, earlier: Earlier) -> ResponseInput:
    """The input of a request, after the input and output of the response that it continues.

    Raises:
        PreviousResponseNotFound: there is no such response.
        ResponseNotFound: the input refers to an item that is not stored.
    """
    placed: list[tuple[str, StoredItem]] = []
    if body.previous_response_id is not None:
        if earlier.previous is None:
            problem = f"Previous response with id {body.previous_response_id!r:.160} not found."
            raise PreviousResponseNotFound(problem, "previous_response_id")
        items = [*earlier.previous.input_items, *earlier.previous.output_items]
        placed += [("previous_response_id", item) for item in items]
    placed += _given_items(body, earlier.items)
    messages: list[tuple[str, ChatMessage]] = []
    if body.instructions:
        messages.append(("instructions", ChatMessage(role="system", content=body.instructions)))
    for place, stored in placed:
        _add_to_chat(messages, place, read_stored(stored))
    return ResponseInput(
        [item for _, item in placed], [message for _, message in messages], [place for place, _ in messages]
    )


def read_stored(stored: StoredItem) -> Item:
    """A stored item as the API returns it."""
    return _ITEM.validate_python({**json.loads(stored.body), "id": stored.id})


def to_store(item: Item) -> StoredItem:
    """An item as it is stored."""
    return StoredItem(item.id, item.model_dump_json(exclude={"id"}))


def new_item_id(prefix: str) -> str:
    """An id for an item, which begins with its kind's prefix."""
    return f"{prefix}_{uuid.uuid4().hex}"


def _given_items(body: ResponseRequest, referenced: Sequence[StoredItem | None]) -> list[tuple[str, StoredItem]]:
    if isinstance(body.input, str):
        return [("input", _item(MessageParam(role="user", content=body.input)))]
    placed = []
    references = iter(referenced)
    for index, item in enumerate(body.input):
        if isinstance(item, ItemReferenceParam):
            stored = next(references)
            if stored is None:
                raise ResponseNotFound(f"Item with id {item.id!r} not found.", f"input.{index}.id")
            placed.append((f"input.{index}", stored))
        elif not isinstance(item, ReasoningParam):
            placed.append((f"input.{index}", _item(item)))
    return placed


def _item(given: MessageParam | FunctionCallParam | FunctionCallOutputParam) -> StoredItem:
    """An item as it is sent -> as it is stored."""
    status = given.status or "completed"
    if isinstance(given, FunctionCallParam):
        item_id = given.id or new_item_id("fc")
        return to_store(
            FunctionCallItem(
                id=item_id, status=status, call_id=given.call_id, name=given.name, arguments=given.arguments
            )
        )
    if isinstance(given, FunctionCallOutputParam):
        item_id = given.id or new_item_id("fco")
        return to_store(FunctionCallOutputItem(id=item_id, status=status, call_id=given.call_id, output=given.text()))
    item_id, texts = given.id or new_item_id("msg"), given.texts()
    if given.role == "assistant":
        return to_store(OutputMessage(id=item_id, status=status, content=[OutputText(text=text) for text in texts]))
    content = [InputText(text=text) for text in texts]
    return to_store(InputMessage(id=item_id, status=status, role=given.role, content=content))


def _add_to_chat(messages: list[tuple[str, ChatMessage]], place: str, item: Item) -> None:
    """Continue the chat with an item; the calls after an assistant's message are part of it."""
    if isinstance(item, FunctionCallItem):
        function = CalledFunction(name=item.name, arguments=item.arguments)
        call = MessageToolCall(id=item.call_id, function=function)
        if messages and messages[-1][1].role == "assistant":
            messages[-1][1].tool_calls.append(call)
        else:
            messages.append((place, ChatMessage(role="assistant", tool_calls=[call])))
    elif isinstance(item, FunctionCallOutputItem):
        messages.append((place, ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id)))
    else:
        content = "".join(part.text for part in item.content)
        messages.append((place, ChatMessage(role=item.role, content=content, tool_calls=[])))


def _schema_place(text: str) -> str:
    """A path in a chat's request, or a message that begins with one, with the path in a response's request."""
    for pattern, place in _SCHEMA_PLACES:
        text = re.sub(pattern, place, text)
    return text
