"""pydantic-ai, on chat completions and, by the default of its `openai:` models, on /v1/responses."""

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, RunContext, Tool
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.messages import ModelResponse, ToolCallPart, ToolReturnPart
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.conftest import RunningServer
from tests.third_party.plain import QUESTION, SECOND_QUESTION, TOOL_QUESTION, plain

CityName = Literal["Paris", "Rome"]


class City(BaseModel):
    name: CityName
    is_capital: bool


def read_weather(city: CityName) -> str:
    """How warm it is in a city."""
    return f"18 degrees in {city}"


weather = Tool(read_weather, name="weather")


@dataclass
class ForcedFirst(AbstractCapability[Any]):
    """The first request of a run must call the tool, those after it must not: a small model does not choose well."""

    def get_model_settings(self) -> Any:
        def settings(context: RunContext[Any]) -> ModelSettings:
            return ModelSettings(tool_choice="required" if context.run_step == 1 else "none", parallel_tool_calls=False)

        return settings


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel])
def model(request: pytest.FixtureRequest, server: RunningServer) -> Model:
    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    settings = ModelSettings(temperature=0, max_tokens=16)
    made: Model = request.param(server.base_model, provider=provider, settings=settings)
    return made


LONGER = ModelSettings(max_tokens=64)


@pytest.mark.promise("F7")
def test_a_run_and_a_second_turn_are_the_plain_answers(server: RunningServer, model: Model) -> None:
    first = Agent(model).run_sync(QUESTION)
    expected = plain(server, QUESTION)
    assert first.output == expected["text"]
    assert (first.usage.input_tokens, first.usage.output_tokens) == (expected["prompt_tokens"], 16)
    second = Agent(model).run_sync(SECOND_QUESTION, message_history=first.all_messages())
    assert second.output == plain(server, QUESTION, first.output, SECOND_QUESTION)["text"]


@pytest.mark.promise("F7")
def test_a_stream_adds_up_to_the_answer(server: RunningServer, model: Model) -> None:
    async def main() -> list[str]:
        async with Agent(model).run_stream(QUESTION) as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    pieces = asyncio.run(main())
    assert len(pieces) > 1
    assert "".join(pieces) == plain(server, QUESTION)["text"]


@pytest.mark.promise("F7")
@pytest.mark.parametrize("output_type", [City, NativeOutput(City)], ids=["default", "native"])
def test_an_output_type_is_kept(model: Model, output_type: Any) -> None:
    """The default is a tool that the model must call; `NativeOutput` sends a `response_format`."""
    agent = Agent(model, output_type=output_type, retries=0)
    result = agent.run_sync(QUESTION, model_settings=LONGER)
    assert isinstance(result.output, City)
    assert result.usage.requests == 1


@pytest.mark.promise("F7")
def test_a_streamed_output_type_is_kept(model: Model) -> None:
    async def main() -> list[City]:
        async with Agent(model, output_type=City, retries=0).run_stream(QUESTION, model_settings=LONGER) as result:
            return [city async for city in result.stream_output(debounce_by=None)]

    assert isinstance(asyncio.run(main())[-1], City)


@pytest.mark.promise("F7")
def test_a_tool_is_called_and_the_answer_follows_its_result(model: Model) -> None:
    agent = Agent(model, tools=[weather], capabilities=[ForcedFirst()], retries=0)
    result = agent.run_sync(TOOL_QUESTION, model_settings=LONGER)
    parts = [part for message in result.all_messages() for part in message.parts]
    (call,) = [part for part in parts if isinstance(part, ToolCallPart)]
    (returned,) = [part for part in parts if isinstance(part, ToolReturnPart)]
    assert call.tool_name == returned.tool_name == "weather"
    assert call.tool_call_id == returned.tool_call_id
    assert returned.content == f"18 degrees in {call.args_as_dict()['city']}"
    first, last = [message for message in result.all_messages() if isinstance(message, ModelResponse)]
    assert first.finish_reason in ("tool_call", "stop")  # what the package calls every response that is complete
    assert last.usage.input_tokens > first.usage.input_tokens
    assert result.output
