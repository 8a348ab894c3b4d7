"""langchain-openai: invoke, batch and stream, on the base and on an adapter."""

from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from tests.conftest import RunningServer
from tests.third_party.plain import QUESTION, SECOND_QUESTION, TOOL_QUESTION, plain


def chat(server: RunningServer, **fields: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {"model": server.base_model, "temperature": 0, "max_tokens": 8, "max_retries": 0}
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", **settings | fields)  # type: ignore[arg-type]


@pytest.mark.promise("A1")
def test_invoke_and_batch(server: RunningServer) -> None:
    dialog = [SystemMessage("You are brief."), HumanMessage("Hi."), AIMessage("Hello."), HumanMessage("Say a word.")]
    answer = chat(server).invoke(dialog)
    assert isinstance(answer.content, str)
    assert answer.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 8
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    questions = ["What is the capital of France?", "What is two plus two?"]
    batch = chat(server).batch(questions)
    assert [message.content for message in batch] == [chat(server).invoke(question).content for question in questions]


@pytest.mark.promise("A6")
def test_stream_adds_up_to_the_answer(server: RunningServer) -> None:
    model = chat(server, model=server.adapter, stream_usage=True)
    chunks = list(model.stream("What is the capital of France?"))
    assert len(chunks) > 1
    assert "".join(str(chunk.content) for chunk in chunks) == model.invoke("What is the capital of France?").content
    used = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in used] == [8]


@pytest.mark.promise("A1")
def test_a_bound_stop_and_logprobs(server: RunningServer) -> None:
    model = chat(server).bind(stop=[" is"], logprobs=True, top_logprobs=2)
    answer = model.invoke("What is the capital of France?")
    assert " is" not in answer.content
    scored = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in scored) == answer.content


@pytest.mark.promise("A2")
def test_the_completion_class(server: RunningServer) -> None:
    model = OpenAI(
        model=server.base_model,
        base_url=f"{server.url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=6,
        max_retries=0,  # type: ignore[arg-type]
    )
    assert model.invoke("One, two,") == "".join(model.stream("One, two,"))


class City(BaseModel):
    name: str
    is_capital: bool


@pytest.mark.promise("A1", "F7")
@pytest.mark.parametrize("api", ["completions", "responses"])
def test_structured_output_by_the_default_method(server: RunningServer, api: str) -> None:
    model = chat(server, max_tokens=64, use_responses_api=api == "responses").with_structured_output(City)
    city = model.invoke("Is Paris a capital? Answer in JSON.")
    assert isinstance(city, City)


@pytest.mark.promise("F7")
def test_structured_output_by_a_function(server: RunningServer) -> None:
    model = chat(server, max_tokens=64).with_structured_output(City, method="function_calling")
    assert isinstance(model.invoke("Is Paris a capital?"), City)


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """How warm it is in a city."""
    return f"18 degrees in {city}"


@pytest.mark.promise("F7")
@pytest.mark.parametrize("api", ["completions", "responses"])
def test_a_tool_is_called_and_its_result_goes_back(server: RunningServer, api: str) -> None:
    model = chat(server, max_tokens=64, use_responses_api=api == "responses")
    question = HumanMessage(TOOL_QUESTION)
    called = model.bind_tools([weather], tool_choice="weather").invoke([question])
    (call,) = called.tool_calls
    assert call["name"] == "weather"
    assert not called.invalid_tool_calls
    result = weather.invoke(call)
    assert result.content in ("18 degrees in Paris", "18 degrees in Rome")
    final = model.bind_tools([weather], tool_choice="none").invoke([question, called, result])
    assert final.text
    assert final.usage_metadata is not None
    assert called.usage_metadata is not None
    assert final.usage_metadata["input_tokens"] > called.usage_metadata["input_tokens"]

    whole = AIMessageChunk("")
    for chunk in model.bind_tools([weather], tool_choice="any", parallel_tool_calls=False).stream([question]):
        whole += chunk  # type: ignore[assignment]
    assert [(streamed["name"], streamed["args"]) for streamed in whole.tool_calls] == [(call["name"], call["args"])]


@pytest.mark.promise("F7")
@pytest.mark.parametrize("api", ["completions", "responses"])
def test_a_second_turn_continues_the_first(server: RunningServer, api: str) -> None:
    model = chat(server, max_tokens=16, use_responses_api=api == "responses")
    first = model.invoke(QUESTION)
    assert first.text == plain(server, QUESTION)["text"]
    second = model.invoke([HumanMessage(QUESTION), first, HumanMessage(SECOND_QUESTION)])
    assert second.text == plain(server, QUESTION, str(first.text), SECOND_QUESTION)["text"]


def test_b_a_refusal_names_its_reason(server: RunningServer) -> None:
    with pytest.raises(Exception, match=r"did you mean") as exc_info:
        chat(server, model="smollm2-135m:ranch-hnad").invoke("hi")
    assert getattr(exc_info.value, "status_code", None) == 404
