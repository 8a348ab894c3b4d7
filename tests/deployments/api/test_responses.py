"""OpenAI's Responses API on the real ingress and engine in this process: requests, responses, events, and refusals.

What is returned is validated strictly, against the types of OpenAI's own package.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from deployments.protocol import extra_fields
from deployments.protocol.extra_fields import ExtraField
from tests.conftest import InProcessApi
from tests.deployments.api.test_accepted_requests import cases, refusal, values_of

ROUTE = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
USER = {"role": "user", "content": "Say hi."}


class City(BaseModel):
    big: bool


@pytest.fixture(scope="module")
def client(tiny_api: InProcessApi) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_api.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(api: InProcessApi, **changes: Any) -> httpx.Response:
    body = {"model": api.base.name, "input": "Say hi.", "max_output_tokens": 4, "temperature": 0, **changes}
    return httpx.post(f"{api.url}{ROUTE}", json=body, timeout=300)


def created(api: InProcessApi, **changes: Any) -> dict[str, Any]:
    """The response, which OpenAI's types accept."""
    answer = post(api, **changes)
    assert answer.status_code == 200, answer.text
    Response.model_validate_json(answer.content, strict=True)
    return dict(answer.json())


def text(response: dict[str, Any]) -> str:
    (message,) = response["output"]
    (part,) = message["content"]
    return str(part["text"])


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each of which OpenAI's types accept, in their order."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        EVENT.validate_json(data.removeprefix("data: "), strict=True)
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


@pytest.mark.promise("F3")
def test_a_response_has_every_field_of_openais(tiny_api: InProcessApi) -> None:
    settings = {"instructions": "Be brief.", "metadata": {"job": "7"}, "user": "someone", "top_p": 0.5}
    response = created(tiny_api, **settings, text={"verbosity": "low"}, prompt_cache_key="k")
    assert {name: response[name] for name in settings} == settings
    assert response["id"].startswith("resp_")
    assert (response["object"], response["status"]) == ("response", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["created_at"] <= response["completed_at"]
    assert response["usage"]["output_tokens"] == response["max_output_tokens"] == 4
    assert response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + 4
    (message,) = response["output"]
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "incomplete")
    assert message["content"][0].keys() == {"type", "text", "annotations", "logprobs"}
    assert (response["text"], response["tools"]) == ({"format": {"type": "text"}, "verbosity": "low"}, [])
    assert set(Response.model_fields) - set(response) == {
        *("access_programs", "conversation", "image", "input_transformations", "moderation", "prompt"),
        *("prompt_cache_diagnostics", "prompt_cache_options", "tool_usage"),
    }


