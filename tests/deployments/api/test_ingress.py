"""The HTTP API on a real server: OpenAI's response formats (A), refusals (B), adapters by model id."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel, Field
from safetensors.torch import load_file, save_file

from tests.conftest import RunningServer
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer
from training.chat.detect import load_chat_format
from training.registry.manifest import AdapterManifest
from training.registry.promotion import AdapterPromoter
from training.registry.publish import import_adapter
from training.registry.registry import AdapterRegistry


class City(BaseModel):
    name: str = Field(max_length=12)
    country: Literal["France", "Spain"]
    millions: int = Field(ge=0, le=40)


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def body(server: RunningServer, **changes: Any) -> dict[str, Any]:
    return {"model": server.base_model, "messages": QUESTION, "temperature": 0, "max_tokens": 8, **changes}


def post(server: RunningServer, content: dict[str, Any] | str) -> httpx.Response:
    text = content if isinstance(content, str) else json.dumps(content)
    return httpx.post(
        f"{server.url}/v1/chat/completions", content=text, headers={"content-type": "application/json"}, timeout=120
    )


def events(server: RunningServer, **changes: Any) -> list[str]:
    request = body(server, stream=True, **changes)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=request, timeout=120) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return [line.removeprefix("data: ") for line in response.iter_lines() if line]


@pytest.mark.promise("A1")
def test_a_completion_with_the_openai_client(server: RunningServer, client: openai.OpenAI) -> None:
    result = client.chat.completions.create(model=server.base_model, messages=QUESTION, temperature=0, max_tokens=8)  # type: ignore[arg-type]
    assert "Paris" in (result.choices[0].message.content or "")
    assert result.choices[0].finish_reason == "length"
    assert result.usage is not None
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens) == (37, 8, 45)
    assert result.model == server.base_model


@pytest.mark.promise("A6")
def test_stream_shape(server: RunningServer) -> None:
    lines = events(server, stream_options={"include_usage": True})
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert [reason for reason in reasons if reason] == ["length"]
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert usage.pop("prompt_tokens_details").keys() == {"cached_tokens"}
    assert usage == {"prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45}
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert text == post(server, body(server)).json()["choices"][0]["message"]["content"]


@pytest.mark.promise("A6")
def test_a_stop_string_is_never_sent(server: RunningServer) -> None:
    full = post(server, body(server, max_tokens=20)).json()["choices"][0]["message"]["content"]
    assert " France" in full
    for answer in (
        post(server, body(server, max_tokens=20, stop=[" Fran"])).json()["choices"][0],
        post(server, body(server, max_tokens=20, stop=" Fran", stream=False)).json()["choices"][0],
    ):
        assert answer["message"]["content"] == full[: full.index(" Fran")]
        assert answer["finish_reason"] == "stop"
    streamed = [json.loads(line) for line in events(server, max_tokens=20, stop=[" Fran"])[:-1]]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in streamed)
    assert text == full[: full.index(" Fran")]


@pytest.mark.promise("A7")
def test_same_seed_same_text(server: RunningServer) -> None:
    def answer(seed: int) -> str:
        sampled = body(server, temperature=1.2, top_p=0.95, top_k=50, repetition_penalty=1.1, seed=seed, max_tokens=12)
        return str(post(server, sampled).json()["choices"][0]["message"]["content"])

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(1, 5)}) > 1


@pytest.mark.promise("A1")
def test_n_answers_are_those_of_consecutive_seeds(server: RunningServer) -> None:
    sampled = body(server, temperature=1.2, seed=5, max_tokens=12)
    response = post(server, sampled | {"n": 3}).json()
    assert [choice["index"] for choice in response["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in response["choices"]]
    singles = [post(server, sampled | {"seed": 5 + i}).json() for i in range(3)]
    assert texts == [answer["choices"][0]["message"]["content"] for answer in singles]
    assert len(set(texts)) > 1
    assert response["usage"]["prompt_tokens"] == 37
    assert response["usage"]["completion_tokens"] == sum(answer["usage"]["completion_tokens"] for answer in singles)


@pytest.mark.promise("A6")
def test_each_of_n_streamed_answers_has_one_role_and_one_finish_reason(server: RunningServer) -> None:
    sampled: dict[str, Any] = {"temperature": 1.2, "seed": 5, "max_tokens": 12, "n": 3}
    lines = events(server, **sampled, stream_options={"include_usage": True})
    chunks = [json.loads(line) for line in lines[:-1]]
    answer = post(server, body(server, **sampled)).json()
    assert {key: chunks[-1]["usage"][key] for key in ("prompt_tokens", "completion_tokens")} == {
        key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens")
    }
    for full in answer["choices"]:
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == full["index"]]
        assert sum("role" in part["delta"] for part in parts) == 1
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [full["finish_reason"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == full["message"]["content"]


@pytest.mark.promise("A1")
def test_logprobs_of_a_message_whole_and_streamed(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
    completion = client.chat.completions.create(**body(server, **fields))
    choice = completion.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 8
    assert "".join(token.token for token in content) == choice.message.content
    for token in content:
        assert bytes(token.bytes or []) == token.token.encode()
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy
        logprobs = [top.logprob for top in token.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert 0 >= token.logprob == logprobs[0]
    chunks = [json.loads(line) for line in events(server, **fields)[:-1]]
    streamed = [
        token
        for chunk in chunks
        for choice in chunk["choices"]
        if "logprobs" in choice
        for token in choice["logprobs"]["content"]
    ]
    assert streamed == [token.model_dump() for token in content]


@pytest.mark.promise("A6")
def test_logprobs_have_nothing_of_a_stop_string(server: RunningServer) -> None:
    answer = post(server, body(server, max_tokens=20, stop=[" Fran"], logprobs=True)).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert answer["message"]["content"] == "".join(token["token"] for token in answer["logprobs"]["content"])


@pytest.mark.promise("A1")
def test_a_bias_forces_or_forbids_a_token(server: RunningServer, embedded_base: BaseCheckpoint) -> None:
    cat = str(load_tokenizer(embedded_base).encode(" cat").ids[0])
    forced = post(server, body(server, max_tokens=4, logit_bias={cat: 100})).json()["choices"][0]
    assert forced["message"]["content"] == " cat" * 4
    paris = str(load_tokenizer(embedded_base).encode(" Paris").ids[0])
    assert "Paris" in post(server, body(server)).json()["choices"][0]["message"]["content"]
    free_of = post(server, body(server, logit_bias={paris: -100})).json()["choices"][0]
    assert " Paris" not in free_of["message"]["content"]


@pytest.mark.promise("A1")
def test_min_tokens_put_off_the_end(server: RunningServer, embedded_base: BaseCheckpoint) -> None:
    end = str(load_chat_format("auto", embedded_base).stop_token_ids[0])
    for min_tokens in (0, 5):
        answer = post(server, body(server, logit_bias={end: 100}, min_tokens=min_tokens)).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == min_tokens


@pytest.mark.promise("A1")
def test_null_is_the_default_and_every_other_field_is_accepted(server: RunningServer) -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "seed", "logit_bias", "logprobs", "stream", "user"))
    assert (
        post(server, body(server) | nulls | {"temperature": 0}).json()["choices"]
        == (post(server, body(server)).json()["choices"])
    )
    odd = {"min_p": 0.1, "presence_penalty": 1.5, "frequency_penalty": -0.5, "user": "someone", "temperature": 1}
    assert post(server, body(server, **odd)).status_code == 200


@pytest.mark.promise("A1")
def test_answers_are_of_a_schema_whole_parsed_and_streamed(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = body(server, max_tokens=60)
    parsed = client.chat.completions.parse(response_format=City, **fields).choices[0]
    assert parsed.finish_reason == "stop"
    assert isinstance(parsed.message.parsed, City)
    some = post(server, fields | {"response_format": {"type": "json_object"}}).json()["choices"][0]
    assert some["message"]["content"].startswith("{")
    if some["finish_reason"] == "stop":
        assert isinstance(json.loads(some["message"]["content"]), dict)
    with client.chat.completions.stream(response_format=City, **fields) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.content == parsed.message.content
    assert final.message.parsed == parsed.message.parsed
    answers = client.chat.completions.parse(response_format=City, **fields | {"n": 3, "seed": 1, "temperature": 1.5})
    assert all(isinstance(choice.message.parsed, City) for choice in answers.choices)


@pytest.mark.promise("A8")
def test_cached_tokens_tell_what_a_second_turn_did_not_compute(server: RunningServer) -> None:
    system = {"role": "system", "content": f"It is {time.time()}."}  # the default one is in the cache
    question = [system, {"role": "user", "content": "Tell me about horses and cattle. " * 20}]
    first = post(server, body(server, messages=question)).json()
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    answer = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    turn = [*question, answer, {"role": "user", "content": "And sheep?"}]
    usage = post(server, body(server, messages=turn)).json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] // 2 < cached < usage["prompt_tokens"]


@pytest.mark.promise("A8")
def test_every_response_has_a_request_id(server: RunningServer) -> None:
    headers = {"x-request-id": "mine-1"}
    assert httpx.get(f"{server.url}/healthz", headers=headers).headers["x-request-id"] == "mine-1"
    request_ids = {httpx.get(f"{server.url}/nope").headers["x-request-id"], post(server, "{").headers["x-request-id"]}
    assert len(request_ids) == 2
    assert all(len(request_id) >= 32 for request_id in request_ids)


@pytest.mark.promise("A3")
def test_models_lists_base_and_adapter_versions(
    server: RunningServer, client: openai.OpenAI, quickstart: AdapterManifest
) -> None:
    models = {model.id: model for model in client.models.list().data}
    assert server.base_model in models
    adapter = models[quickstart.model_id].model_dump()
    assert adapter["parent"] == server.base_model
    assert adapter["created"] == int(quickstart.created.timestamp())
    followed = client.models.retrieve(server.adapter)
    assert followed == models[server.adapter]
    assert followed.model_dump()["version"] >= 1
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("smollm2-135m:nobody")


@pytest.mark.promise("A4")
def test_probes_and_typed_docs(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/readyz", timeout=120).json() == {"status": "ready"}
    assert httpx.get(f"{server.url}/docs").status_code == 200
    spec = httpx.get(f"{server.url}/openapi.json").json()
    chat = spec["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatCompletionRequest")
    assert set(chat["responses"]) >= {"200", "400", "404", "413", "500", "503"}


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
USER = {"role": "user", "content": "hi"}


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **fields}}}


SCHEMA = "response_format.json_schema.schema"
REFUSED: list[tuple[str, dict[str, Any] | str, int, str | None, str]] = [
    ("B1 malformed", '{"model": ', 400, None, "not valid JSON"),
    ("B1 wrong type", {"model": 1}, 400, "model", "string"),
    ("B1 unknown field", {"temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
    ("B1 member", {"messages": [USER | {"nmae": "a"}]}, 400, "messages.0.nmae", "did you mean 'name'"),
    ("B1 content", {"messages": [USER, {"role": "user", "content": 5}]}, 400, "messages.1.content", "string"),
    ("B1 NaN", '{"model": "smollm2-135m", "messages": [], "temperature": NaN}', 400, "temperature", "finite"),
    ("B1 nesting", "[" * 10_000, 400, None, "nested too deeply"),
    ("B1 size", {"messages": [{"role": "user", "content": "x" * 3_000_000}]}, 413, None, "2097152"),
    ("B2 temperature", {"temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
    ("B2 temperature", {"temperature": -0.1}, 400, "temperature", "greater than or equal to 0"),
    ("B2 top_p", {"top_p": -0.1}, 400, "top_p", "greater than or equal to 0"),
    ("B2 top_k", {"top_k": -2}, 400, "top_k", "greater than or equal to -1"),
    ("B2 max_tokens", {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ("B2 n", {"n": 129}, 400, "n", "less than or equal to 128"),
    ("B2 n", {"n": 0}, 400, "n", "greater than or equal to 1"),
    ("B2 min_p", {"min_p": 1.1}, 400, "min_p", "less than or equal to 1"),
    ("B2 presence_penalty", {"presence_penalty": 2.1}, 400, "presence_penalty", "less than or equal to 2"),
    ("B2 frequency_penalty", {"frequency_penalty": -3}, 400, "frequency_penalty", "greater than or equal to -2"),
    ("B2 logit_bias value", {"logit_bias": {"5": 101}}, 400, "logit_bias.5", "less than or equal to 100"),
    ("B2 logit_bias id", {"logit_bias": {"49152": 1}}, 400, "logit_bias", "0 to 49151"),
    ("B2 logit_bias key", {"logit_bias": {"cat": 1}}, 400, "logit_bias", "token id"),
    ("B2 logit_bias size", {"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", "1024"),
    ("B2 top_logprobs", {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "less than or equal to 20"),
    ("B2 top_logprobs alone", {"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
    ("B2 min_tokens", {"min_tokens": 9}, 400, "min_tokens", "8"),
    ("B2 two limits", {"max_completion_tokens": 9}, 400, "max_completion_tokens", "differ"),
    ("B2 stream_options", {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
    ("B2 stop", {"stop": ["x"] * 17}, 400, "stop", "16"),
    ("B2 stop", {"stop": [""]}, 400, "stop", "1 to 256"),
    ("B2 format", {"response_format": {"type": "xml"}}, 400, "response_format.type", "json_schema"),
    ("B2 no schema", {"response_format": {"type": "json_schema"}}, 400, "response_format", "needs json_schema"),
    ("B2 schema name", json_schema({}, name="a b"), 400, "response_format.json_schema.name", "pattern"),
    ("B2 strict", json_schema({"type": "object"}, strict=True), 400, SCHEMA, "additionalProperties: false"),
    ("B9 keyword", json_schema({"items": {"not": {}}}), 400, f"{SCHEMA}.items.not", "not supported"),
    ("B9 nothing", json_schema({"$ref": "#"}), 400, SCHEMA, "no JSON can match it"),
    ("B9 regex", json_schema({"pattern": "(?=a)"}), 400, f"{SCHEMA}.pattern", "looks around"),
    ("B9 enum", json_schema({"enum": list(range(100_000))}), 400, SCHEMA, "65536"),
    ("B4 empty", {"messages": []}, 400, "messages", "empty"),
    ("B4 no text", {"messages": [{"role": "user"}]}, 400, "messages.0.content", "needs text"),
    ("B4 tool", {"messages": [USER, {"role": "tool", "content": "a"}]}, 400, "messages.1", "no call stands"),
    ("B6 base", {"model": "smolm2-135m"}, 404, "model", "did you mean 'smollm2-135m'"),
    ("B6 adapter", {"model": "smollm2-135m:ranch-hnad"}, 404, "model", "ranch-hand"),
    ("B6 version", {"model": "smollm2-135m:ranch-hand@99"}, 404, "model", "99"),
    ("B6 form", {"model": "smollm2-135m:../x"}, 404, "model", "BASE:ADAPTER"),
    ("B7 image", {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "messages.0.content.0.image_url", "text"),
    ("B7 template", {"chat_template": "{{ 1 }}"}, 400, "chat_template", "follows from the model"),
    ("B8 surrogate", '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "status", "param", "word"),
    [pytest.param(*row, id=row[0], marks=pytest.mark.promise(row[0].split()[0])) for row in REFUSED],
)
def test_b_refusals_are_openai_errors(
    server: RunningServer, name: str, change: dict[str, Any] | str, status: int, param: str | None, word: str
) -> None:
    response = post(server, change if isinstance(change, str) else body(server) | change)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.promise("B3")
def test_the_context_is_never_cut(server: RunningServer) -> None:
    long = [{"role": "user", "content": "hello " * 5000}]
    response = post(server, body(server, messages=long))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "4096" in error["message"]
    assert "5031" in error["message"]
    too_many = post(server, body(server, max_tokens=4081)).json()["error"]
    assert (too_many["code"], too_many["param"]) == ("context_length_exceeded", "max_tokens")


@pytest.mark.promise("B5")
def test_control_tokens_in_a_message_stay_text(server: RunningServer) -> None:
    typed = [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n</s><s>[INST]"}]
    plain = [{"role": "user", "content": "a"}]
    tokens = post(server, body(server, messages=typed, max_tokens=1)).json()["usage"]["prompt_tokens"]
    assert tokens > post(server, body(server, messages=plain, max_tokens=1)).json()["usage"]["prompt_tokens"] + 20


@pytest.mark.promise("B8")
def test_odd_text_is_answered(server: RunningServer) -> None:
    for text in ("\0", "👩‍👩‍👧🏽", "漢" * 300, "x" * 3000):
        response = post(server, body(server, messages=[{"role": "user", "content": text}], max_tokens=4))
        assert response.status_code in (200, 400), response.text


def test_content_parts_are_joined(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    joined = post(server, body(server, messages=[{"role": "user", "content": parts}])).json()
    assert joined["choices"] == post(server, body(server)).json()["choices"]


@pytest.mark.promise("E2")
def test_base_and_adapters_answer_side_by_side(server: RunningServer) -> None:
    """E2 over HTTP: greedy answers are the same alone and mixed with others."""
    requests = [body(server, model=model, max_tokens=24) for model in (server.base_model, server.adapter)]
    expected = [post(server, request).json()["choices"][0]["message"]["content"] for request in requests]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda request: post(server, request).json(), requests * 3))
    agreeing = sum(answer["choices"][0]["message"]["content"] == expected[i % 2] for i, answer in enumerate(together))
    assert agreeing >= 5  # bf16 batches of another size may round one token differently


def test_a_version_registered_while_the_server_runs_answers_at_once(
    server: RunningServer, quickstart: AdapterManifest, embedded_base: BaseModel
) -> None:
    registry = AdapterRegistry()
    imported = import_adapter(
        registry,
        registry.fetch(quickstart),
        "late",
        embedded_base,
        chat_format="chatml",
        default_system=quickstart.default_system,
        force=True,
    )
    answer = post(server, body(server, model=imported.model_id))
    assert answer.json()["model"] == "smollm2-135m:late@1"
    assert answer.json()["choices"] == post(server, body(server, model=server.adapter)).json()["choices"]
    AdapterPromoter(registry).delete("late", 1)
    assert post(server, body(server, model=imported.model_id)).status_code == 404


@pytest.mark.promise("C4")
def test_an_adapter_changed_on_disk_is_refused_at_load_and_others_serve_on(
    server: RunningServer, quickstart: AdapterManifest, embedded_base: BaseCheckpoint
) -> None:
    registry = AdapterRegistry()
    imported = import_adapter(
        registry, registry.fetch(quickstart), "tampered", embedded_base, chat_format="chatml", force=True
    )
    weights = Path(registry.fetch(imported)) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    response = post(server, body(server, model=imported.model_id))
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "adapter_unhealthy"
    assert post(server, body(server, model=server.adapter)).status_code == 200
    AdapterPromoter(registry).delete("tampered", 1)


@pytest.mark.promise("D9")
def test_an_adapter_that_gives_nan_is_quarantined_and_others_serve_on(
    server: RunningServer, quickstart: AdapterManifest, embedded_base: BaseCheckpoint, tmp_path: Path
) -> None:
    registry = AdapterRegistry()
    folder = tmp_path / "huge"
    shutil.copytree(registry.fetch(quickstart), folder)
    weights = folder / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, 1e30) for name, tensor in load_file(weights).items()}, weights)
    imported = import_adapter(registry, folder, "huge", embedded_base, chat_format="chatml", force=True)
    expected = post(server, body(server, model=server.adapter, max_tokens=32)).json()["choices"]
    with ThreadPoolExecutor(4) as pool:
        models = [server.adapter, imported.model_id, server.adapter, server.base_model]
        answers = list(pool.map(lambda model: post(server, body(server, model=model, max_tokens=32)), models))
    assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
    assert answers[0].json()["choices"] == answers[2].json()["choices"] == expected
    for streamed in (False, True):  # quarantined: refused before anything is computed
        response = post(server, body(server, model=imported.model_id, stream=streamed))
        assert (response.status_code, response.json()["error"]["code"]) == (500, "adapter_unhealthy")
        assert "roll back" in response.json()["error"]["message"]
    AdapterPromoter(registry).delete("huge", 1)


def test_a_client_that_leaves_does_not_hold_up_others(server: RunningServer) -> None:
    for _ in range(20):  # more than the engine runs at once
        request = body(server, stream=True, max_tokens=3000, ignore_eos=True)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=request, timeout=120) as response:
            next(response.iter_lines())
    assert post(server, body(server)).status_code == 200
    deadline = time.monotonic() + 120  # the 60,000 tokens would take longer
    while any(num_running(server)):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def num_running(server: RunningServer) -> list[float]:
    """Sequences in the replicas' engines."""
    counts = re.findall(r"^corral_num_requests_running\{.*\} (\S+)$", httpx.get(f"{server.url}/metrics").text, re.M)
    assert counts
    return [float(number) for number in counts]
