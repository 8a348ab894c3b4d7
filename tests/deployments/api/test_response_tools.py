"""Tools of responses (F2, F3): calls are items, constrained as those of chat completions, and may be sent back.

The model is random: every call here is the grammar's doing.
"""

import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.conftest import InProcessApi
from tests.deployments.api.test_accepted_requests import refusal
from tests.deployments.api.test_responses import USER, client, created, events_of, post
from tests.deployments.api.test_tools import SCHEMAS, TOOLS, WEATHER

__all__ = ["client"]  # a fixture

FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
GET = {"type": "function", "name": "get"}
MANY: dict[str, Any] = {"tools": FLAT, "max_output_tokens": 100, "temperature": 2, "seed": 1}


def calls(response: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a response, whose arguments follow their schemas."""
    items = [item for item in response["output"] if item["type"] == "function_call"]
    for call in items:
        assert (call["id"][:3], call["call_id"][:5], call["status"]) == ("fc_", "call_", "completed")
        jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])
    return items


@pytest.mark.promise("F2")
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", set(SCHEMAS)),
        (GET, {"get"}),
        ({"type": "allowed_tools", "mode": "required", "tools": [GET]}, {"get"}),
    ],
    ids=["required", "named", "allowed"],
)
def test_calls_are_items_that_parse(tiny_api: InProcessApi, choice: Any, names: set[str]) -> None:
    for seed in range(4):
        response = created(tiny_api, **MANY | {"tool_choice": choice, "parallel_tool_calls": False, "seed": seed})
        (call,) = calls(response)
        assert call["name"] in names
        assert (response["status"], len(response["output"])) == ("completed", 1)
        assert (response["tool_choice"], response["parallel_tool_calls"]) == (choice, False)
        assert [tool["name"] for tool in response["tools"]] == [*SCHEMAS]


@pytest.mark.promise("F2")
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_without_a_need_to_call_there_is_a_message(tiny_api: InProcessApi, choice: str) -> None:
    response = created(tiny_api, tools=FLAT, tool_choice=choice, max_output_tokens=12)
    assert [item["type"] for item in response["output"]] == ["message"]
    assert response["output"][0]["content"][0]["text"]


@pytest.mark.promise("F3")
@pytest.mark.parametrize("max_output_tokens", [20, 100])
def test_events_of_calls_add_up_to_the_response(tiny_api: InProcessApi, max_output_tokens: int) -> None:
    """The shorter answer is cut off within the arguments."""
    changes = {**MANY, "tool_choice": {"type": "function", "name": "get_weather"}, "temperature": 0}
    changes |= {"max_output_tokens": max_output_tokens, "include": ["message.output_text.logprobs"]}
    whole = created(tiny_api, **changes)
    events = events_of(post(tiny_api, stream=True, **changes))
    last = events[-1]["response"]
    shape = [(item["name"], item["arguments"], item["status"]) for item in whole["output"]]
    assert [(item["name"], item["arguments"], item["status"]) for item in last["output"]] == shape
    assert last["status"] == whole["status"]
    if max_output_tokens == 20:
        assert (shape[-1][2], last["status"]) == ("incomplete", "incomplete")
    for index, item in enumerate(last["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["item"] == item | {"status": "in_progress", "arguments": ""}
        deltas = [event["delta"] for event in own if event["type"] == "response.function_call_arguments.delta"]
        done = own[-2]
        assert done["type"] == "response.function_call_arguments.done"
        assert "".join(deltas) == done["arguments"] == item["arguments"]
        assert own[-1] == {
            "type": "response.output_item.done",
            "item": item,
            "output_index": index,
            "sequence_number": own[-1]["sequence_number"],
        }
        assert {event["item_id"] for event in own[1:-1]} == {item["id"]}


@pytest.mark.promise("F3")
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "sent back"])
def test_results_of_calls_continue_the_dialog(tiny_api: InProcessApi, client: openai.OpenAI, stored: bool) -> None:
    tools: Any = FLAT
    fields: dict[str, Any] = {"model": tiny_api.base.name, "tools": tools, "temperature": 0}
    first = client.responses.create(
        input="Say hi.", tool_choice="required", parallel_tool_calls=False, max_output_tokens=100, **fields
    )
    (call,) = first.output
    assert call.type == "function_call"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Seven."}
    changes: dict[str, Any] = {"input": [USER, *first.output, result]}
    if stored:
        changes = {"input": [result], "previous_response_id": first.id}
    second = client.responses.create(max_output_tokens=6, **changes, **fields)
    function = {"name": call.name, "arguments": call.arguments}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": "Seven."},
    ]
    body = {"model": tiny_api.base.name, "messages": messages, "tools": TOOLS, "max_tokens": 6, "temperature": 0}
    chat = httpx.post(f"{tiny_api.url}/v1/chat/completions", json=body, timeout=300).json()
    assert second.output_text == chat["choices"][0]["message"]["content"]
    assert second.usage is not None
    assert second.usage.input_tokens == chat["usage"]["prompt_tokens"]
    kinds = [item.type for item in client.responses.input_items.list(second.id, order="asc")]
    assert kinds == ["message", "function_call", "function_call_output"]


@pytest.mark.promise("F3")
def test_openais_client_streams_calls(tiny_api: InProcessApi, client: openai.OpenAI) -> None:
    tools: Any = FLAT
    fields: dict[str, Any] = {"model": tiny_api.base.name, "input": "Say hi.", "temperature": 0}
    with client.responses.stream(tools=tools, tool_choice="required", parallel_tool_calls=False, **fields) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    (call,) = final.output
    assert call.type == "function_call"
    assert "".join(deltas) == call.arguments


@pytest.mark.promise("F3")
@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search is not supported"),
        ({"tools": [TOOLS[0]]}, "tools.0.", ""),
        ({"tools": [FLAT[0], FLAT[0]]}, "tools", "two tools are named"),
        ({"tools": [FLAT[0] | {"strict": True}]}, "tools.0.parameters", "tools.0.parameters"),
        ({"tools": FLAT, "tool_choice": {"type": "function", "name": "nope"}}, "tool_choice", "'nope', but the tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"input": [USER, {"type": "function_call", "name": "f"}]}, "input.1.call_id", "required"),
        ({"input": [USER, {"type": "function_call_output", "call_id": "a"}]}, "input.1", "no call stands before it"),
        (
            {
                "input": [
                    USER,
                    {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "b", "output": "x"},
                ]
            },
            "input.2",
            "input.2.call_id is 'b'",
        ),
        ({"input": [USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "input.1.tool_calls", "function_call"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_refused_at_its_place(
    tiny_api: InProcessApi, changes: dict[str, Any], param: str, words: str
) -> None:
    place, message = refusal(post(tiny_api, **changes))
    assert place.startswith(param)
    assert words in message


def test_the_schema_of_a_tool_is_not_changed_by_its_echo(tiny_api: InProcessApi) -> None:
    response = created(tiny_api, **MANY)
    assert response["tools"][0] == FLAT[0] | {"description": None, "strict": None}
    assert response["tools"][0]["parameters"] == WEATHER
