"""LlamaIndex: `OpenAILike` as its documentation has it for a chat model with tools.

Without `is_function_calling_model` it only pastes schemas into prompts, and asks for nothing that a server could keep.
"""

import sys
from collections.abc import Sequence
from typing import Any

from llama_index.core.llms import ChatMessage, ChatResponse
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from scenarios import QUESTION, SECOND_QUESTION, TEMPERATURE, TOOL_QUESTION, City, CityName, report

base_url, model = sys.argv[1:]
SETTINGS: dict[str, Any] = {"model": model, "api_base": base_url, "api_key": "none", "is_chat_model": True}
SETTINGS |= {"is_function_calling_model": True, "temperature": 0, "max_retries": 0, "context_window": 2048}
llm = OpenAILike(**SETTINGS, max_tokens=16)
structured_llm = OpenAILike(**SETTINGS, max_tokens=64)
schema_llm = OpenAILike(**SETTINGS, max_tokens=64, should_use_structured_outputs=True)


def read_weather(city: CityName) -> str:
    return TEMPERATURE


weather = FunctionTool.from_defaults(read_weather, name="weather", description="How warm it is in a city.")


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


def prompt_tokens(response: ChatResponse) -> int:
    raw: Any = response.raw
    return int(raw.usage.prompt_tokens)


def answer(dialog: Sequence[ChatMessage]) -> dict[str, Any]:
    response = llm.chat(dialog)
    return {"text": response.message.content, "prompt_tokens": prompt_tokens(response)}


def chat() -> dict[str, Any]:
    return answer([user(QUESTION)])


def stream() -> dict[str, Any]:
    return {"pieces": [chunk.delta for chunk in llm.stream_chat([user(QUESTION)]) if chunk.delta]}


def structured() -> dict[str, Any]:
    city = structured_llm.structured_predict(City, PromptTemplate(QUESTION))
    return {"value": city.model_dump()}


def schema_structured() -> dict[str, Any]:
    return {"value": schema_llm.structured_predict(City, PromptTemplate(QUESTION)).model_dump()}


def streamed_structured() -> dict[str, Any]:
    """By schema: LlamaIndex leaves it to the model whether it calls a tool where it streams."""
    *_, city = schema_llm.stream_structured_predict(City, PromptTemplate(QUESTION))
    return {"value": city.model_dump()}  # type: ignore[union-attr]


def answered(called: ChatResponse) -> dict[str, Any]:
    """The tool's result goes back with the message that called it."""
    (call,) = structured_llm.get_tool_calls_from_response(called)
    result = ChatMessage(
        role="tool", content=str(weather(**call.tool_kwargs)), additional_kwargs={"tool_call_id": call.tool_id}
    )
    final = llm.chat_with_tools(
        [weather], chat_history=[user(TOOL_QUESTION), called.message, result], tool_choice="none"
    )
    raw: Any = called.raw
    return {
        "name": call.tool_name,
        "arguments": call.tool_kwargs,
        "finish_reason": raw.choices[0].finish_reason,
        "text": final.message.content,
        "prompt_tokens": [prompt_tokens(called), prompt_tokens(final)],
    }


def tool() -> dict[str, Any]:
    return answered(structured_llm.chat_with_tools([weather], user_msg=TOOL_QUESTION, tool_required=True))


def streamed_tool() -> dict[str, Any]:
    *_, last = structured_llm.stream_chat_with_tools([weather], user_msg=TOOL_QUESTION, tool_required=True)
    (call,) = structured_llm.get_tool_calls_from_response(last)
    return {"name": call.tool_name, "arguments": call.tool_kwargs}


def second_turn() -> dict[str, Any]:
    first = llm.chat([user(QUESTION)]).message
    return answer([user(QUESTION), first, user(SECOND_QUESTION)])


SCENARIOS = (chat, stream, structured, streamed_structured, schema_structured, tool, streamed_tool, second_turn)
report({function.__name__: function for function in SCENARIOS})
