"""Arbitrary bodies on the real ingress and engine (B): 200 or a 4xx in OpenAI's format, and nothing leaked.

Bodies are built from mostly valid fields, then corrupted: a value replaced, a key lost or added, bytes changed.
"""

import json
import time
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import InProcessApi

ODD_TEXTS = [
    "", " ", "hi", "\0", "\ud800", "\udfff!", "👩‍👩‍👧🏽", "\u202e\ufeff", "<|im_end|>\n<|im_start|>system",
    "</s><s>[INST]", "漢" * 60, "x" * 4000, "\x04", "../../etc/passwd", "{{ 7 * 7 }}", "\r\nx-injected: 1",
]  # fmt: skip
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(st.characters(), max_size=40))
good_texts = st.sampled_from(["hi", "Tell me of horses.", "\0", "é漢", *(text for text in ODD_TEXTS if "<" in text)])
numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63), 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
token_ids = st.lists(st.integers(0, 49151), min_size=1, max_size=12)

SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(0, 60_000),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 49151).map(str), st.floats(-100, 100), max_size=4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.one_of(good_texts, st.lists(good_texts, max_size=16)),
    "n": st.integers(1, 8),
    "stream": st.booleans(),
    "user": texts,
    "ignore_eos": st.booleans(),
}
RESPONSE_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "instructions": good_texts,
    "include": st.just(["message.output_text.logprobs"]),
    "top_logprobs": st.integers(0, 20),
    "metadata": st.dictionaries(good_texts, good_texts, max_size=3),
    "store": st.booleans(),
    "text": st.fixed_dictionaries({"format": st.just({"type": "json_object"})}),
    "reasoning": st.just({"effort": None, "summary": "auto"}),
    "tools": st.just([]),
}
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": good_texts}), min_size=1, max_size=3)
turns = st.lists(st.one_of(good_texts, parts), min_size=1, max_size=5).map(
    lambda messages: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
)
dialogs = turns.map(lambda turns: turns if len(turns) % 2 else turns[:-1])
prompts = st.one_of(
    good_texts, token_ids, st.lists(good_texts, min_size=1, max_size=3), st.lists(token_ids, min_size=1, max_size=3)
)
models = st.sampled_from(["tiny-llama", "tiny-llama:tuned", "tiny-llama:tuned@1"])
Body = dict[str, Any]


@st.composite
def bodies(draw: st.DrawFn, route: str) -> Body:
    """A valid body, except for an occasional dialog that is too long for the context."""
    body = {"model": draw(models), "max_tokens": draw(st.integers(1, 5))}
    if route == "chat/completions":
        body |= draw(st.fixed_dictionaries({"messages": dialogs}, optional=SAMPLING | {"logprobs": st.booleans()}))
        if body.get("logprobs"):
            body["top_logprobs"] = draw(st.integers(0, 20))
    elif route == "responses":
        body["max_output_tokens"] = body.pop("max_tokens")
        fields = {name: SAMPLING[name] for name in SAMPLING if name != "n"} | RESPONSE_FIELDS
        return body | draw(st.fixed_dictionaries({"input": st.one_of(good_texts, dialogs)}, optional=fields))
    else:
        more = {"logprobs": st.integers(0, 20), "echo": st.booleans()}
        body |= draw(st.fixed_dictionaries({"prompt": prompts}, optional=SAMPLING | more))
        if body.get("echo"):
            body["max_tokens"] = draw(st.integers(0, 5))
    if body.get("stream"):
        body["stream_options"] = {"include_usage": draw(st.booleans())}
    if body["max_tokens"]:
        body["min_tokens"] = draw(st.integers(0, body["max_tokens"]))
    return body


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all items in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in ((*path, key), *places(item, (*path, key)))]


@st.composite
def spoiled(draw: st.DrawFn, route: str) -> Body:
    """A valid body with up to three errors."""
    body = json.loads(json.dumps(draw(bodies(route))))
    for _ in range(draw(st.integers(0, 3))):
        where = draw(st.sampled_from(places(body) or [("model",)]))
        holder = body
        for key in where[:-1]:
            holder = holder[key]
        match draw(st.sampled_from(["odd text", "replace", "remove", "add"])):
            case "odd text":
                holder[where[-1]] = draw(texts)
            case "replace":
                holder[where[-1]] = draw(json_values)
            case "remove":
                holder.pop(where[-1], None) if isinstance(holder, dict) else holder.pop()
            case _ if isinstance(holder, dict):
                holder[draw(texts)] = draw(json_values)
            case _:
                holder.append(draw(json_values))
        if not body:
            break
    return body


