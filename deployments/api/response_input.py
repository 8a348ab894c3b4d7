"""A response's input, together with what is stored before it -> items to store, and the chat that renders them.

A kind of item is read in `_item`, and becomes messages in `_message`. Errors in the chat are raised with the places of
the response's request. Knows nothing of HTTP.
"""

import json
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
    InputMessage,
    InputText,
    Item,
    ItemReferenceParam,
    MessageParam,
    OutputMessage,
    OutputText,
)
from deployments.protocol.response_request import ResponseRequest
from deployments.responses.store import Earlier, StoredItem
from deployments.structured_outputs.grammar import SCHEMA_PARAM
from training.errors import ChatFormatError

_ITEM: TypeAdapter[InputMessage | OutputMessage] = TypeAdapter(Item)


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
            message = str(error).removeprefix(f"messages[{error.message_index}]")
            raise InputRefused(f"{place}{message}", place) from error
        except ContextLengthExceeded as error:
            message = str(error).replace("the messages take", "the input takes")
            message = message.replace("lower max_tokens", "lower max_output_tokens")
            param = {"messages": "input", "max_tokens": "max_output_tokens"}.get(error.param or "", error.param)
            raise ContextLengthExceeded(message, param) from error
        except ResponseFormatRefused as error:
            message, param = (
                text.replace(SCHEMA_PARAM, "text.format.schema", 1) for text in (str(error), error.param or "")
            )
            raise ResponseFormatRefused(message, param) from error


def referenced_ids(body: ResponseRequest) -> list[str]:
    """The ids of the stored items that the input refers to."""
    return [item.id for item in body.input if isinstance(item, ItemReferenceParam)]


def read_input(body: ResponseRequest, earlier: Earlier) -> ResponseInput:
    """The input of a request, after the input and output of the response that it continues.

    Raises:
        PreviousResponseNotFound: there is no such response.
        ResponseNotFound: there is no item that the input refers to.
    """
    placed: list[tuple[str, StoredItem]] = []
    if body.previous_response_id is not None:
        if earlier.previous is None:
            problem = f"Previous response with id {body.previous_response_id!r:.160} not found."
            raise PreviousResponseNotFound(problem, "previous_response_id")
        items = [*earlier.previous.input_items, *earlier.previous.output_items]
        placed += [("previous_response_id", item) for item in items]
    placed += _given_items(body, earlier.items)
    messages = [(place, _message(stored.body)) for place, stored in placed]
    if body.instructions:
        messages.insert(0, ("instructions", ChatMessage(role="system", content=body.instructions)))
    return ResponseInput(
        [item for _, item in placed], [message for _, message in messages], [place for place, _ in messages]
    )


def read_stored(stored: StoredItem) -> InputMessage | OutputMessage:
    """A stored item as the API returns it."""
    return _ITEM.validate_python({**json.loads(stored.body), "id": stored.id})


def to_store(item: InputMessage | OutputMessage) -> StoredItem:
    """An item as it is stored."""
    return StoredItem(item.id, item.model_dump_json(exclude={"id"}))


def new_item_id() -> str:
    """An id for a message."""
    return f"msg_{uuid.uuid4().hex}"


def _given_items(body: ResponseRequest, referenced: Sequence[StoredItem | None]) -> list[tuple[str, StoredItem]]:
    if isinstance(body.input, str):
        return [("input", _item(MessageParam(role="user", content=body.input)))]
    placed = []
    references = iter(referenced)
    for index, item in enumerate(body.input):
        if isinstance(item, MessageParam):
            placed.append((f"input.{index}", _item(item)))
        elif isinstance(item, ItemReferenceParam):
            stored = next(references)
            if stored is None:
                raise ResponseNotFound(f"Item with id {item.id!r} not found.", f"input.{index}.id")
            placed.append((f"input.{index}", stored))
    return placed


def _item(message: MessageParam) -> StoredItem:
    """An item as it is sent -> as it is stored."""
    item_id, status, texts = message.id or new_item_id(), message.status or "completed", message.texts()
    if message.role == "assistant":
        return to_store(OutputMessage(id=item_id, status=status, content=[OutputText(text=text) for text in texts]))
    content = [InputText(text=text) for text in texts]
    return to_store(InputMessage(id=item_id, status=status, role=message.role, content=content))


def _message(body: str) -> ChatMessage:
    """An item as it is stored -> a message of the chat."""
    item = json.loads(body)
    return ChatMessage(role=item["role"], content="".join(part["text"] for part in item["content"]))
