"""Settings of tools: what the model may have the board do while it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from flashd.config.arguments import MOST_VALUES, AnyArgument, Texts, check_command, schemas_of
from flashd.config.fields import Name, PerMinute, Pin, Positive, Seconds, Strict
from flashd.errors import Misfit

LONGEST = 2000
"""Characters of a result, whatever the tool."""

MOST_ROUNDS, ROUNDS = 8, 3
"""So often an answer may call tools: at the most, and if nothing else is said."""

Rounds = Annotated[int, msgspec.Meta(ge=1, le=MOST_ROUNDS)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class BoardTool(Strict, tag_field="kind", frozen=True, kw_only=True):
    """What the model may have the board do while it answers, if the tools of a trigger or console name it."""

    name: Name
    """The name by which the model calls it."""
    description: str
    """What the model is told of it: what it does, and when it helps."""
    per_minute: PerMinute = 20
    """So often a minute it is done at the most. Further calls do nothing, and the model is told so."""

    @property
    def parameters(self) -> dict[str, Any]:
        """The JSON schema of its arguments, an object."""
        return {}


class TellTime(BoardTool, tag="time", frozen=True, kw_only=True):
    """Tells the day and the time."""

    description: str = "Tells the day and the time."
    """What the model is told of it."""


class ReadSensor(BoardTool, tag="sensor", frozen=True, kw_only=True):
    """Reads a sensor."""

    sensors: Texts
    """The names of the sensors that it may read."""
    description: str = "Reads a sensor now."
    """What the model is told of it."""

    @property
    def parameters(self) -> dict[str, Any]:
        return _object({"sensor": {"type": "string", "enum": self.sensors}})


class Confirm(Strict, frozen=True, kw_only=True):
    """The button that tools with confirm: true wait for."""

    pin: Pin
    """The pin."""
    wait: Positive = 30.0
    """Seconds. If nobody presses it within them, nothing is done, and the model is told so."""
    bounce: Seconds = 0.05
    """Seconds in which the contact may chatter."""
    pull_up: bool = True
    """Whether the button connects the pin to ground. With false it connects it to 3.3 V."""


class SetOutput(BoardTool, tag="output", frozen=True, kw_only=True):
    """Sets an output pin for a while. It is off at the start, and at the end whatever happens to flashd."""

    pin: Pin
    """The pin."""
    most: Annotated[int, msgspec.Meta(ge=1, le=86400)]
    """Whole seconds after which it is turned off in any case."""
    rest: Seconds | None = None
    """Seconds that it then stays off, whatever is asked. Without this key as long as it was on."""
    values: dict[str, Share] = msgspec.field(default_factory=lambda: {"off": 0.0, "on": 1.0})
    """The values that the model may set, each with the share of the power, from 0 (off) to 1. Quote "on" and "off".

    With a share between, the pin is pulsed.
    """
    active_high: bool = True
    """Whether on is 3.3 V. With false on is 0 V."""
    confirm: bool = False
    """Whether somebody must press the confirm button before it is turned on."""

    def __post_init__(self) -> None:
        if not 2 <= len(self.values) <= MOST_VALUES or not any(self.values.values()):
            raise ValueError(f"values needs 2 to {MOST_VALUES} of them, one of which is above 0")
        if not all(name.strip() for name in self.values):
            raise ValueError("values has an empty name")

    @property
    def graded(self) -> bool:
        """Whether it may be on in part."""
        return any(0 < share < 1 for share in self.values.values())

    @property
    def parameters(self) -> dict[str, Any]:
        seconds = {"type": "integer", "minimum": 1, "maximum": self.most, "description": "how long, in seconds"}
        return _object({"value": {"type": "string", "enum": list(self.values)}, "seconds": seconds}, "seconds")


class RunProgram(BoardTool, tag="program", frozen=True, kw_only=True):
    """Runs a program, and gives the model what it prints."""

    command: Annotated[list[str], msgspec.Meta(min_length=1)]
    """The program and its arguments. It is run without a shell.

    An element that is '{NAME}' or --OPTION={NAME} has the place of the argument of that name.
    """
    arguments: list[AnyArgument] = []
    """What the model says."""
    timeout: Positive = 10.0
    """Seconds after which the program is ended."""
    longest: Annotated[int, msgspec.Meta(ge=1, le=LONGEST)] = 500
    """Characters of what it prints that the model gets. A program that prints more is ended."""
    confirm: bool = False
    """Whether somebody must press the confirm button before it is run."""

    def __post_init__(self) -> None:
        check_command(self.command, self.arguments)

    @property
    def parameters(self) -> dict[str, Any]:
        return _object(schemas_of(self.arguments))


class Preset(Strict, frozen=True, kw_only=True):
    """A question that a touch or a number asks."""

    prompt: Annotated[str, msgspec.Meta(min_length=1)]
    """What is asked. Whoever asks in the same words asks this."""
    tools: list[Name] | None = None
    """What the model may have the board do for this question: names of tools.

    Without this key it is what it may do for other questions there.
    """
    must_call: bool = False
    """Whether the answer must begin with a call. It needs tools."""

    def __post_init__(self) -> None:
        if self.must_call and not self.tools:
            raise ValueError("must_call needs tools")


AnyTool = TellTime | ReadSensor | SetOutput | RunProgram


MOST_TOOLS = 16
"""Of a file."""

Tools = Annotated[list[AnyTool], msgspec.Meta(max_length=MOST_TOOLS)]


def check_tools(tools: Sequence[AnyTool], sensors: Sequence[str], has_button: bool) -> None:
    """What one tool cannot say of itself. Raises Misfit. `has_button`: whether calls can be confirmed."""
    for i, tool in enumerate(tools):
        for name in tool.sensors if isinstance(tool, ReadSensor) else ():
            if name not in sensors:
                raise Misfit(("tools", i, "sensors"), f"no sensor is called {name!r}; {there(sensors)}")
        if isinstance(tool, SetOutput | RunProgram) and tool.confirm and not has_button:
            raise Misfit(("tools", i, "confirm"), "it needs the button that `confirm: {pin: ...}` in the file names")


def check_names(path: tuple[str | int, ...], wanted: Sequence[str], tools: Sequence[AnyTool], schemas: bool) -> None:
    """Whether those tools are there that the entry at `path` names. Raises Misfit."""
    names = [tool.name for tool in tools]
    for i, name in enumerate(wanted):
        if name not in names:
            raise Misfit((*path, "tools"), f"no tool is called {name!r}; {there(names)}")
        if name in wanted[:i]:
            raise Misfit((*path, "tools"), f"{name!r} is there twice")
    if wanted and not schemas:
        raise Misfit((*path, "tools"), "calls of tools need `schemas: true` in the file")


def there(names: Sequence[str]) -> str:
    """Which names there are."""
    return f"there are {', '.join(sorted(names))}" if names else "there are none"


def _object(properties: dict[str, Any], optional: str | None = None) -> dict[str, Any]:
    """The schema of an object. All but `optional` must be there."""
    return {"type": "object", "properties": properties, "required": [n for n in properties if n != optional]}
