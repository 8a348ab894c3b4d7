"""The checks of the Open Responses compliance suite (openresponses.org), with its requests and its required fields.

At temperature 0, and with `tool_choice` where the suite waits for a model to choose a tool: small models do not choose
well. Images are refused, which the suite counts as a failure: six of its seven checks hold.
"""

import json
from itertools import pairwise
from typing import Annotated, Any, Literal

import httpx
import pytest
from pydantic import BaseModel, Field, TypeAdapter

from tests.conftest import RunningServer


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class Message(BaseModel):
    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCall(BaseModel):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


Item = Annotated[Message | FunctionCall, Field(discriminator="type")]


class FunctionTool(BaseModel):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class InputDetails(BaseModel):
    cached_tokens: int


class OutputDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails


class Response(BaseModel):
    """What the specification requires of a response: every field is there, and some may be null."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "queued", "cancelled"]
    incomplete_details: dict[str, Any] | None
    model: str
    previous_response_id: str | None
    instructions: str | None
    output: list[Item]
    error: dict[str, Any] | None
    tools: list[FunctionTool]
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any]
    truncation: Literal["auto", "disabled"]
    parallel_tool_calls: bool
    text: dict[str, Any]
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    temperature: float
    reasoning: dict[str, Any] | None
    usage: Usage | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    store: bool
    background: bool
    service_tier: str
    metadata: dict[str, str]
    safety_identifier: str | None
    prompt_cache_key: str | None


class Event(BaseModel):
    sequence_number: int


class ResponseEvent(Event):
    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: Response


class ItemEvent(Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: Item


class PartEvent(Event):
    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class TextDelta(Event):
    type: Literal["response.output_text.delta"]
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[Any]


class TextDone(Event):
    type: Literal["response.output_text.done"]
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[Any]


class ArgumentsDelta(Event):
    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event):
    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: int
    arguments: str


AnyEvent = Annotated[
    ResponseEvent | ItemEvent | PartEvent | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone,
    Field(discriminator="type"),
]
EVENT: TypeAdapter[Any] = TypeAdapter(AnyEvent)

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "maxLength": 20}},
        "required": ["location"],
    },
}
ASK_WEATHER: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}


def said(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


def post(server: RunningServer, *dialog: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"model": server.base_model, "input": list(dialog), "temperature": 0, **fields}
    return httpx.post(f"{server.url}/v1/responses", json=body, timeout=300)


def created(server: RunningServer, *dialog: dict[str, Any], **fields: Any) -> Response:
    answer = post(server, *dialog, **fields)
    assert answer.status_code == 200, answer.text
    return Response.model_validate(answer.json(), strict=True)


def streamed(server: RunningServer, *dialog: dict[str, Any], **fields: Any) -> list[Any]:
    """The events of a stream, each valid, named by its type, numbered in turn; `[DONE]` may end it."""
    answer = post(server, *dialog, **fields, stream=True)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if not lines or lines["data"] == "[DONE]":
            continue
        events.append(EVENT.validate_python(json.loads(lines["data"]), strict=True))
        assert lines["event"] == events[-1].type
    assert all(after.sequence_number == before.sequence_number + 1 for before, after in pairwise(events))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    return events


def text_of(response: Response) -> str:
    (item,) = response.output
    assert isinstance(item, Message)
    return "".join(part.text for part in item.content)


@pytest.mark.promise("F7")
def test_basic_text_response(server: RunningServer) -> None:
    response = created(server, said("user", "Say hello in exactly 3 words."))
    assert response.status == "completed"
    assert text_of(response)
    assert response.completed_at is not None
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


@pytest.mark.promise("F7")
def test_streaming_response(server: RunningServer) -> None:
    question = said("user", "Say hello in exactly 3 words.")
    *events, last = streamed(server, question)
    assert last.type == "response.completed"
    assert last.response.status == "completed"
    text = "".join(event.delta for event in events if isinstance(event, TextDelta))
    (done,) = [event for event in events if isinstance(event, TextDone)]
    assert text == done.text == text_of(last.response) == text_of(created(server, question))
    types = [event.type for event in events if not isinstance(event, TextDelta)]
    assert types[2:] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]


@pytest.mark.promise("F7")
def test_system_prompt(server: RunningServer) -> None:
    prompt = "You are a pirate. Always respond in pirate speak."
    response = created(server, said("system", prompt), said("user", "Say hello."))
    assert response.status == "completed"
    assert text_of(response) == text_of(created(server, said("user", "Say hello."), instructions=prompt))
    without = created(server, said("user", "Say hello."), max_output_tokens=4)
    assert (without.status, without.incomplete_details) == ("incomplete", {"reason": "max_output_tokens"})
    assert not text_of(response).startswith(text_of(without))


@pytest.mark.promise("F7")
def test_tool_calling(server: RunningServer) -> None:
    response = created(server, said("user", "What's the weather like in San Francisco?"), **ASK_WEATHER)
    assert response.status == "completed"
    (call,) = response.output
    assert isinstance(call, FunctionCall)
    assert call.name == "get_weather"
    assert json.loads(call.arguments).keys() == {"location"}
    assert [tool.name for tool in response.tools] == ["get_weather"]
    assert response.tool_choice == "required"


@pytest.mark.promise("F7")
def test_tool_calling_streaming(server: RunningServer) -> None:
    question = said("user", "What's the weather like in San Francisco?")
    *events, last = streamed(server, question, **ASK_WEATHER)
    assert last.type == "response.completed"
    types = [event.type for event in events if not isinstance(event, ArgumentsDelta)]
    assert types[2:] == [
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    (done,) = [event for event in events if isinstance(event, ArgumentsDone)]
    assert "".join(event.delta for event in events if isinstance(event, ArgumentsDelta)) == done.arguments
    (call,) = last.response.output
    assert isinstance(call, FunctionCall)
    assert call.arguments == done.arguments
    assert {event.item.call_id for event in events if isinstance(event, ItemEvent)} == {call.call_id}


@pytest.mark.promise("F7")
def test_image_input_is_refused_at_its_place(server: RunningServer) -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    answer = post(server, said("user", [{"type": "input_text", "text": "What do you see?"}, image]))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith("input")
    assert "image" in error["message"]


@pytest.mark.promise("F7")
def test_multi_turn_conversation(server: RunningServer) -> None:
    dialog = [
        said("user", "My name is Alice."),
        said("assistant", "Hello Alice! Nice to meet you. How can I help you today?"),
        said("user", "What is my name?"),
    ]
    response = created(server, *dialog)
    assert response.status == "completed"
    assert "Alice" in text_of(response)
    without = created(server, dialog[-1], max_output_tokens=4)
    assert not text_of(response).startswith(text_of(without))
