"""Turns of the conversation on the chat page, and the messages of a request that they become.

A call of a tool is a turn of its own, with its tool as title; the user types the results, one turn for each call, in
their order.
"""

import itertools
import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deployments.protocol.chat import ChatMessage
from deployments.protocol.tools import (
    AnswerToolCall,
    CalledFunction,
    MessageToolCall,
    Tool,
    ToolCallDelta,
    add_to_calls,
)
from deployments.ui.plain_text import shown, typed
from training.errors import CorralError

Turn = dict[str, Any]  # a message of gr.Chatbot: {"role": ..., "content": [{"type": "text", "text": ...}]}

_TITLE = "Calls "
_TOOLS = TypeAdapter(list[Tool])


def turn(role: str, text: str) -> Turn:
    """A turn in the only form that Gradio displays unchanged: it rewrites the whitespace of plain strings."""
    return {"role": role, "content": [{"type": "text", "text": shown(text)}]}


def text_of(turn: Turn) -> str:
    """The text of a turn, in either of the forms that Gradio uses."""
    content = turn["content"]
    if isinstance(content, str):
        return typed(content)
    return typed("".join(part["text"] for part in content if part.get("type") == "text"))


class Reply:
    """An answer while it is generated."""

    def __init__(self) -> None:
        self.text = ""
        self._calls: list[AnswerToolCall] = []

    def add(self, part: str | ToolCallDelta) -> None:
        """The answer goes on with text, or with a part of a call."""
        if isinstance(part, str):
            self.text += part
        else:
            add_to_calls(self._calls, part)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.text.strip() and not self._calls

    def turns(self) -> list[Turn]:
        """The turns of the conversation that it becomes."""
        text = [turn("assistant", self.text)] if self.text.strip() else []
        calls = [
            turn("assistant", f"```json\n{call.function.arguments}\n```")
            | {"metadata": {"title": f"{_TITLE}{call.function.name}"}}
            for call in self._calls
        ]
        return [*text, *calls]


def read_tools(text: str | None) -> list[Tool]:
    """The tools that the user has typed as JSON; None before anything was.

    Raises:
        CorralError: they are not a list of tools as OpenAI's API takes them.
    """
    if not text or not text.strip():
        return []
    try:
        return _TOOLS.validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        raise CorralError(f"Tools: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise CorralError(f"Tools: not valid JSON ({error}): correct it, or leave it empty") from error


def call_without_result(turns: list[Turn]) -> str | None:
    """The tool of the last answer's first call that has no result yet."""
    messages = to_messages(turns)
    results = [*itertools.takewhile(lambda message: message.role == "tool", reversed(messages))]
    calls = messages[-1 - len(results)].tool_calls if len(results) < len(messages) else []
    return calls[len(results)].function.name if len(results) < len(calls) else None


def to_messages(turns: list[Turn]) -> list[ChatMessage]:
    """The messages of a request."""
    messages: list[ChatMessage] = []
    waiting: list[str] = []  # ids of calls without a result
    for index, each in enumerate(turns):
        name = _called(each)
        if name is not None:
            arguments = text_of(each).removeprefix("```json\n").removesuffix("\n```")
            call = MessageToolCall(id=f"call_{index}", function=CalledFunction(name=name, arguments=arguments))
            if not messages or messages[-1].role != "assistant":
                messages.append(ChatMessage(role="assistant"))
            messages[-1].tool_calls = [*messages[-1].tool_calls, call]
            waiting.append(f"call_{index}")
        elif each["role"] == "user" and waiting:
            messages.append(ChatMessage(role="tool", content=text_of(each), tool_call_id=waiting.pop(0)))
        else:
            messages.append(ChatMessage(role=each["role"], content=text_of(each)))
    return messages


def _called(each: Turn) -> str | None:
    """The tool that a turn calls."""
    title = (each.get("metadata") or {}).get("title") or ""
    return title.removeprefix(_TITLE) if title.startswith(_TITLE) else None
