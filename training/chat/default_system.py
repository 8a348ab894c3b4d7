"""The system text that a base's chat template adds by itself, read from the template's text without running it.

Two shapes are known: a system turn for a dialog without one, as in SmolLM2's and Qwen's templates, and the dates that
Llama 3.1 puts before every system text. If anything else decides what is added, nothing is read.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator

from training.chat.messages import has_lone_surrogate


class ChatSettings(BaseModel):
    """`chat:` of training and serve YAMLs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_system: str = Field(
        "template",
        description="system text of a dialog that has none: template for what the base's chat template adds, none, or "
        "the text itself",
    )

    @field_validator("default_system")
    @classmethod
    def _some_text(cls, value: str) -> str:
        if not value.strip() or has_lone_surrogate(value):
            raise ValueError("write template, none, or a text")
        return value


@dataclass(frozen=True, slots=True)
class DefaultSystem:
    """What is added to the system text of a dialog.

    Attributes:
        text: the system text of a dialog that has no system message.
        prefix: stands before every system text, also before that of a system message.
    """

    text: str
    prefix: str = ""


def default_system_in(chat_template: str, name: str) -> DefaultSystem | None:
    """What the chat template of a base of this format adds; None if it is nothing, or cannot be read for certain."""
    if name not in _TURNS or len(chat_template) > _MAX_TEMPLATE_CHARS:
        return None
    try:
        steps = [*_steps(chat_template)]
        return _opening_turn(steps, name) or (_system_text_with_dates(steps) if name == "llama-3" else None)
    except _Unclear:
        return None


class _Unclear(Exception):
    """The template is of neither of the known shapes."""


_MAX_TEMPLATE_CHARS = 1 << 16
_STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_TAG = re.compile(rf"\{{#.*?#\}}|\{{(?P<kind>[%{{])[-+]?(?P<body>(?:{_STRING}|[^'\"])*?)[-+]?[%}}]\}}", re.DOTALL)
_PARTS = re.compile(rf"{_STRING}|[^'\"]+", re.DOTALL)
_SUM = re.compile(rf"(?:{_STRING}|\w+)(?:[+~](?:{_STRING}|\w+))*", re.DOTALL)
_OPERAND = re.compile(rf"{_STRING}|\w+", re.DOTALL)

# Conditions without spaces, with `.role` for ['role']; `else:` stands for the other branch.
_IS_SYSTEM = "messages[0].role=='system'"
_IS_NOT_SYSTEM = {"messages[0].role!='system'", "notmessages[0].role=='system'", f"else:{_IS_SYSTEM}"}
_IS_NOT_SYSTEM_IN_LOOP = {
    f"{first}and{message}.role!='system'"
    for first in ("loop.first", "loop.index0==0")
    for message in ("messages[0]", "message")
}
_WITHOUT_TOOLS = {"else:tools", "else:toolsisnotnone"}
_WITH_TOOLS = {
    "builtin_toolsisdefined",
    "builtin_toolsisdefinedortoolsisnotnone",
    "toolsisnotnone",
    "toolsisnotnoneandnottools_in_user_message",
}
_TURNS = {
    "llama-3": ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    "chatml": ("<|im_start|>system\n", "<|im_end|>\n"),
}
_BLOCKS = {"if", "for", "set", "macro", "call", "filter", "generation"}


@dataclass(frozen=True, slots=True)
class _Step:
    """What a template writes, or assigns to `variable`: the sum of `operands`, literals and expressions.

    `conditions` are those of the blocks around it, outermost first.
    """

    conditions: tuple[str, ...]
    variable: str | None
    operands: tuple[str, ...]

    def text(self, variables: Mapping[str, str] | None = None) -> str | None:
        """The sum as a text; None if it has an expression that is not known."""
        literals = {
            operand: _literal(operand) for operand in self.operands if re.fullmatch(_STRING, operand, re.DOTALL)
        }
        known = literals | dict(variables or {})
        if not known.keys() >= {*self.operands}:
            return None
        return "".join(known[operand] for operand in self.operands)


