"""Tools of chat completions (F2): whatever the model, every call parses and follows its schema.

The model is random: it never calls on its own accord what it was told of, so every call here is the grammar's doing.
"""

import json
from collections import defaultdict
from typing import Any

import httpx
import jsonschema
import pytest

from tests.conftest import InProcessApi

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 6}, "maxItems": 2},
    },
    "required": ["city", "unit"],
}
COUNT = {"type": "object", "properties": {"of": {"enum": ["cows", "sheep"]}}, "required": ["of"]}


def tool(name: str, parameters: Any = None, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


TOOLS = [tool("get_weather", WEATHER), tool("get", COUNT, description="Count animals.", strict=False), tool("now")]
SCHEMAS: dict[str, Any] = {"get_weather": WEATHER, "get": COUNT, "now": {"type": "object", "maxProperties": 0}}
USER = {"role": "user", "content": "Say hi."}


def post(api: InProcessApi, **changes: Any) -> httpx.Response:
    body = {"model": api.base.name, "messages": [USER], "tools": TOOLS, "max_tokens": 100, "seed": 1, "temperature": 2}
    return httpx.post(f"{api.url}{CHAT}", json=body | changes, timeout=300)


def choices(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def check_calls(message: dict[str, Any]) -> list[str]:
    """Every call of a message is one of the tools', with arguments of its schema; returns the names."""
    calls = message["tool_calls"]
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert call["type"] == "function"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
    return [call["function"]["name"] for call in calls]


@pytest.mark.promise("F2")
@pytest.mark.parametrize("model", ["base", "adapter"])
def test_required_calls_parse_whatever_the_model(tiny_api: InProcessApi, model: str) -> None:
    model_id = tiny_api.base.name if model == "base" else tiny_api.adapter
    answers = choices(post(tiny_api, model=model_id, tool_choice="required", n=12, parallel_tool_calls=False))
    names = [check_calls(choice["message"]) for choice in answers]
    assert all(len(of_one) == 1 for of_one in names)
    for choice in answers:
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None


@pytest.mark.promise("F2")
def test_a_named_tool_is_called_once(tiny_api: InProcessApi) -> None:
    for name in SCHEMAS:
        choice = {"type": "function", "function": {"name": name}}
        [answer] = choices(post(tiny_api, tool_choice=choice))
        assert check_calls(answer["message"]) == [name]


@pytest.mark.promise("F2")
def test_only_allowed_tools_are_called(tiny_api: InProcessApi) -> None:
    """The model calls `now` if it may."""
    names = [{"type": "function", "function": {"name": name}} for name in ("get", "get_weather")]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}}
    answers = choices(post(tiny_api, tool_choice=choice, n=8, parallel_tool_calls=False))
    assert {name for answer in answers for name in check_calls(answer["message"])} <= {"get", "get_weather"}


@pytest.mark.promise("F2")
@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_without_a_need_to_call_the_model_writes_what_it_likes(tiny_api: InProcessApi, choice: str | None) -> None:
    """The random model writes no call by itself; the text is the one that it writes with no grammar at all."""
    plain = choices(post(tiny_api, tool_choice=choice, max_tokens=12, temperature=0))[0]
    assert plain["message"]["content"]
    assert "tool_calls" not in plain["message"]
    assert plain["finish_reason"] in ("length", "stop")


@pytest.mark.promise("F2")
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_stream_adds_up_to_the_answer(tiny_api: InProcessApi, choice: str) -> None:
    request = {"tool_choice": choice, "temperature": 0, "n": 2, "max_tokens": 60}
    whole = choices(post(tiny_api, **request))
    events = post(tiny_api, stream=True, **request).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
    calls: dict[tuple[int, int], dict[str, str]] = defaultdict(lambda: {"id": "", "name": "", "arguments": ""})
    content: dict[int, str] = defaultdict(str)
    reasons: dict[int, str] = {}
    for chunk in chunks:
        [part] = chunk["choices"]
        content[part["index"]] += part["delta"].get("content") or ""
        reasons[part["index"]] = part["finish_reason"] or ""
        for delta in part["delta"].get("tool_calls", []):
            call = calls[part["index"], delta["index"]]
            call["id"] += delta.get("id", "")
            for key in ("name", "arguments"):
                call[key] += delta["function"].get(key, "")
    for choice_of_whole in whole:
        index, message = choice_of_whole["index"], choice_of_whole["message"]
        assert content[index] == (message["content"] or "")
        assert reasons[index] == choice_of_whole["finish_reason"]
        streamed = [(call["name"], call["arguments"]) for (of, _), call in sorted(calls.items()) if of == index]
        expected = [tuple(call["function"].values()) for call in message.get("tool_calls", [])]
        assert streamed == expected
    assert all(call["id"].startswith("call_") for call in calls.values())
    assert (choice == "required") == bool(calls)


