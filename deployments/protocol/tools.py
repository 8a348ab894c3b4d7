"""Wire types of tools and their calls in chat completions, named as in OpenAI's API."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from deployments.protocol.base import StrictModel, field_error
from deployments.protocol.extra_fields import CALLED_FUNCTION, TOOL, TOOL_CALL, TOOL_FUNCTION
from training.chat.messages import ToolCall
from training.chat.tools import TOOL_NAME

MAX_TOOLS = 128


class FunctionDefinition(StrictModel):
    """What the model is told of a function, and the schema that the arguments of every call follow."""

    extra_fields = TOOL_FUNCTION

    name: str = Field(pattern=f"^{TOOL_NAME}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON Schema 2020-12 of an object; unsupported keywords are refused; default: no parameters"
    )
    strict: bool | None = Field(None, description="true: every object must have additionalProperties: false")


class Tool(StrictModel):
    """A function that the model may call."""

    extra_fields = TOOL

    type: Literal["function"]
    function: FunctionDefinition

    @field_validator("type", mode="before")
    @classmethod
    def _only_functions(cls, tool_type: Any) -> Any:
        if isinstance(tool_type, str) and tool_type != "function":
            raise ValueError(f"{tool_type:.40} is not supported: send type function, and run it yourself")
        return tool_type


class NamedFunction(StrictModel):
    """The name of one of the request's tools."""

    name: str


class NamedTool(StrictModel):
    """`tool_choice`: the model calls this tool."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ToolSelection(StrictModel):
    """Some of the request's tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1)]


class AllowedTools(StrictModel):
    """`tool_choice`: the model may call these tools only."""

    type: Literal["allowed_tools"]
    allowed_tools: ToolSelection


class ToolFields(StrictModel):
    """Fields of a request with tools."""

    tools: Annotated[list[Tool], Field(fail_fast=True)] = Field([], max_length=MAX_TOOLS)

    @field_validator("tools")
    @classmethod
    def _names_differ(cls, tools: list[Tool]) -> list[Tool]:
        names = [tool.function.name for tool in tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"two tools are named {name!r}: give each a name of its own")
        return tools

    def tool_definitions(self) -> list[dict[str, Any]]:
        """The tools as a chat format takes them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class ToolCallFields(ToolFields):
    """Fields of a request whose answer may have calls."""

    tool_choice: ToolChoice | None = Field(
        None, description="none, auto (the default with tools), required, a function, or a list of allowed tools"
    )
    parallel_tool_calls: bool = Field(True, description="false: at most one call in an answer")

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _empty_is_not_given(cls, tool_choice: Any) -> Any:
        return None if tool_choice == {} else tool_choice

    @model_validator(mode="after")
    def _choice_is_among_tools(self) -> "ToolCallFields":
        names = [tool.function.name for tool in self.tools]
        if self.tool_choice == "required" and not names:
            raise field_error(type(self), "tool_choice", "required needs tools: send tools, or auto", "required")
        for name in self._chosen():
            if name not in names:
                listed = f"the tools are {', '.join(names)}" if names else "there are no tools"
                raise field_error(type(self), "tool_choice", f"names the function {name!r:.140}, but {listed}", name)
        return self

    @property
    def callable_tools(self) -> list[tuple[int, FunctionDefinition]]:
        """The functions that the answer may call, each with its position in `tools`."""
        if self.tool_choice == "none":
            return []
        chosen = self._chosen()
        functions = enumerate(tool.function for tool in self.tools)
        return [(index, function) for index, function in functions if not chosen or function.name in chosen]

    @property
    def must_call(self) -> bool:
        """Whether the answer must have a call."""
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def several_calls(self) -> bool:
        """Whether the answer may have more than one call; a function that is named is called exactly once."""
        return self.parallel_tool_calls and not isinstance(self.tool_choice, NamedTool)

    def _chosen(self) -> list[str]:
        """Names to which `tool_choice` restricts the tools; empty for all."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedTools):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return []


class CalledFunction(StrictModel):
    """The function of a call in the history."""

    extra_fields = CALLED_FUNCTION

    name: str
    arguments: str | dict[str, Any] = Field("", description="JSON text of an object, or the object")


class MessageToolCall(StrictModel):
    """A call in an assistant's message of the history."""

    extra_fields = TOOL_CALL

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def to_call(self) -> ToolCall:
        """The call for a chat format."""
        arguments = self.function.arguments
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return ToolCall(self.function.name, text or "{}", self.id or "")


class FunctionCall(BaseModel):
    """What an answer calls; `arguments` is JSON text, cut off where finish_reason is length."""

    name: str
    arguments: str


class AnswerToolCall(BaseModel):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionCallDelta(BaseModel):
    """What a chunk adds to a call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """A call in a chunk: the first one has id, type and name, all add to the arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


def add_to_calls(calls: list[AnswerToolCall], delta: ToolCallDelta) -> None:
    """Continue the last of the calls, or begin the next; the deltas of one answer come in order."""
    if delta.id is not None:
        function = FunctionCall(name=delta.function.name or "", arguments="")
        calls.append(AnswerToolCall(id=delta.id, function=function))
    calls[-1].function.arguments += delta.function.arguments or ""
