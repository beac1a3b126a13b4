"""The grammar of an answer that may call tools, in the language of llguidance, which is Lark's with JSON schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashd.engine.decoding.tools.blocks import Blocks
from flashd.engine.decoding.tools.calls import MOST_CALLS, Calling, Tool
from flashd.engine.decoding.tools.formats import CallFormat

MARK = "\ue002"
"""A private-use character. Before the text of an added token it says that the token was meant, not its letters."""

Pieces = Callable[[str], Sequence[str | int]]
"""A text that a template spells, with the numbers of added tokens in place of what spells them."""

FREE = f"[^{MARK}]*"
"""Any text, as a regular expression."""

NOT_BLANK = r"/(.|\n)*\S(.|\n)*/"
NO_BLOCK = rf"~/({FREE}\n)?[ \t]*(\{{|```json){FREE}/"
"""An answer in words has none, which would be read aloud."""


def grammar_of(calling: Calling, calls_format: CallFormat, pieces: Pieces, blocks: Blocks | None = None) -> str:
    """The grammar of an answer: a text, or calls with a text before them if something announces calls.

    `blocks`: how calls may be written besides.
    """
    rules = [] if calling.in_words else _calls_rules(calling, calls_format, pieces)
    if calls_format.words:
        rules += _in_channels(calling, calls_format, pieces)
    elif calling.required:
        rules.append(f"start: {_spelt(pieces(calls_format.opening))} calls")
    else:
        rules += _text_or_calls(calling, calls_format, pieces, blocks)
    return "\n".join(["%llguidance {}", *rules, ""])


def _in_channels(calling: Calling, calls_format: CallFormat, pieces: Pieces) -> list[str]:
    """The rules of an answer that says at its start whether it is a text or a call."""
    words, call = f"{_spelt(pieces(calls_format.words))} TEXT", f"{_spelt(pieces(calls_format.opening))} calls"
    if calling.required:
        return [f"start: {call}"]
    return [f"start: {words}" if calling.in_words else f"start: {words} | {call}", f"TEXT: /{FREE}/ & {NOT_BLANK}"]


def _text_or_calls(calling: Calling, calls_format: CallFormat, pieces: Pieces, blocks: Blocks | None) -> list[str]:
    """The rules of an answer that need not call."""
    opening, trigger = pieces(calls_format.opening), calls_format.trigger
    head = re.escape(trigger).replace("/", r"\/")
    first = "" if isinstance(opening[0], int) else re.escape(opening[0][0])
    starts = rf"[^{first}\s{MARK}]"
    if first and trigger:
        text = rf"/{FREE}/ & ~/(.|\n)*{head}(.|\n)*/"
    else:
        text = rf"/({starts}{FREE})?/" if first else f"/{FREE}/"
    if calling.in_words:
        return ["start: TEXT", f"TEXT: {text} & {NOT_BLANK} & {NO_BLOCK}"]
    if not first:
        start, rules, behind = "TEXT | TEXT? call", [f"call: {_spelt(opening)} calls"], ["REST? call"]
    elif trigger:
        rest = _spelt(pieces(calls_format.opening.removeprefix(trigger)))
        start, rules, behind = "TEXT | call", [f"call: head {rest} calls", f"head[lazy]: /{FREE}{head}/"], ["call"]
    else:
        start, rules, behind = "TEXT | call", [f"call: {_spelt(opening)} calls"], []
    rules += [f"TEXT: {text}", f"start: {start} | block" if blocks else f"start: {start}"]
    return [*rules, *blocks.rules(FREE, starts, behind)] if blocks else rules


def _calls_rules(calling: Calling, calls_format: CallFormat, pieces: Pieces) -> list[str]:
    """The rules of one call and of several, behind their opening."""
    tools = calling.callable
    said = "one"
    if calling.several and calls_format.joint is not None:
        said += f" ({_spelt(pieces(calls_format.joint))} one){{0,{MOST_CALLS - 1}}}"
    return [
        f"one: {' | '.join(f'one_{i}' for i in range(len(tools)))}",
        *(
            f"one_{i}: {_spelt(pieces(tool.name + calls_format.middle))} arguments_{i}"
            for i, tool in enumerate(tools)
        ),
        *(f"arguments_{i}: %json {_schema(tool, calls_format)}" for i, tool in enumerate(tools)),
        f"calls: {said} {_spelt(pieces(calls_format.closing))}",
    ]


def _schema(tool: Tool, calls_format: CallFormat) -> str:
    return json.dumps(schema_of(tool, calls_format.separators))


def schema_of(tool: Tool, separators: tuple[str, str]) -> dict[str, Any]:
    """The schema of a tool's arguments, which are written as the template writes them, without other spaces."""
    item, key = separators
    return tool.schema | {"x-guidance": {"whitespace_flexible": False, "item_separator": item, "key_separator": key}}


@dataclass(frozen=True)
class Speaking:
    """What it takes to make an answer that may call tools."""

    grammar: str
    shown: Mapping[int, bytes]  # the bytes of the added tokens of the format, with MARK before them
    calls_format: CallFormat  # as it is shown
    blocks: Blocks | None  # how calls may be written besides


def speaking(calling: Calling, calls_format: CallFormat, pieces: Pieces, texts: Callable[[int], str]) -> Speaking:
    """How an answer is made in a format. `texts`: of tokens."""
    shown: dict[int, bytes] = {}

    def marked(text: str) -> str:
        said = ""
        for piece in pieces(text):
            if isinstance(piece, int):
                shown[piece] = (MARK + texts(piece)).encode()
            said += piece if isinstance(piece, str) else MARK + texts(piece)
        return said

    f = calls_format
    joint = None if f.joint is None else marked(f.joint)
    looks = CallFormat(
        marked(f.opening), marked(f.middle), marked(f.closing), joint, f.separators, words=marked(f.words)
    )  # fmt: skip
    blocks = None
    if not (calling.required or calling.in_words or f.words):
        at_start = isinstance(pieces(f.opening)[0], int) or bool(f.trigger)
        blocks = Blocks([tool.name for tool in calling.callable], calling.several, at_start)
    return Speaking(grammar_of(calling, f, pieces, blocks), shown, looks, blocks)


def _spelt(pieces: Sequence[str | int]) -> str:
    """Pieces of a text as the grammar names them."""
    return " ".join(f"<[{p}]>" if isinstance(p, int) else json.dumps(p, ensure_ascii=False) for p in pieces)