def _opening_turn(steps: Sequence[_Step], name: str) -> DefaultSystem | None:
    """A complete system turn that is written only if the first message is not from the system."""
    begin, end = _TURNS[name]
    systems: set[str] = set()
    for step in steps:
        text = step.text()
        if step.variable is None and text is not None and text.startswith(begin) and text.endswith(end):
            if not _only_without_system(step.conditions):
                raise _Unclear
            systems.add(text.removeprefix(begin).removesuffix(end))
    if not systems:
        return None
    writes_bos_first = any(step.operands == ("bos_token",) and not step.conditions for step in steps)
    if len(systems) > 1 or (name == "llama-3" and not writes_bos_first):
        raise _Unclear
    (system,) = systems
    if not system or system != system.strip() or "<|" in system:
        raise _Unclear
    return DefaultSystem(system)


def _only_without_system(conditions: Sequence[str]) -> bool:
    outer, inner = [condition for condition in conditions[:-1] if condition not in _WITHOUT_TOOLS], conditions[-1:]
    if outer == ["formessageinmessages"]:
        return inner[0] in _IS_NOT_SYSTEM_IN_LOOP
    return not outer and bool(inner) and inner[0] in _IS_NOT_SYSTEM


def _system_text_with_dates(steps: Sequence[_Step]) -> DefaultSystem | None:
    """What every dialog without tools has between the system's header and the text of the system message."""
    begin, end = _TURNS["llama-3"]
    dates = {date for step in steps if step.variable == "date_string" and (date := step.text()) is not None}
    variables = dict(zip(["date_string"], dates, strict=True)) if len(dates) == 1 else {}
    written = [step for step in steps if step.variable is None and not _WITH_TOOLS & {*step.conditions[:1]}]
    turns = [index for index, step in enumerate(written) if step.text() == begin and not step.conditions]
    if not turns:
        return None
    variable, text = _system_variable(steps)
    prefix = ""
    for step, following in itertools.pairwise(written[turns[0] + 1 :]):
        if step.conditions or following.conditions:
            raise _Unclear
        if step.operands == (variable,) and following.text() == end:
            return DefaultSystem(text, prefix)
        part = step.text(variables)
        if part is None or "<|" in part:
            raise _Unclear
        prefix += part
    raise _Unclear


def _system_variable(steps: Sequence[_Step]) -> tuple[str, str]:
    """The variable that has the text of the system message, and its value in a dialog without one."""
    for step in steps:
        if step.conditions == (_IS_SYSTEM,) and step.variable and step.operands == ("messages[0]['content']|trim",):
            others = [other for other in steps if other.variable == step.variable and other is not step]
            if len(others) == 1 and others[0].conditions == (f"else:{_IS_SYSTEM}",):
                text = others[0].text()
                if text is not None and text == text.strip():
                    return step.variable, text
    raise _Unclear


def _steps(chat_template: str) -> Iterator[_Step]:
    """What the template writes and assigns, in order, with the conditions of each."""
    blocks: list[str] = []
    position = 0
    for tag in [*_TAG.finditer(chat_template), None]:
        data = chat_template[position : tag.start() if tag else None]
        if data.strip():
            yield _Step(tuple(blocks), None, (repr(data),))
        if tag is None or tag["body"] is None:
            position = tag.end() if tag else position
            continue
        position = tag.end()
        body = tag["body"].strip()
        if tag["kind"] == "{":
            yield _Step(tuple(blocks), None, _operands(body))
            continue
        word, _, rest = body.partition(" ")
        if word == "set" and "=" in rest:
            name, _, value = rest.partition("=")
            yield _Step(tuple(blocks), name.strip(), _operands(value.strip()))
        elif word in _BLOCKS:
            blocks.append(_condition(rest) if word == "if" else word + _condition(rest))
        elif word in ("else", "elif") and blocks:
            blocks[-1] = f"else:{blocks[-1]}" + (f"and{_condition(rest)}" if rest else "")
        elif word.startswith("end") and blocks:
            blocks.pop()
        else:
            raise _Unclear
    if blocks:
        raise _Unclear


def _operands(expression: str) -> tuple[str, ...]:
    """The terms of a sum of literals and names; any other expression is one term."""
    compact = "".join(part if part[0] in "'\"" else re.sub(r"\s+", "", part) for part in _PARTS.findall(expression))
    return tuple(_OPERAND.findall(compact)) if _SUM.fullmatch(compact) else (compact,)


def _condition(expression: str) -> str:
    compact = re.sub(r"\s+", "", expression).replace('"', "'").replace("['role']", ".role")
    return re.sub(r"^(not|)\(([^()]*)\)$", r"\1\2", compact)


def _literal(string: str) -> str:
    """The value of a string literal, as Jinja reads it."""
    try:
        return string[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
    except UnicodeDecodeError as error:
        raise _Unclear from error
