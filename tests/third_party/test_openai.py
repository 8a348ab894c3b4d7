"""OpenAI's own package: sync and async, streaming helpers, typed errors."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.conftest import RunningServer

PARIS: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.promise("A1")
def test_sync_and_async_give_the_same_answer(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": server.base_model, "messages": PARIS, "temperature": 0, "max_tokens": 8}

    async def answers() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(client.chat.completions.create(**fields) for _ in range(4)))

    expected = client.chat.completions.create(**fields).choices[0].message.content
    assert expected is not None
    assert "Paris" in expected
    assert [answer.choices[0].message.content for answer in asyncio.run(answers())] == [expected] * 4


@pytest.mark.promise("A6")
def test_the_stream_helper_sees_every_event_and_the_whole(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": server.base_model, "messages": PARIS, "temperature": 0, "stop": ","}
    with client.chat.completions.stream(**fields, stream_options={"include_usage": True}) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    text = "".join(event.delta for event in events if event.type == "content.delta")
    assert {"chunk", "content.delta", "content.done"} <= {event.type for event in events}
    assert "Paris" in text
    assert final.choices[0].message.content == text
    assert final.choices[0].finish_reason == "stop"
    completion = client.chat.completions.create(**fields)
    assert completion.choices[0].message.content == text
    assert completion.usage is not None
    assert final.usage is not None
    assert final.usage.completion_tokens == completion.usage.completion_tokens


def test_an_adapter_answers_under_its_version(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"messages": PARIS, "temperature": 0, "max_tokens": 12}
    answer = client.chat.completions.create(model=server.adapter, **fields)
    assert answer.model == f"{server.adapter}@1"
    assert answer.choices != client.chat.completions.create(model=server.base_model, **fields).choices


@pytest.mark.promise("A6")
def test_a_stream_cut_by_max_tokens_says_so(server: RunningServer, client: openai.OpenAI) -> None:
    with (
        pytest.raises(openai.LengthFinishReasonError),
        client.chat.completions.stream(model=server.base_model, messages=PARIS, max_tokens=2) as stream,
    ):
        stream.get_final_completion()


@pytest.mark.promise("A6")
def test_the_stream_helper_reports_logprobs(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": server.base_model, "messages": PARIS, "temperature": 0, "max_tokens": 6}
    with client.chat.completions.stream(**fields, logprobs=True, top_logprobs=2) as stream:
        scored = [token for event in stream if event.type == "logprobs.content.delta" for token in event.content]
    completion = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    assert completion.choices[0].logprobs is not None
    assert [token.token for token in scored] == [token.token for token in completion.choices[0].logprobs.content or []]
    assert len(scored) == 6


@pytest.mark.promise("A2")
def test_completions_streamed_and_whole(server: RunningServer, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": server.base_model, "prompt": "One, two,", "temperature": 0, "max_tokens": 8}
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**fields, stream=True))
    assert streamed == client.completions.create(**fields).choices[0].text


def test_b_errors_have_the_types_that_the_package_has_for_them(server: RunningServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="smollm2-135m:nobody", messages=PARIS)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as exc_info:
        client.chat.completions.create(model=server.base_model, messages=PARIS, temperature=9)
    assert exc_info.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model=server.base_model, messages=PARIS, max_tokens=100_000)
    assert too_long.value.code == "context_length_exceeded"
    with (
        pytest.raises(openai.BadRequestError),
        client.chat.completions.stream(model=server.base_model, messages=PARIS, temperature=9),
    ):
        pass


@pytest.mark.promise("A3")
def test_models(server: RunningServer, client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids == [server.base_model, server.adapter, f"{server.adapter}@1"]
    assert client.models.retrieve(server.adapter).id == ids[1]