def check_answer(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    assert response.headers["content-type"].split(";")[0] in ("application/json", "text/event-stream")
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["message"]
        assert error["param"] is None or isinstance(error["param"], str)
    elif response.headers["content-type"].startswith("text/event-stream"):
        if response.text.startswith("event: "):
            assert response.text.split("event: ")[-1].startswith(("response.completed", "response.incomplete"))
            return
        lines = [line for line in response.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert not [chunk for chunk in chunks if "error" in chunk], response.text
        assert len({chunk["id"] for chunk in chunks}) == 1
        check_counts([choice for chunk in chunks for choice in chunk["choices"]])
    else:
        answer = response.json()
        if answer["object"] == "response":
            assert answer["status"] in ("completed", "incomplete")
            return
        check_counts(answer["choices"])
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def check_counts(choices: list[Any]) -> None:
    for index in {choice["index"] for choice in choices}:
        own = [choice["finish_reason"] for choice in choices if choice["index"] == index]
        assert [reason for reason in own if reason] in (["stop"], ["length"])


@pytest.fixture(scope="module")
def client(tiny_api: InProcessApi) -> httpx.Client:
    return httpx.Client(base_url=f"{tiny_api.url}/v1/", headers={"content-type": "application/json"}, timeout=120)


def post(client: httpx.Client, route: str, body: bytes) -> httpx.Response:
    started = time.process_time()  # client and server are this process
    response = client.post(route, content=body)
    if response.status_code != 200:
        assert time.process_time() - started < 2
    return response


def fuzzed(max_examples: int) -> settings:
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck))


@given(body=spoiled("chat/completions"))
@fuzzed(300)
def test_b_any_dialog_is_answered_or_refused_as_openai_does(client: httpx.Client, body: Body) -> None:
    check_answer(post(client, "chat/completions", json.dumps(body).encode()))


@given(body=spoiled("completions"))
@fuzzed(300)
def test_b_any_prompt_is_answered_or_refused_as_openai_does(client: httpx.Client, body: Body) -> None:
    check_answer(post(client, "completions", json.dumps(body).encode()))


@pytest.mark.promise("F3")
@given(body=spoiled("responses"))
@fuzzed(300)
def test_any_input_is_answered_or_refused_as_openai_does(client: httpx.Client, body: Body) -> None:
    check_answer(post(client, "responses", json.dumps(body).encode()))


@pytest.mark.promise("B1")
@given(value=json_values, route=st.sampled_from(["chat/completions", "completions", "responses"]))
@example(value={"model": "tiny-llama"}, route="completions")
@fuzzed(100)
def test_any_json_is_refused_as_openai_does(client: httpx.Client, value: Any, route: str) -> None:
    response = post(client, route, json.dumps(value).encode())
    assert response.status_code in (400, 404)
    check_answer(response)


@given(
    body=bodies("chat/completions"),
    cut=st.integers(0, 400),
    place=st.integers(0, 400),
    inserted=st.one_of(st.binary(max_size=6), st.sampled_from([b"[" * 2000, b"9" * 5000, b"1e999", b"\xed\xa0\x80"])),
)
@pytest.mark.promise("B1")
@fuzzed(200)
def test_any_damage_to_the_bytes_is_answered_or_refused(
    client: httpx.Client, body: Body, cut: int, place: int, inserted: bytes
) -> None:
    content = json.dumps(body).encode()
    check_answer(post(client, "chat/completions", content[:place] + inserted + content[place + cut :]))


@given(
    model=texts.filter(lambda text: text not in ("tiny-llama",)).map(lambda text: f"tiny-llama:{text}")
    | texts
    | st.from_regex(r"[a-z0-9.:@/-]{0,80}", fullmatch=True)
)
@pytest.mark.promise("B6")
@fuzzed(200)
def test_any_other_model_id_is_404_or_400(client: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    response = post(client, "chat/completions", json.dumps(body).encode())
    if model not in ("tiny-llama", "tiny-llama:tuned", "tiny-llama:tuned@1"):
        assert response.status_code in (400, 404)
        assert response.json()["error"]["param"] == "model"
    check_answer(response)


def test_b_nothing_is_left_behind(client: httpx.Client, tiny_api: InProcessApi) -> None:
    """After the tests above: no sequence, block or adapter reference is held, and requests are answered."""
    body = {"model": tiny_api.adapter, "prompt": "hi", "max_tokens": 2}
    assert client.post("completions", json=body).status_code == 200
    engine = tiny_api.model._engine
    deadline = time.monotonic() + 300
    while engine.num_running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (engine.num_running, engine.num_waiting, engine.num_adapter_references) == (0, 0, 0)
    assert engine.num_free_blocks == engine.num_blocks
