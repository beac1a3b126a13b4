"""Tools that a model may call, and its calls."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

MOST_TOOLS, MOST_CALLS = 64, 8
"""Of a request; of an answer."""

ToolName = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that a model may call."""

    name: ToolName
    description: str = ""
    parameters: dict[str, Any] = {}  # a schema of an object; empty: it takes no arguments

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of its arguments. Arguments that it does not name are excluded unless it says otherwise."""
        return {"additionalProperties": False} | self.described

    @property
    def described(self) -> dict[str, Any]:
        """The schema as the model is told of it."""
        return {"type": "object", "properties": {}} | self.parameters


class Calling(msgspec.Struct, frozen=True, kw_only=True):
    """Which tools an answer may call, and whether it must."""

    tools: Annotated[tuple[Tool, ...], msgspec.Meta(min_length=1, max_length=MOST_TOOLS)]
    required: bool = False  # the answer is a call; otherwise it may be a text
    only: str | None = None  # the one of them that may be called
    several: bool = True  # whether an answer may have several calls
    in_words: bool = False  # nothing may be called any more: the prompt lists the tools, and the answer is a text

    @property
    def callable(self) -> tuple[Tool, ...]:
        """Those that may be called."""
        return () if self.in_words else tuple(tool for tool in self.tools if self.only in (None, tool.name))


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A call that a model made."""

    id: str
    name: str
    arguments: str  # a JSON object


class CallPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a call as it comes. The first part has the name."""

    index: int  # of the answer's calls
    name: str = ""
    arguments: str = ""  # the next characters


def grown(calls: tuple[Call, ...], part: CallPart, job: int) -> tuple[Call, ...]:
    """Calls with one more part. Their ids are made of the job's number."""
    last = calls[-1] if part.index < len(calls) else Call(id=f"call_{job}_{part.index}", name=part.name, arguments="")
    return (*calls[: part.index], replace(last, arguments=last.arguments + part.arguments))


def text_of(calling: Calling | None) -> str:
    """What a request's tools add to its prompt at the most, as JSON."""
    return "" if calling is None else msgspec.json.encode(calling.tools).decode()
