"""The grammar of an answer, from a request's `response_format` and tools. Knows nothing of tokens and compilers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.errors import ResponseFormatRefused
from deployments.protocol.chat import ResponseFormat
from deployments.protocol.tools import FunctionDefinition, ToolCallFields
from deployments.structured_outputs.json_schema import supported_schema
from deployments.structured_outputs.simplify import moved_to
from deployments.text.tool_calls import CallFormat
from training.chat.tools import CallSyntax

SCHEMA_PARAM = "response_format.json_schema.schema"
# At most one space after a comma or colon, none elsewhere: given free whitespace, small models write little else.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_FIXED_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_TEXT = "/(?s:.*)/"
_NO_OBJECT = r"/([^{](?s:.*))?/"  # an answer that begins as JSON is a call where calls are JSON
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match.

    Attributes:
        rules: in llguidance's Lark dialect; the first is `answer`.
        param: the field of the request that asks for it.
        is_json: whether text outside of calls is JSON.
        calls: how the answer may call tools; None if it may not.
    """

    rules: str
    param: str
    is_json: bool = False
    calls: CallFormat | None = None


def grammar_of(
    response_format: ResponseFormat | None,
    tools: ToolCallFields | None = None,
    syntax: CallSyntax | None = None,
    tag_ids: Mapping[str, int] | None = None,
) -> Grammar | None:
    """The grammar of an answer, None for free text.

    Args:
        tools: the request's tools.
        syntax: how the chat format writes calls; required with tools.
        tag_ids: ids of the syntax's tags that are tokens.

    Raises:
        ResponseFormatRefused: a schema is not supported.
    """
    content = _json_schema(response_format)
    functions = tools.callable_tools if tools is not None else []
    if tools is None or syntax is None or not tools.tools or (not functions and content is not None):
        return None if content is None else Grammar(f"answer: {_json(content)}\n", SCHEMA_PARAM, is_json=True)
    if not functions:
        return Grammar(f"answer: TEXT\nTEXT: {_ANY_TEXT} & ~{_text_with(syntax.trigger)}\n", "tool_choice")
    calls = CallFormat(syntax, tuple(function.name for _, function in functions), only_first=content is not None)
    schemas = [_arguments_schema(index, function) for index, function in functions]
    if tools.must_call:
        content = None
    if content is not None and not syntax.begin_tag:
        return Grammar(f"answer: {_json_or_call(content, calls, schemas)}\n", "tools", is_json=True, calls=calls)
    call_rules = _CallRules(calls, schemas, tag_ids or {}, parallel=tools.several_calls)
    rules = call_rules.text()
    if tools.must_call:
        return Grammar(f"answer: {call_rules.calls()}\n{rules}", "tools", calls=calls)
    if content is not None:
        return Grammar(f"answer: {_json(content)} | {call_rules.calls()}\n{rules}", "tools", is_json=True, calls=calls)
    return Grammar(f"answer: TEXT | {call_rules.calls(after_text=True)}\n{rules}", "tools", calls=calls)


def _json_schema(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema of a response format, None for free text."""
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is not None:
        json_schema = response_format.json_schema
        return supported_schema(json_schema.schema_, SCHEMA_PARAM, strict=bool(json_schema.strict))
    if response_format.schema_ is not None:
        return supported_schema(response_format.schema_, "response_format.schema")
    return {"type": "object"}


def _arguments_schema(index: int, function: FunctionDefinition) -> dict[str, Any]:
    if not function.parameters:
        return _NO_PARAMETERS
    path = f"tools.{index}.function.parameters"
    schema = supported_schema(function.parameters, path, strict=bool(function.strict))
    schema_type = schema.setdefault("type", "object")
    if "object" not in (schema_type if isinstance(schema_type, list) else [schema_type]):
        raise ResponseFormatRefused(
            f"{path}.type: arguments are an object, so the type must be object, not {schema_type}", f"{path}.type"
        )
    return schema | {"type": "object"}


def _json(schema: Mapping[str, Any], options: Mapping[str, Any] = _JSON_OPTIONS) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def _text_with(trigger: str) -> str:
    """A regular expression of all texts with `trigger` in them."""
    escaped = trigger.replace("{", r"\{")  # the only character of a trigger that regular expressions read otherwise
    return f"/(?s:.*){escaped}(?s:.*)/"


def _json_or_call(content: dict[str, Any], calls: CallFormat, schemas: Sequence[dict[str, Any]]) -> str:
    """One schema for JSON content or one call, for a syntax whose calls are JSON objects, too."""
    parts = [content, *schemas]
    definitions = {f"part_{i}": moved_to(part, f"#/$defs/part_{i}") for i, part in enumerate(parts)}
    options: list[dict[str, Any]] = [{"$ref": "#/$defs/part_0"}]
    begin, middle = calls.syntax.begin, calls.syntax.middle
    name_key, arguments_key = json.loads(f"{begin}{middle}null{calls.syntax.end}")
    for i, name in enumerate(calls.names, 1):
        properties = {name_key: {"const": name}, arguments_key: {"$ref": f"#/$defs/part_{i}"}}
        options.append(
            {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        )
    return _json({"$defs": definitions, "anyOf": options}, _FIXED_SPACES)


class _CallRules:
    """The rules of calls, and the expression that refers to them."""

    def __init__(
        self, calls: CallFormat, schemas: Sequence[dict[str, Any]], tag_ids: Mapping[str, int], *, parallel: bool
    ) -> None:
        self._calls = calls
        self._schemas = schemas
        self._tag_ids = tag_ids
        self._parallel = parallel

    def calls(self, *, after_text: bool = False) -> str:
        """One call or several; with `after_text`, any text may precede the first."""
        syntax = self._calls.syntax
        first = "after_text" if after_text else self._trigger
        others = f" ({json.dumps(syntax.separator)} {self._trigger} call)*" if self._parallel else ""
        return f"{first} call{others}"

    def text(self) -> str:
        """The rules."""
        syntax = self._calls.syntax
        begin = syntax.begin if syntax.begin_tag else ""  # otherwise it is the trigger
        ending = " ".join(filter(None, [json.dumps(syntax.end), self._tag(syntax.end_tag)]))
        names = self._calls.names
        rules = [
            f"TEXT: {_ANY_TEXT if syntax.begin_tag else _NO_OBJECT}",
            f"after_text: TEXT? {self._trigger}"
            if syntax.begin_tag in self._tag_ids
            else f"after_text[lazy]: TEXT {self._trigger}",
            f"call: ({' | '.join(f'call_{i}' for i in range(len(names)))}) {ending}",
        ]
        for i, (name, schema) in enumerate(zip(names, self._schemas, strict=True)):
            rules.append(f"call_{i}: {json.dumps(begin + name + syntax.middle)} {_json(schema)}")
        return "".join(f"{rule}\n" for rule in rules)

    @property
    def _trigger(self) -> str:
        return self._tag(self._calls.syntax.trigger)

    def _tag(self, text: str) -> str:
        """A tag as the vocabulary has it: a token of its own, or text."""
        if text in self._tag_ids:
            return f"<[{self._tag_ids[text]}]>"
        return json.dumps(text) if text else ""
