"""Tools that a model may call: how the prompt lists them, and how an answer writes a call, in each chat format.

ChatML and Llama 2 write calls as Hermes does, between `<tool_call>` tags, with the prompt of Qwen2.5's chat template.
Llama 3 writes the JSON of Llama 3.1's chat template. Knows nothing of tokenizers and token ids.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from training.chat.messages import Message, ToolCall

TOOL_NAME = "[a-zA-Z0-9_.:/-]{1,128}"  # OpenAI's, and what agent frameworks put before it to tell servers apart
TOOL_CALL_TAGS = ("<tool_call>", "</tool_call>")
TOOL_RESPONSE_TAGS = ("<tool_response>", "</tool_response>")
# Some vocabularies have a token for each of these. It adds its text to an answer, as no control token does.
TOOL_TAGS = (*TOOL_CALL_TAGS, *TOOL_RESPONSE_TAGS)


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How an answer writes calls: `begin name middle arguments end`, with a separator between two of them.

    Attributes:
        begin_tag: precedes `begin`; empty if the format has no tags.
        begin: up to the name.
        middle: between name and arguments, which are a JSON object.
        end: follows the arguments.
        end_tag: follows `end`.
        separator: between two calls, and between a text and the first call where the format has tags.
    """

    begin_tag: str
    begin: str
    middle: str
    end: str
    end_tag: str
    separator: str

    @property
    def trigger(self) -> str:
        """What begins a call wherever it stands in an answer."""
        return self.begin_tag or self.begin

    def body(self, call: ToolCall) -> str:
        """A call without its tags."""
        return f"{self.begin}{call.name}{self.middle}{arguments_json(call.arguments)}{self.end}"

    def answer(self, content: str, calls: Sequence[ToolCall]) -> str:
        """An answer as the model writes it."""
        written = self.separator.join(f"{self.begin_tag}{self.body(call)}{self.end_tag}" for call in calls)
        return f"{content}\n{written}" if content and written else content + written


HERMES = CallSyntax(TOOL_CALL_TAGS[0], '\n{"name": "', '", "arguments": ', "}\n", TOOL_CALL_TAGS[1], "\n")
LLAMA_3_JSON = CallSyntax("", '{"name": "', '", "parameters": ', "}", "", "; ")


def arguments_json(arguments: str) -> str:
    """The arguments of a call as they stand in a prompt: a JSON object, spelled as `json.dumps` does.

    Arguments that are no JSON object, as those of a call that was cut off, become a JSON string: the call around them
    stays well-formed.
    """
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = arguments
    return json.dumps(value if isinstance(value, dict) else arguments, ensure_ascii=False)


def tool_json(tool: Mapping[str, Any]) -> str:
    """A tool as prompts list it, as JSON.

    Keys are in OpenAI's order; those that say nothing to a model (`strict`, null and empty ones) are left out.

    Args:
        tool: OpenAI's form, `{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}`.
    """
    function = tool["function"]
    fields = {key: function[key] for key in ("name", "description", "parameters") if function.get(key)}
    return json.dumps({"type": "function", "function": fields}, ensure_ascii=False)


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The dialog with these tools, each in OpenAI's form, in its first message."""
    if not messages or not tools:
        return [*messages]
    return [replace(messages[0], tools=tuple(map(tool_json, tools))), *messages[1:]]


def hermes_instructions(tools: Sequence[str]) -> tuple[str, ...]:
    """The end of the system message, which lists the tools, as texts and the tags between them.

    Source: the chat template of Qwen/Qwen2.5-7B-Instruct.

    Args:
        tools: from `tool_json`.
    """
    listed = "".join(f"\n{tool}" for tool in tools)
    begin, end = TOOL_CALL_TAGS
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within ",
        begin,
        end,
        " XML tags:\n",
        begin,
        '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
        end,
    )


def llama_3_instructions(tools: Sequence[str]) -> str:
    """What precedes the first user message to list the tools.

    Source: the chat template of meta-llama/Llama-3.1-8B-Instruct.

    Args:
        tools: from `tool_json`.
    """
    listed = "".join(f"{json.dumps(json.loads(tool), ensure_ascii=False, indent=4)}\n\n" for tool in tools)
    return (
        "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
        'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
        f"argument name and its value}}.Do not use variables.\n\n{listed}"
    )


def with_calls_as_text(messages: Sequence[Message]) -> Iterator[Message]:
    """The dialog in the roles system, user and assistant only: calls and their results are part of the texts."""
    for message in messages:
        if message.tool_calls:
            yield replace(message, content=HERMES.answer(message.content, message.tool_calls), tool_calls=())
        elif message.role == "tool":
            begin, end = TOOL_RESPONSE_TAGS
            yield replace(message, role="user", content=f"{begin}\n{message.content}\n{end}")
        else:
            yield message