@pytest.mark.promise("F3")
def test_the_answer_is_that_of_the_same_chat(tiny_api: InProcessApi) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Hi."}, USER]
    body = {"model": tiny_api.base.name, "messages": messages, "max_tokens": 4, "temperature": 0}
    chat = httpx.post(f"{tiny_api.url}/v1/chat/completions", json=body, timeout=300).json()
    same = [
        {"input": messages},
        {"instructions": "Be brief.", "input": messages[1:]},
        {"input": [{"type": "message", **message} for message in messages]},
        {"input": [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]},
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Say "}, {"type": "text", "text": "hi."}]},
                {
                    "type": "message",
                    "id": "msg_elsewhere",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Hi.", "annotations": [], "logprobs": []}],
                },
                {"type": "reasoning", "id": "rs_1", "summary": []},
                USER,
            ],
        },
    ]
    for changes in same:
        response = created(tiny_api, **changes)
        assert text(response) == chat["choices"][0]["message"]["content"]
        usage = (response["usage"]["input_tokens"], response["usage"]["output_tokens"])
        assert usage == (chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"])


@pytest.mark.promise("F3")
@pytest.mark.parametrize("reply", ["items as they came", "previous_response_id", "item_reference"])
def test_a_dialog_goes_on(tiny_api: InProcessApi, client: openai.OpenAI, reply: str) -> None:
    fields: dict[str, Any] = {"model": tiny_api.base.name, "max_output_tokens": 4, "temperature": 0}
    first = client.responses.create(input="Say hi.", instructions="Be brief.", **fields)
    turns = [USER, {"role": "assistant", "content": first.output_text}, USER]
    expected = text(created(tiny_api, input=turns))
    following: dict[str, Any] = {
        "items as they came": {"input": [USER, *first.output, USER]},
        "previous_response_id": {"input": "Say hi.", "previous_response_id": first.id},
        "item_reference": {"input": [USER, {"type": "item_reference", "id": first.output[0].id}, USER]},
    }[reply]
    second = client.responses.create(**following, **fields)
    assert second.output_text == expected
    assert second.instructions is None  # not inherited
    items = [*client.responses.input_items.list(second.id, order="asc")]
    assert [item.type for item in items] == ["message"] * 3
    assert items[1].id == first.output[0].id
    third = client.responses.create(input="Say hi.", previous_response_id=second.id, **fields)
    longer = [*turns, {"role": "assistant", "content": expected}, USER]
    assert third.output_text == text(created(tiny_api, input=longer))


@pytest.mark.promise("F3")
@pytest.mark.parametrize("max_output_tokens", [1, 5, None])
def test_events_in_openais_order_make_the_response(tiny_api: InProcessApi, max_output_tokens: int | None) -> None:
    changes: dict[str, Any] = {"max_output_tokens": max_output_tokens, "include": ["message.output_text.logprobs"]}
    if max_output_tokens is None:
        changes |= {"text": {"format": {"type": "json_schema", "name": "city", "schema": City.model_json_schema()}}}
    whole = created(tiny_api, **changes)
    events = events_of(post(tiny_api, stream=True, **changes))
    kinds = [event["type"] for event in events]
    num_deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * num_deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed" if max_output_tokens is None else "response.incomplete",
    ]
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert events[2]["item"] == last["output"][0] | {"status": "in_progress", "content": []}
    assert events[3]["part"]["text"] == ""
    assert events[-2]["item"] == last["output"][0]
    assert events[-3]["part"] == last["output"][0]["content"][0]
    assert "".join(event["delta"] for event in events if "delta" in event) == events[-4]["text"] == text(last)
    scored = [token for event in events if "delta" in event for token in event["logprobs"]]
    assert scored == events[-4]["logprobs"] == last["output"][0]["content"][0]["logprobs"]
    assert len(scored) == last["usage"]["output_tokens"]
    for response in (whole, last):
        for name in ("id", "created_at", "completed_at", "usage"):
            response.pop(name)
        response["output"][0].pop("id")
    assert last == whole


@pytest.mark.promise("F3")
def test_openais_client_streams_and_parses(tiny_api: InProcessApi, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": tiny_api.base.name, "input": "Say hi.", "temperature": 0}
    parsed = client.responses.parse(text_format=City, **fields)
    assert isinstance(parsed.output_parsed, City)
    assert parsed.status == "completed"
    with client.responses.stream(text_format=City, **fields) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed
    assert "".join(deltas) == final.output_text == parsed.output_text
    kinds = [event.type for event in client.responses.create(**fields, max_output_tokens=3, stream=True)]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.incomplete")


@pytest.mark.promise("F3")
def test_logprobs_are_those_of_a_chat(tiny_api: InProcessApi) -> None:
    body = {"model": tiny_api.base.name, "messages": [USER], "max_tokens": 4, "temperature": 0}
    chat = httpx.post(f"{tiny_api.url}/v1/chat/completions", json=body | {"logprobs": True, "top_logprobs": 2}).json()
    expected = chat["choices"][0]["logprobs"]["content"]
    assert created(tiny_api, top_logprobs=2)["output"][0]["content"][0]["logprobs"] == expected
    included = created(tiny_api, include=["message.output_text.logprobs", "reasoning.encrypted_content"])
    assert [token["token"] for token in included["output"][0]["content"][0]["logprobs"]] == [
        token["token"] for token in expected
    ]


@pytest.mark.promise("F3")
def test_stored_responses_are_retrieved_listed_and_deleted(tiny_api: InProcessApi, client: openai.OpenAI) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"Turn {i}."} for i in range(5)]
    response = created(tiny_api, input=turns, include=["message.output_text.logprobs"], metadata={"a": "b"})
    url = f"{tiny_api.url}{ROUTE}/{response['id']}"
    assert httpx.get(url).json() == response
    streamed = events_of(post(tiny_api, stream=True))[-1]["response"]
    assert httpx.get(f"{tiny_api.url}{ROUTE}/{streamed['id']}").json() == streamed

    listed = httpx.get(f"{url}/input_items", params={"limit": 2}).json()
    ResponseItemList.model_validate_json(json.dumps(listed), strict=True)
    assert [item["content"][0]["text"] for item in listed["data"]] == ["Turn 4.", "Turn 3."]
    assert (listed["first_id"], listed["last_id"]) == (listed["data"][0]["id"], listed["data"][1]["id"])
    assert listed["has_more"]
    for order in ("asc", "desc"):
        texts = [turn["content"] for turn in (turns if order == "asc" else turns[::-1])]
        items: Any = client.responses.input_items.list(response["id"], order=order, limit=2)  # type: ignore[arg-type]
        assert [item.content[0].text for item in items] == texts
    bad = httpx.get(f"{url}/input_items", params={"after": "msg_none"})
    assert refusal(bad)[0] == "after"
    assert refusal(httpx.get(f"{url}/input_items", params={"limit": 0}))[0] == "limit"
    assert refusal(httpx.get(url, params={"stream": "true"}))[0] == "stream"

    cancelled = httpx.post(f"{url}/cancel")
    assert "Cannot cancel a synchronous response" in refusal(cancelled)[1]
    assert httpx.delete(url).json() == {"id": response["id"], "object": "response", "deleted": True}
    for gone in (httpx.get(url), httpx.get(f"{url}/input_items"), httpx.post(f"{url}/cancel"), httpx.delete(url)):
        assert gone.status_code == 404
        error = {"message": f"Response with id '{response['id']}' not found.", "type": "invalid_request_error"}
        assert gone.json() == {"error": error | {"param": None, "code": None}}


