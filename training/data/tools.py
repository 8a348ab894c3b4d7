"""The tools and calls of a dataset row, in the forms of OpenAI and ShareGPT."""

import json
import re
from typing import Any

from training.chat.messages import ToolCall
from training.chat.tools import TOOL_NAME
from training.data.examples import BadRow, raise_unexpected

TOOL_COLUMNS = ("tools", "functions")  # OpenAI's name, and its older one


def row_tools(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools that a row lists, in OpenAI's form; a list of bare functions, or JSON text of a list, is read, too.

    Raises:
        BadRow: they are in no such form.
    """
    column = next((name for name in TOOL_COLUMNS if fields.get(name)), None)
    if column is None:
        return []
    items = _parsed(fields[column], column)
    if not isinstance(items, list):
        raise_unexpected(column, "a list of tools", items)
    tools = [_tool(item, f"{column}[{index}]") for index, item in enumerate(items)]
    names = [tool["function"]["name"] for tool in tools]
    if repeated := next((name for index, name in enumerate(names) if name in names[:index]), None):
        raise BadRow(f"{column}: two tools are named {repeated!r}")
    return tools


def openai_calls(item: dict[str, Any], where: str) -> tuple[ToolCall, ...]:
    """The calls of a message: `tool_calls`, or the older `function_call`."""
    if calls := item.get("tool_calls"):
        if not isinstance(calls, list):
            raise_unexpected(f"{where}.tool_calls", "a list of calls", calls)
        return tuple(_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls))
    if call := item.get("function_call"):
        return (_call(call, f"{where}.function_call"),)
    return ()


def sharegpt_calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    """The calls in the value of a `function_call` turn: one, or a list of them."""
    calls = _parsed(value, where)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise_unexpected(where, "a call", calls)
    return tuple(_call(call, where) for call in calls)


def check_calls(calls: tuple[ToolCall, ...], tools: list[dict[str, Any]], where: str) -> None:
    """Refuse a call of a tool that the row does not list; a row may list none.

    Raises:
        BadRow: naming the tool.
    """
    names = [tool["function"]["name"] for tool in tools]
    for call in calls:
        if names and call.name not in names:
            raise BadRow(f"{where}: calls {call.name!r:.80}, but the row's tools are {', '.join(names)}")


def _tool(item: Any, where: str) -> dict[str, Any]:
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise_unexpected(where, '{"type": "function", "function": {"name": ...}}', item)
    if not re.fullmatch(TOOL_NAME, function["name"]):
        raise BadRow(f"{where}: the name {function['name']!r:.80} has other characters than letters, digits and _.:/-")
    parameters = function.get("parameters")
    if parameters is not None:
        parameters = _parsed(parameters, f"{where}.parameters")
        if not isinstance(parameters, dict):
            raise_unexpected(f"{where}.parameters", "a JSON schema", parameters)
    description = function.get("description")
    return {
        "type": "function",
        "function": {"name": function["name"], "description": description, "parameters": parameters},
    }


def _call(item: Any, where: str) -> ToolCall:
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise_unexpected(where, 'a call {"name": ..., "arguments": {...}}', item)
    arguments = _parsed(function.get("arguments") or {}, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise_unexpected(f"{where}.arguments", "a JSON object", arguments)
    call_id = item.get("id")
    text = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(function["name"], text, call_id if isinstance(call_id, str) else "")


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: not valid JSON ({error}), got {json.dumps(value, ensure_ascii=False)[:80]}") from error
