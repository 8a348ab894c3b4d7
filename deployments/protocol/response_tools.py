"""Tools in requests of `/v1/responses`. They are flat, unlike those of chat completions, and mean the same."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from deployments.protocol.base import StrictModel, field_error
from deployments.protocol.extra_fields import RESPONSE_TOOL
from deployments.protocol.response_items import EchoedText
from deployments.protocol.tools import (
    MAX_TOOLS,
    AllowedTools,
    FunctionDefinition,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCallFields,
    ToolSelection,
)


class ResponseTool(FunctionDefinition):
    """A function that the model may call."""

    extra_fields = RESPONSE_TOOL

    type: Literal["function"]
    description: EchoedText | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_functions(cls, tool: Any) -> Any:
        tool_type = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(tool_type, str) and tool_type != "function":
            problem = f"{tool_type:.40} is not supported: send type function, and run it yourself"
            raise field_error(cls, "type", problem, tool_type)
        return tool

    def to_tool(self) -> Tool:
        """The same, as chat completions have it."""
        fields = self.model_dump(include=set(FunctionDefinition.model_fields))
        return Tool(type="function", function=FunctionDefinition(**fields))


class ResponseNamedTool(StrictModel):
    """`tool_choice`: the model calls this tool."""

    type: Literal["function"]
    name: EchoedText

    def to_choice(self) -> NamedTool:
        """The same, as chat completions have it."""
        return NamedTool(function=NamedFunction(name=self.name))


class ResponseAllowedTools(StrictModel):
    """`tool_choice`: the model may call these tools only."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseNamedTool], Field(fail_fast=True, min_length=1)]

    def to_choice(self) -> AllowedTools:
        """The same, as chat completions have it."""
        selection = ToolSelection(mode=self.mode, tools=[tool.to_choice() for tool in self.tools])
        return AllowedTools(type="allowed_tools", allowed_tools=selection)


class ResponseToolFields(StrictModel):
    """Fields of a request whose response may have calls."""

    tools: Annotated[list[ResponseTool], Field(fail_fast=True)] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool | ResponseAllowedTools | None = Field(
        None, description="none, auto (the default), required, a function, or a list of allowed tools"
    )
    parallel_tool_calls: bool = Field(True, description="false: at most one call in a response")

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _empty_is_not_given(cls, tool_choice: Any) -> Any:
        return None if tool_choice in ({}, []) else tool_choice

    @model_validator(mode="after")
    def _tools_go_together(self) -> "ResponseToolFields":
        self.tool_fields()
        return self

    def tool_fields(self) -> ToolCallFields:
        """The same, as chat completions have them.

        Raises:
            ValidationError: two tools have one name, or `tool_choice` is none of the tools.
        """
        choice = self.tool_choice
        return ToolCallFields(
            tools=[tool.to_tool() for tool in self.tools],
            tool_choice=choice if choice is None or isinstance(choice, str) else choice.to_choice(),
            parallel_tool_calls=self.parallel_tool_calls,
        )