@pytest.mark.promise("F3")
def test_an_unstored_response_leaves_nothing(tiny_api: InProcessApi) -> None:
    response = created(tiny_api, store=False)
    assert not response["store"]
    assert httpx.get(f"{tiny_api.url}{ROUTE}/{response['id']}").status_code == 404
    (message,) = response["output"]
    reference = post(tiny_api, input=[{"id": message["id"]}, USER])
    assert reference.status_code == 404
    assert reference.json()["error"]["param"] == "input.0.id"
    following = post(tiny_api, previous_response_id=response["id"])
    assert following.status_code == 400
    error = following.json()["error"]
    assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")


@pytest.mark.promise("F3")
def test_what_continues_a_deleted_response_goes_on(tiny_api: InProcessApi) -> None:
    first = created(tiny_api)
    second = created(tiny_api, previous_response_id=first["id"])
    assert httpx.delete(f"{tiny_api.url}{ROUTE}/{first['id']}").status_code == 200
    assert created(tiny_api, previous_response_id=second["id"])["status"] == "incomplete"
    assert post(tiny_api, previous_response_id=first["id"]).status_code == 400


@pytest.mark.promise("F3")
def test_every_field_without_effect_has_none_and_any_other_value_is_refused(tiny_api: InProcessApi) -> None:
    plain = text(created(tiny_api))
    together: dict[str, Any] = {}
    for name, field in extra_fields.RESPONSE.items():
        for value in values_of(field):
            together[name] = value
            assert field.accepts(value), (name, value)
        if field.values is not None:
            param, message = refusal(post(tiny_api, **{name: "x"}))
            assert (param, field.instead in message) == (name, True), message
    assert text(created(tiny_api, **together)) == plain
    assert text(created(tiny_api, **dict.fromkeys(together))) == plain
    assert text(created(tiny_api, **{name: [] for name in together})) == plain


def _message(extra: dict[str, Any]) -> dict[str, Any]:
    return {"input": [USER, {"role": "assistant", "content": "Hi."} | extra, USER]}


def _part(extra: dict[str, Any]) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Say hi."} | extra]}]}


@pytest.mark.promise("F3")
@pytest.mark.parametrize(
    ("where", "place", "name", "field"),
    [
        pytest.param(where, place, *case.values, id=f"{place}{case.id}")
        for where, place, fields in [
            (_message, "input.1.", extra_fields.RESPONSE_MESSAGE),
            (_part, "input.0.content.0.", extra_fields.RESPONSE_PART),
            (lambda extra: {"reasoning": extra}, "reasoning.", extra_fields.REASONING),
            (
                lambda extra: {"prompt_cache_options": extra},
                "prompt_cache_options.",
                extra_fields.PROMPT_CACHE_OPTIONS,
            ),
        ]
        for case in cases(fields)
    ],
)
def test_members_of_a_request_may_have_what_clients_write_into_them(
    tiny_api: InProcessApi, where: Callable[[dict[str, Any]], dict[str, Any]], place: str, name: str, field: ExtraField
) -> None:
    plain = text(created(tiny_api, **where({})))
    for value in values_of(field):
        assert text(created(tiny_api, **where({name: value}))) == plain
    if field.values is not None:
        param, message = refusal(post(tiny_api, **where({name: "x"})))
        assert (param, field.instead in message) == (f"{place}{name}", True)


