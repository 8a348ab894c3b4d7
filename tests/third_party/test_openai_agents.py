"""openai-agents, by its default, /v1/responses, and on chat completions."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal, TypeVar

import agents
import pytest
from agents import Agent, ModelSettings, Runner, RunResult
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.conftest import RunningServer
from tests.third_party.plain import QUESTION, SECOND_QUESTION, TOOL_QUESTION, plain

CityName = Literal["Paris", "Rome"]
T = TypeVar("T")


class City(BaseModel):
    name: CityName
    is_capital: bool


@agents.function_tool
def weather(city: CityName) -> str:
    """How warm it is in a city."""
    return f"18 degrees in {city}"


@pytest.fixture(params=["responses", "chat_completions"])
def api(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the package's models use when an agent only names its model."""
    agents.set_tracing_disabled(True)
    agents.set_default_openai_api(request.param)
    yield str(request.param)
    agents.set_default_openai_api("responses")


def with_client(server: RunningServer, main: Callable[[], Awaitable[T]]) -> T:
    """Run it in an event loop of its own, with the server as what the package takes for OpenAI."""

    async def run() -> T:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            agents.set_default_openai_client(client, use_for_tracing=False)
            return await main()

    return asyncio.run(run())


SYSTEM = "You are brief."  # the package takes an answer that is cut off for a failure


def expected(server: RunningServer, *texts: str) -> dict[str, Any]:
    return plain(server, *texts, system=SYSTEM, max_tokens=64)


def agent(server: RunningServer, tool_choice: str | None = None, **fields: Any) -> Agent[Any]:
    one_call = False if tool_choice == "required" else None  # a small model would not end by itself
    settings = ModelSettings(temperature=0, max_tokens=64, tool_choice=tool_choice, parallel_tool_calls=one_call)
    return Agent(name="Assistant", instructions=SYSTEM, model=server.base_model, model_settings=settings, **fields)


def arguments(result: Any) -> list[str]:
    return [item.raw_item.arguments for item in result.new_items if item.type == "tool_call_item"]


@pytest.mark.promise("F7")
def test_a_run_and_a_second_turn_are_the_plain_answers(server: RunningServer, api: str) -> None:
    async def main() -> tuple[RunResult, RunResult]:
        first = await Runner.run(agent(server), QUESTION)
        dialog = [*first.to_input_list(), {"role": "user", "content": SECOND_QUESTION}]
        return first, await Runner.run(agent(server), dialog)  # type: ignore[arg-type]

    first, second = with_client(server, main)
    whole = expected(server, QUESTION)
    assert first.final_output == whole["text"]
    assert first.context_wrapper.usage.input_tokens == whole["prompt_tokens"]
    assert second.final_output == expected(server, QUESTION, whole["text"], SECOND_QUESTION)["text"]


@pytest.mark.promise("F7")
@pytest.mark.parametrize("api", ["responses"], indirect=True)
def test_a_stored_response_is_continued_by_its_id(server: RunningServer, api: str) -> None:
    async def main() -> tuple[RunResult, RunResult]:
        first = await Runner.run(agent(server), QUESTION)
        return first, await Runner.run(agent(server), SECOND_QUESTION, previous_response_id=first.last_response_id)

    first, second = with_client(server, main)
    assert second.final_output == expected(server, QUESTION, first.final_output, SECOND_QUESTION)["text"]


@pytest.mark.promise("F7")
def test_a_stream_adds_up_to_the_answer(server: RunningServer, api: str) -> None:
    async def main() -> tuple[list[str], str]:
        result = Runner.run_streamed(agent(server), QUESTION)
        raw = [event.data async for event in result.stream_events() if event.type == "raw_response_event"]
        return [data.delta for data in raw if data.type == "response.output_text.delta"], result.final_output

    pieces, final = with_client(server, main)
    assert len(pieces) > 1
    assert "".join(pieces) == final == expected(server, QUESTION)["text"]


@pytest.mark.promise("F7")
def test_an_output_type_is_kept(server: RunningServer, api: str) -> None:
    city = with_client(server, lambda: Runner.run(agent(server, output_type=City), QUESTION)).final_output
    assert isinstance(city, City)


@pytest.mark.promise("F7")
@pytest.mark.parametrize("tool_choice", ["required", "weather"])
def test_a_tool_is_called_and_the_answer_follows_its_result(server: RunningServer, api: str, tool_choice: str) -> None:
    caller = agent(server, tool_choice, tools=[weather])
    result = with_client(server, lambda: Runner.run(caller, TOOL_QUESTION))
    assert [item.type for item in result.new_items][:2] == ["tool_call_item", "tool_call_output_item"]
    assert result.new_items[-1].type == "message_output_item"
    assert result.final_output
    first, *_, last = result.raw_responses
    assert last.usage.input_tokens > first.usage.input_tokens
    assert all(weather.name in str(item) for item in first.to_input_items())


@pytest.mark.promise("F7")
def test_a_streamed_tool_call_is_the_whole_call(server: RunningServer, api: str) -> None:
    caller = agent(server, "required", tools=[weather], tool_use_behavior="stop_on_first_tool")

    async def main() -> tuple[str, Any, RunResult]:
        streamed = Runner.run_streamed(caller, TOOL_QUESTION)
        raw = [event.data async for event in streamed.stream_events() if event.type == "raw_response_event"]
        deltas = [data.delta for data in raw if data.type == "response.function_call_arguments.delta"]
        return "".join(deltas), streamed, await Runner.run(caller, TOOL_QUESTION)

    deltas, streamed, whole = with_client(server, main)
    assert [deltas] == arguments(streamed) == arguments(whole)
    assert streamed.final_output == whole.final_output
    assert whole.final_output in ("18 degrees in Paris", "18 degrees in Rome")