@pytest.mark.promise("F2")
def test_a_call_that_is_cut_off_does_not_spoil_the_next_turn(tiny_api: InProcessApi) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    [answer] = choices(post(tiny_api, tool_choice=named, max_tokens=22))
    assert answer["finish_reason"] == "length"
    [call] = answer["message"]["tool_calls"]
    with pytest.raises(ValueError, match=r"."):
        json.loads(call["function"]["arguments"])
    for then in ([], [{"role": "tool", "tool_call_id": call["id"], "content": "cut off"}]):
        messages = [USER, answer["message"], *then, {"role": "user", "content": "Once more."}]
        [again] = choices(post(tiny_api, messages=messages, tool_choice=named, parallel_tool_calls=False))
        assert check_calls(again["message"]) == ["get_weather"]


@pytest.mark.promise("F2")
def test_results_are_paired_by_their_ids(tiny_api: InProcessApi) -> None:
    def call(call_id: str, city: str) -> dict[str, Any]:
        arguments = json.dumps({"city": city, "unit": "celsius"})
        return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}

    def result(call_id: str, text: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": call_id, "content": text}

    dialog = [USER, {"role": "assistant", "content": None, "tool_calls": [call("a", "Rome"), call("b", "Paris")]}]
    first, second = result("a", "22"), result("b", [{"type": "text", "text": "19"}])  # type: ignore[arg-type]

    def tokens(messages: list[dict[str, Any]]) -> Any:
        return httpx.post(f"{tiny_api.url}/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]

    assert tokens([*dialog, first, second]) == tokens([*dialog, second, first])
    assert tokens([*dialog, first]) != tokens([*dialog, first, second])
    for messages, index, words in (
        ([*dialog, result("c", "1")], 2, "'c', which is not among them: the calls before it are a, b"),
        ([*dialog, first, first], 3, "has a result already"),
        ([*dialog, second], 1, "'a' without a result"),
        ([USER, first], 1, "no call stands before it"),
    ):
        error = post(tiny_api, messages=messages).json()["error"]
        assert (error["param"], words in error["message"]) == (f"messages.{index}", True), error


@pytest.mark.promise("F2")
@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"tools": [tool("a b")]}, "tools.0.function.name", "pattern"),
        ({"tools": [tool("a"), tool("a")]}, "tools", "two tools are named 'a'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search is not supported"),
        ({"tools": [tool("a", {"type": "cat"})]}, "tools.0.function.parameters.type", "cat"),
        ({"tools": [tool("a", WEATHER, strict=True)]}, "tools.0.function.parameters", "additionalProperties"),
        ({"tools": [tool("a", {"type": "array"})]}, "tools.0.function.parameters.type", "object"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice", "'nope', but the tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "sometimes"}, "tool_choice", "auto"),
        ({"functions": [{"name": "a"}]}, "functions", "send tools"),
        ({"messages": [USER | {"tool_calls": [{"function": {"name": "a"}}]}]}, "messages.0.tool_calls", "assistant"),
        ({"messages": [USER | {"tool_call_id": "a"}]}, "messages.0.tool_call_id", "only a tool's"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_refused_at_its_place(
    tiny_api: InProcessApi, changes: dict[str, Any], param: str, words: str
) -> None:
    response = post(tiny_api, **changes)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


@pytest.mark.promise("F2")
def test_json_content_and_calls_are_both_constrained(tiny_api: InProcessApi) -> None:
    schema = {"type": "object", "properties": {"x": {"enum": ["<tool_call>", "b"]}}, "required": ["x"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for choice in ("auto", "none"):
        for answer in choices(post(tiny_api, response_format=response_format, n=6, tool_choice=choice)):
            if answer["finish_reason"] == "tool_calls":
                assert check_calls(answer["message"])
            else:
                jsonschema.validate(json.loads(answer["message"]["content"]), schema)
    answers = choices(post(tiny_api, response_format=response_format, n=4, tool_choice="required"))
    assert all(check_calls(a["message"]) or a["finish_reason"] == "length" for a in answers)