@pytest.mark.promise("F3")
@pytest.mark.parametrize(
    "changes",
    [
        {"text": {}},
        {"text": {"format": None, "verbosity": None}},
        {"text": {"format": {}}},
        {"text": {"format": {"type": "text", "name": None, "schema": {}, "strict": False}}},
        {"reasoning": {"effort": None, "summary": "auto"}},
        {"metadata": {"a": None}},
        {"metadata": []},
        {"include": []},
        {"input": [{**USER, "id": None, "status": None, "type": None, "phase": None}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Say hi.", "annotations": None}]}]},
        {"stream_options": {"include_obfuscation": None}},
        {"safety_identifier": "somebody", "seed": 3, "top_k": 5, "min_p": 0.1},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_what_changes_nothing_is_accepted(tiny_api: InProcessApi, changes: dict[str, Any]) -> None:
    assert text(created(tiny_api, **changes)) == text(created(tiny_api))


@pytest.mark.promise("F3")
@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"input": None}, "input", "required"),
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": [{"role": "user"}]}, "input.0.content", "needs text"),
        ({"input": [USER, {"role": "user", "content": []}]}, "input.1.content", "needs text"),
        ({"input": [USER, {"role": "user", "content": " "}]}, "input.1", "is empty"),
        ({"input": " "}, "input", "is empty"),
        ({"input": "\ud800"}, "input", "surrogate"),
        ({"input": [{"role": "user", "content": "\ud800"}]}, "input.0", "surrogate"),
        ({"metadata": {"a": "\ud800"}}, "metadata.a", "surrogate"),
        ({"previous_response_id": "\ud800"}, "previous_response_id", "surrogate"),
        ({"input": [{"role": "narrator", "content": "x"}]}, "input.0.role", "'user'"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input.0.type", "web_search_call is not supported"),
        ({"input": [{"type": "reasoning", "id": "r"}]}, "input", "no messages"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]},
            "input.0.content.0",
            "text only",
        ),
        ({"input": [{"role": "user", "content": "x " * 600}]}, "input", "the input takes"),
        ({"max_output_tokens": 510}, "max_output_tokens", "lower max_output_tokens"),
        ({"min_tokens": 9}, "min_tokens", "must not exceed max_output_tokens"),
        ({"max_tokens": 4}, "max_tokens", "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "needs schema"),
        ({"text": {"format": {"type": "text", "schema": {"a": 1}}}}, "text.format.schema", "send json_schema"),
        (
            {
                "text": {
                    "format": {"type": "json_schema", "name": "a", "schema": {"type": "array", "uniqueItems": True}}
                }
            },
            "text.format.schema.uniqueItems",
            "text.format.schema.uniqueItems: ",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"const": "\ud800"}}}},
            "text.format.schema",
            "surrogate",
        ),
        ({"include": ["everything"]}, "include", "message.output_text.logprobs"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
        ({"metadata": {"a": "x" * 513}}, "metadata", "512"),
        ({"truncation": "auto"}, "truncation", "nothing is cut"),
        ({"background": True}, "background", "stream"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "not padded"),
        ({"maxoutputtokens": 4}, "maxoutputtokens", "did you mean 'max_output_tokens'"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_what_would_change_something_is_refused_at_its_place(
    tiny_api: InProcessApi, changes: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": tiny_api.base.name, "input": "Say hi.", "max_output_tokens": 4, **changes}
    content = json.dumps({name: value for name, value in body.items() if value is not None})
    answer = httpx.post(f"{tiny_api.url}{ROUTE}", content=content, timeout=300)
    place, message = refusal(answer)
    assert place.startswith(param)
    assert words in message
    assert len(message.splitlines()) == 1


def test_an_adapter_answers_under_its_version(tiny_api: InProcessApi) -> None:
    tuned = created(tiny_api, model=tiny_api.adapter)
    assert tuned["model"] == f"{tiny_api.adapter}@1"
    assert text(tuned) != text(created(tiny_api))
    assert post(tiny_api, model="nobody").status_code == 404


def test_the_readme_has_every_such_field() -> None:
    readme = Path("deployments/README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(\w+)`", readme.split("### Fields of other APIs")[1].split("\n### ")[0]))
    for fields in (
        extra_fields.RESPONSE,
        extra_fields.RESPONSE_MESSAGE,
        extra_fields.RESPONSE_PART,
        extra_fields.RESPONSE_CALL,
        extra_fields.RESPONSE_TOOL,
        extra_fields.REASONING,
        extra_fields.PROMPT_CACHE_OPTIONS,
        extra_fields.RESPONSE_STREAM_OPTIONS,
    ):
        assert fields.keys() <= listed, fields.keys() - listed
