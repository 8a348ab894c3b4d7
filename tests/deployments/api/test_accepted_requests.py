"""Requests of other people's clients: what changes nothing is accepted, what would change something is refused.

`PLAIN` is answered greedily, so a field without effect is one with which the answer is the same.
"""

import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.protocol import extra_fields
from deployments.protocol.extra_fields import ExtraField
from tests.conftest import InProcessApi

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Say hi."}
PLAIN: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER], "max_tokens": 4, "temperature": 0},
    COMPLETIONS: {"prompt": "One, two,", "max_tokens": 4, "temperature": 0},
}


def post(api: InProcessApi, route: str = CHAT, **changes: Any) -> httpx.Response:
    body = {"model": api.base.name, **PLAIN[route], **changes}
    return httpx.post(f"{api.url}{route}", json=body, timeout=300)


def answer(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def refusal(response: httpx.Response) -> tuple[str, str]:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


def values_of(field: ExtraField) -> list[Any]:
    """Values that a field is accepted with, among them those that mean "not given"."""
    return [None, [], {}, *(["x", 1, {"a": [1]}] if field.values is None else field.values)]


def cases(fields: Mapping[str, ExtraField]) -> list[Any]:
    return [pytest.param(name, field, id=name) for name, field in fields.items()]


@pytest.mark.promise("A1")
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_every_field_without_effect_has_none_and_any_other_value_is_refused(tiny_api: InProcessApi, route: str) -> None:
    plain = answer(post(tiny_api, route))
    fields = extra_fields.CHAT if route == CHAT else extra_fields.GENERATION
    together: dict[str, Any] = {}
    for name, field in fields.items():
        for value in values_of(field):
            together[name] = value  # the last value of each field stays
            assert field.accepts(value), (name, value)
        if field.values is not None:
            param, message = refusal(post(tiny_api, route, **{name: "x"}))
            assert (param, field.instead in message) == (name, True), message
    assert answer(post(tiny_api, route, **together)) == plain
    nothing = dict.fromkeys(fields)
    assert answer(post(tiny_api, route, **nothing)) == plain
    assert answer(post(tiny_api, route, **{name: [] for name in fields})) == plain


@pytest.mark.promise("A1")
@pytest.mark.parametrize(("name", "field"), cases(extra_fields.MESSAGE))
def test_a_message_may_have_what_client_libraries_write_into_it(
    tiny_api: InProcessApi, name: str, field: ExtraField
) -> None:
    def with_turn(turn: dict[str, Any]) -> httpx.Response:
        return post(tiny_api, messages=[USER, {"role": "assistant", "content": "Hi."} | turn, USER])

    plain = answer(with_turn({}))
    for value in values_of(field):
        assert answer(with_turn({name: value})) == plain
    if field.values is not None:
        param, message = refusal(with_turn({name: "x"}))
        assert (param, field.instead in message) == (f"messages.1.{name}", True)


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    "changes",
    [
        {"stream_options": {"include_usage": None}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Say hi.", "cache_control": {"a": 1}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "Say hi."}]}]},
        {"messages": [USER | {"name": None, "brand_new": None}]},
        {"top_k": -1},
        {"top_p": 0},
        {"seed": -1},
        {"store": True, "verbosity": "low", "metadata": {"job": "7"}},
        {"safety_identifier": "somebody"},
        {"newer_than_this_server": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_nothing_is_accepted(tiny_api: InProcessApi, changes: dict[str, Any]) -> None:
    assert answer(post(tiny_api, **changes)) == answer(post(tiny_api))


@pytest.mark.promise("B1")
@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"temprature": 0.1}, "temprature", "did you mean 'temperature'?"),
        ({"max_token": 4}, "max_token", "did you mean 'max_tokens'?"),
        ({"guidedjson": {"a": 1}}, "guidedjson", "did you mean 'guided_json'?"),
        ({"qwertz": 1}, "qwertz", "/docs"),
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages", "did you mean"),
        ({"messages": [USER, {"role": "user", "content": 5}]}, "messages.1.content", "string"),
        ({"messages": [USER, {"role": "user"}]}, "messages.1.content", "needs text"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            "messages.0.content.0.image_url",
            "read text only",
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools.0.custom", "send type function"),
        ({"guided_json": {"type": "object"}}, "guided_json", "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "do not reason"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_what_would_change_something_is_refused_at_its_place(
    tiny_api: InProcessApi, changes: dict[str, Any], param: str, words: str
) -> None:
    place, message = refusal(post(tiny_api, **changes))
    assert place == param
    assert words in message


@pytest.mark.promise("B4")
@pytest.mark.parametrize(
    "roles",
    [
        ["system", "system", "user"],
        ["user", "user"],
        ["assistant", "user"],
        ["user", "system"],
        ["user", "assistant"],
        ["developer", "user"],
        ["system"],
    ],
    ids="-".join,
)
def test_any_order_of_roles_is_answered_in_chatml(tiny_api: InProcessApi, roles: list[str]) -> None:
    messages = [{"role": role, "content": f"Text {number}."} for number, role in enumerate(roles)]
    assert answer(post(tiny_api, messages=messages))
    as_system = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
    tokens = [
        httpx.post(f"{tiny_api.url}/tokenize", json={"messages": dialog}).json()["tokens"]
        for dialog in (messages, as_system)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.promise("A1")
def test_an_assistants_message_may_have_no_content(tiny_api: InProcessApi) -> None:
    empty = answer(post(tiny_api, messages=[USER, {"role": "assistant", "content": ""}, USER]))
    for turn in ({"role": "assistant"}, {"role": "assistant", "content": None}, {"role": "assistant", "content": []}):
        assert answer(post(tiny_api, messages=[USER, turn, USER])) == empty


@pytest.mark.promise("A1")
def test_as_many_completions_and_prompts_as_openai_allows(tiny_api: InProcessApi) -> None:
    assert len(answer(post(tiny_api, n=128, max_tokens=1))) == 128
    choices = answer(post(tiny_api, COMPLETIONS, prompt=["Hi"] * 200, max_tokens=1))
    assert [choice["index"] for choice in choices] == list(range(200))
    assert len({choice["text"] for choice in choices}) == 1


@pytest.mark.promise("A1")
def test_usage_comes_with_every_chunk_where_it_is_requested(tiny_api: InProcessApi) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = post(tiny_api, stream=True, stream_options=options).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"] and "usage" in chunk]
    assert counts == sorted(counts)
    assert counts[-1] == chunks[-1]["usage"]["completion_tokens"] == 4
    assert len(counts) >= len(chunks) - 2  # all but the first, with the role, and the last


def test_the_service_tier_is_named_where_one_was_requested(tiny_api: InProcessApi) -> None:
    assert post(tiny_api, service_tier="auto").json()["service_tier"] == "default"
    assert post(tiny_api).json().get("service_tier") is None


def send(api: InProcessApi, content: bytes, method: str = "POST", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, f"{api.url}{CHAT}", content=content, headers=named, timeout=300)


@pytest.mark.promise("A1")
def test_a_body_may_have_no_type_or_be_compressed(tiny_api: InProcessApi) -> None:
    body = json.dumps({"model": tiny_api.base.name, **PLAIN[CHAT]}).encode()
    plain = answer(send(tiny_api, body, content_type="application/json"))
    assert answer(send(tiny_api, body)) == plain
    assert answer(send(tiny_api, body, content_type="application/x-www-form-urlencoded")) == plain
    assert answer(send(tiny_api, body, content_type="application/json; charset=utf-8")) == plain
    assert answer(send(tiny_api, gzip.compress(body), content_encoding="gzip")) == plain


@pytest.mark.promise("B1")
@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"{}", {"content_type": "text/plain"}, 415, "send application/json"),
        (b"{}", {"content_encoding": "br"}, 415, "send gzip"),
        (b"{}", {"content_encoding": "gzip"}, 415, "is not gzip"),
        (gzip.compress(b"{}")[:-4], {"content_encoding": "gzip"}, 415, "one complete gzip file"),
        (gzip.compress(b" " * 3_000_000), {"content_encoding": "gzip"}, 413, "2097152"),
    ],
    ids=["type", "encoding", "no gzip", "half a gzip", "bomb"],
)
def test_a_body_that_cannot_be_read_is_refused(
    tiny_api: InProcessApi, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    response = send(tiny_api, content, **headers)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


@pytest.mark.promise("A1")
def test_head_and_options_are_answered(tiny_api: InProcessApi) -> None:
    models = httpx.get(f"{tiny_api.url}/v1/models")
    head = httpx.head(f"{tiny_api.url}/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == models.headers["content-length"]
    assert httpx.head(f"{tiny_api.url}{CHAT}").status_code == 405
    for route, methods in (
        (CHAT, {"POST", "OPTIONS"}),
        ("/v1/models", {"GET", "HEAD", "OPTIONS"}),
        ("/v1/models/a/b", {"GET", "HEAD", "OPTIONS"}),
        ("/v1/responses/x", {"GET", "DELETE", "HEAD", "OPTIONS"}),
    ):
        options = httpx.options(f"{tiny_api.url}{route}")
        assert (options.status_code, set(options.headers["allow"].split(", "))) == (204, methods)
    refused = httpx.get(f"{tiny_api.url}{CHAT}")
    assert refused.status_code == 405
    assert "send one of OPTIONS, POST" in refused.json()["error"]["message"]


@pytest.mark.promise("A1")
@pytest.mark.parametrize("path", ["/chat/completions", "//v1/chat/completions", "/v1/v1/chat/completions"])
def test_a_wrong_base_url_is_told_the_right_one(tiny_api: InProcessApi, path: str) -> None:
    response = httpx.post(f"{tiny_api.url}{path}", json={})
    assert response.status_code == 404
    assert "the route is /v1/chat/completions, so a base URL ends in /v1" in response.json()["error"]["message"]
    assert "base URL ends in /v1" in httpx.get(f"{tiny_api.url}/nothing").json()["error"]["message"]


def test_the_readme_has_every_such_field() -> None:
    readme = Path("deployments/README.md").read_text(encoding="utf-8")
    table = readme.split("### Fields of other APIs")[1].split("###")[0]
    listed = set(re.findall(r"`(\w+)`", table))
    tables = [table for name, table in vars(extra_fields).items() if name.isupper() and isinstance(table, dict)]
    assert len(tables) > 6
    for fields in tables:
        assert fields.keys() <= listed
