"""instructor with its defaults: a schema is a tool that the model must call (`Mode.TOOLS`)."""

import sys
from typing import Any

import instructor
import openai
from pydantic import BaseModel, field_validator
from scenarios import QUESTION, SECOND_QUESTION, City, CityName, report

base_url, model = sys.argv[1:]
client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none", max_retries=0))
BRIEF: dict[str, Any] = {"model": model, "temperature": 0, "max_retries": 0}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(*messages: dict[str, str]) -> dict[str, Any]:
    completion = client.create(response_model=None, messages=list(messages), max_tokens=16, **BRIEF)
    return {"text": completion.choices[0].message.content, "prompt_tokens": completion.usage.prompt_tokens}


def chat() -> dict[str, Any]:
    return answer(user(QUESTION))


def stream() -> dict[str, Any]:
    chunks = client.create(response_model=None, messages=[user(QUESTION)], max_tokens=16, stream=True, **BRIEF)
    return {"pieces": [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]}


def structured() -> dict[str, Any]:
    city = client.create(response_model=City, messages=[user(QUESTION)], max_tokens=64, **BRIEF)
    return {"value": city.model_dump()}


def streamed_structured() -> dict[str, Any]:
    cities = client.create_partial(response_model=City, messages=[user(QUESTION)], max_tokens=64, **BRIEF)
    *_, city = cities
    return {"value": city.model_dump()}


def tool() -> dict[str, Any]:
    """The first call is refused by a validator: instructor sends it back with the reason as the tool's result."""
    refused: list[str] = []

    class weather(BaseModel):
        """How warm it is in a city."""

        city: CityName

        @field_validator("city")
        @classmethod
        def second_time(cls, city: str) -> str:
            if not refused:
                refused.append(city)
                raise ValueError("the service was not ready, call it again")
            return city

    completions: list[Any] = []
    client.on("completion:response", completions.append)
    try:
        final = client.create(
            response_model=weather, messages=[user(QUESTION)], max_tokens=64, **BRIEF | {"max_retries": 1}
        )
    finally:
        client.off("completion:response", completions.append)
    first = completions[0].choices[0]
    return {
        "name": first.message.tool_calls[0].function.name,
        "arguments": {"city": refused[0]},
        "finish_reason": first.finish_reason,
        "text": final.city,
        "prompt_tokens": [completion.usage.prompt_tokens for completion in completions],
    }


def second_turn() -> dict[str, Any]:
    first = chat()["text"]
    return answer(user(QUESTION), {"role": "assistant", "content": first}, user(SECOND_QUESTION))


report({function.__name__: function for function in (chat, stream, structured, streamed_structured, tool, second_turn)})
