"""dspy: its LM as it is, and its programs on a model that is declared to have schemas and tools.

Of a model that dspy does not know it believes that it has neither, and asks the server for nothing but text.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import dspy
import pytest
from dspy import lm15

from tests.conftest import RunningServer
from tests.third_party.plain import QUESTION, SECOND_QUESTION, TOOL_QUESTION, plain

CityName = Literal["Paris", "Rome"]
SETTINGS: dict[str, Any] = {"temperature": 0, "max_tokens": 64, "cache": False, "num_retries": 0}


class City(dspy.Signature):
    """Say whether a city is a capital."""

    question: str = dspy.InputField()
    name: CityName = dspy.OutputField()
    is_capital: bool = dspy.OutputField()


class Dialog(dspy.Signature):
    """Answer in a word."""

    question: str = dspy.InputField()
    history: dspy.History = dspy.InputField()
    answer: str = dspy.OutputField(max_length=12)


class Place(dspy.Signature):
    """Say in which city it is warm."""

    question: str = dspy.InputField()
    city: CityName = dspy.OutputField()


@pytest.fixture(scope="module")
def lm(server: RunningServer) -> Iterator[dspy.LM]:
    access = lm15.AccessPolicy(provider="corral", env_keys=(), base_url=f"{server.url}/v1")
    definition = lm15.ProviderDefinition.chat(access, compat=lm15.OpenAIChatCompat(), placeholder_key="none")
    lm15.register_provider(definition, supports=lm15.ModelSupport(function_calling=True, response_schema=True))
    lm = dspy.LM(f"corral/{server.base_model}", **SETTINGS)
    with dspy.context(lm=lm):
        yield lm
    lm15.unregister_provider("corral")


@pytest.mark.promise("F7")
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_the_lm_gets_the_plain_answer(server: RunningServer, adapter: bool) -> None:
    model = server.adapter if adapter else server.base_model
    for engine in ("auto", "litellm"):
        settings = SETTINGS | {"max_tokens": 16, "api_base": f"{server.url}/v1", "api_key": "none", "engine": engine}
        assert dspy.LM(f"openai/{model}", **settings)(QUESTION) == [plain(server, QUESTION, model=model)["text"]]


@pytest.mark.promise("F7")
def test_a_signature_is_kept_where_the_markers_of_its_default_adapter_fail(lm: dspy.LM) -> None:
    city = dspy.Predict(City)(question="Is Paris a capital?")
    assert city.name in ("Paris", "Rome")
    assert isinstance(city.is_capital, bool)


@pytest.mark.promise("F7")
def test_a_second_turn_has_the_first_in_its_prompt(lm: dspy.LM) -> None:
    with dspy.context(adapter=dspy.JSONAdapter()):
        first = dspy.Predict(Dialog)(question=QUESTION, history=dspy.History(messages=[]))
        before = lm.history[-1]["usage"]["prompt_tokens"]
        history = dspy.History(messages=[{"question": QUESTION, "answer": first.answer}])
        second = dspy.Predict(Dialog)(question=SECOND_QUESTION, history=history)
    assert [message["role"] for message in lm.history[-1]["messages"]] == ["system", "user", "assistant", "user"]
    assert lm.history[-1]["usage"]["prompt_tokens"] > before
    assert 0 < len(second.answer) <= 12


@pytest.mark.promise("F7")
def test_a_streamed_field_adds_up_to_the_prediction(lm: dspy.LM) -> None:
    async def main() -> list[Any]:
        listeners = [dspy.streaming.StreamListener("answer")]
        with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
            program = dspy.streamify(dspy.Predict(Dialog), stream_listeners=listeners)
            return [part async for part in program(question=QUESTION, history=dspy.History(messages=[]))]

    *pieces, prediction = asyncio.run(main())
    assert isinstance(prediction, dspy.Prediction)
    assert len(pieces) > 1
    assert json.loads("".join(piece.chunk for piece in pieces)) == prediction.answer  # dspy streams the JSON of a value


@pytest.mark.promise("F7")
def test_an_agent_calls_a_tool_and_submits_after_its_result(lm: dspy.LM) -> None:
    def weather(city: CityName) -> str:
        """How warm it is in a city."""
        return f"18 degrees in {city}"

    agent = dspy.ReActV2(Place, tools=[weather], max_iters=1)
    agent.react.config["tool_choice"] = {"type": "function", "function": {"name": "weather"}}
    with dspy.context(adapter=dspy.JSONAdapter()):
        prediction = agent(question=TOOL_QUESTION)
    assert prediction.city in ("Paris", "Rome")
    called, submitted = lm.history[-2:]
    *_, call_turn, result, again = submitted["messages"]
    assert [call_turn["role"], result["role"], again["role"]] == ["assistant", "tool", "user"]
    assert "18 degrees in" in str(result)
    assert submitted["usage"]["prompt_tokens"] > called["usage"]["prompt_tokens"]
