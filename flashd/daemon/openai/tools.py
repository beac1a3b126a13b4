"""Tools and their calls in OpenAI's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from flashd.daemon.openai.known import Known
from flashd.engine.decoding.tools.calls import MOST_TOOLS, Call, Calling, Tool, ToolName
from flashd.errors import NOT_JSON, BadField

MAX_PARAMETERS = 64 << 10
"""Bytes of the parameters of a tool."""

LONGEST_ID = 256
"""Characters."""

DEEPEST = 64
"""Objects and lists within each other, in parameters and arguments."""

CallId = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_ID)]


class Function(Known, kw_only=True):
    name: ToolName
    description: str | None = None
    parameters: msgspec.Raw = msgspec.Raw()
    strict: bool | None = None  # it is always


class FunctionTool(Known, kw_only=True):
    type: Literal["function"]
    function: Function

    def tool(self, number: int) -> Tool:
        """Raises BadField."""
        at, function = f"tools[{number}].function.parameters", self.function
        parameters = _object(bytes(function.parameters), at) or {}
        if parameters and parameters.get("type") != "object":
            raise BadField(at, "expected a schema of type object")
        return Tool(name=function.name, description=function.description or "", parameters=parameters)


class Named(Known, kw_only=True):
    name: str


class NamedTool(Known, kw_only=True):
    type: Literal["function"]
    function: Named


class CalledFunction(Known, kw_only=True):
    name: ToolName
    arguments: str


class ToolCall(Known, kw_only=True):
    id: CallId
    type: Literal["function"]
    function: CalledFunction

    def call(self, at: str) -> Call:
        """Raises BadField."""
        arguments = self.function.arguments or "{}"
        if _object(arguments.encode(), f"{at}.function.arguments") is None:
            raise BadField(f"{at}.function.arguments", "expected a JSON object")
        return Call(id=self.id, name=self.function.name, arguments=arguments)


Tools = Annotated[list[FunctionTool], msgspec.Meta(max_length=MOST_TOOLS)]
Choice = Literal["none", "auto", "required"] | NamedTool


def calling(tools: list[FunctionTool], choice: Choice | None, several: bool) -> Calling | None:
    """What a request's tools and its choice come to. None if nothing may be called. Raises BadField."""
    listed = tuple(tool.tool(i) for i, tool in enumerate(tools))
    names = [tool.name for tool in listed]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise BadField(f"tools[{i}].function.name", f"two tools are called {name}")
    only = choice.function.name if isinstance(choice, NamedTool) else None
    if not names:
        if only is not None or choice in ("auto", "required"):
            raise BadField("tool_choice", "there are no tools; send tools, or leave it out")
        return None
    if only is not None and only not in names:
        raise BadField("tool_choice", f"no tool is called {only[:64]!r}")
    if choice == "none":
        return None
    return Calling(tools=listed, required=choice == "required" or only is not None, only=only, several=several)


def _object(data: bytes, at: str) -> dict[str, Any] | None:
    """The object that some JSON is. Raises BadField."""
    if len(data) > MAX_PARAMETERS:
        raise BadField(at, f"more than {MAX_PARAMETERS} bytes")
    try:
        value = msgspec.json.decode(data or b"null", type=dict[str, Any] | None)
    except NOT_JSON as error:
        raise BadField(at, str(error)) from error
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    if level:
        raise BadField(at, f"more than {DEEPEST} objects and lists within each other")
    return value
