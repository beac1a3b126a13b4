"""Settings of the arguments of programs that the model may run."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

import msgspec

from flashd.config.fields import Name, Strict

MOST_VALUES = 64
"""That an argument may have."""

Texts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=MOST_VALUES)]

PLACE = re.compile(r"(?P<option>-{1,2}[A-Za-z0-9-]+=)?\{(?P<name>[^{}]*)\}")
"""An element of a command in whose place an argument is put, perhaps behind an option's name."""


class Argument(Strict, tag_field="kind", frozen=True, kw_only=True):
    """What a program is given. The model can make no value that this does not allow."""

    name: Name
    """The argument's name."""
    description: str = ""
    """What the model is told of it."""

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a value."""
        raise NotImplementedError

    def spelt(self, value: Any) -> str:
        """The value as the program gets it. Raises ValueError if it is not allowed."""
        raise NotImplementedError


class Choice(Argument, tag="choice", frozen=True, kw_only=True):
    """One of some texts."""

    values: Texts
    """The texts."""

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": self.values}

    def spelt(self, value: Any) -> str:
        if value not in self.values:
            raise ValueError(f"allowed are {', '.join(self.values)}")
        return str(value)


class Whole(Argument, tag="whole", frozen=True, kw_only=True):
    """A whole number."""

    least: int
    """The least number."""
    most: int
    """The largest number."""

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise ValueError("least is above most")

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.least, "maximum": self.most}

    def spelt(self, value: Any) -> str:
        if type(value) is not int or not self.least <= value <= self.most:
            raise ValueError(f"allowed is a whole number from {self.least} to {self.most}")
        return str(value)


class Number(Argument, tag="number", frozen=True, kw_only=True):
    """A number, which may have decimals."""

    least: float
    """The least number."""
    most: float
    """The largest number."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.least) and math.isfinite(self.most) and self.least <= self.most):
            raise ValueError("least and most are numbers, and least is not above most")

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self.least, "maximum": self.most}

    def spelt(self, value: Any) -> str:
        if type(value) not in (int, float) or not self.least <= value <= self.most:
            raise ValueError(f"allowed is a number from {self.least:g} to {self.most:g}")
        return f"{float(value):f}"


class Text(Argument, tag="text", frozen=True, kw_only=True):
    """A line of any text. It does not begin with a space or -, so no program takes it for an option."""

    longest: Annotated[int, msgspec.Meta(ge=1, le=500)] = 80
    """The most characters."""

    @property
    def _pattern(self) -> str:
        return rf"^[^\x00-\x20\x7f-\x9f\-][^\x00-\x1f\x7f-\x9f]{{0,{self.longest - 1}}}$"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": self._pattern}

    def spelt(self, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(self._pattern.strip("^$"), value):
            raise ValueError(f"allowed is a line of up to {self.longest} characters that does not begin with -")
        return value


AnyArgument = Choice | Whole | Number | Text


def schemas_of(arguments: list[AnyArgument]) -> dict[str, dict[str, Any]]:
    """The schema of each argument by its name, as the model is told of it."""
    return {a.name: a.schema | ({"description": a.description} if a.description else {}) for a in arguments}


def check_command(command: list[str], arguments: list[AnyArgument]) -> None:
    """Whether a command has a place for each argument and for nothing else. Raises ValueError."""
    names = [argument.name for argument in arguments]
    found = [place["name"] for each in command if (place := PLACE.fullmatch(each))]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"two arguments are called {name!r}")
        if name not in found:
            raise ValueError(
                f"the command has no place for {name!r}: an element that is '{{{name}}}' or --x={{{name}}}"
            )
    for name in found:
        if name not in names:
            raise ValueError(f"the command names {{{name}}}, and no argument is called so")
    if PLACE.fullmatch(command[0]):
        raise ValueError("the program itself cannot be an argument")


def filled(command: list[str], texts: dict[str, str]) -> list[str]:
    """The command with the arguments in their places."""
    places = [(each, PLACE.fullmatch(each)) for each in command]
    return [f"{place['option'] or ''}{texts[place['name']]}" if place else each for each, place in places]
