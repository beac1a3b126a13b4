"""The grammar of an answer that may call tools, in the language of llguidance, which is Lark's with JSON schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashd.engine.decoding.tools.calls import MOST_CALLS, Calling, Tool
from flashd.engine.decoding.tools.formats import CallFormat

MARK = "\ue002"
"""A private-use character. Before the text of an added token it says that the token was meant, not its letters."""

Pieces = Callable[[str], Sequence[str | int]]
"""A text that a template spells, with the numbers of added tokens in place of what spells them."""

FREE = rf"/[^{MARK}]*/"
"""Any text."""


def grammar_of(calling: Calling, calls_format: CallFormat, pieces: Pieces) -> str:
    """The grammar of an answer: a text, or calls with a text before them if something announces calls."""
    opening, trigger = pieces(calls_format.opening), calls_format.trigger
    head = re.escape(trigger).replace("/", r"\/")
    first = "" if isinstance(opening[0], int) else re.escape(opening[0][0])
    if first and trigger:
        text = rf"{FREE} & ~/(.|\n)*{head}(.|\n)*/"
    else:
        text = rf"/([^{first}\s{MARK}][^{MARK}]*)?/" if first else FREE
    if calling.in_words:
        return "\n".join(["%llguidance {}", "start: TEXT", rf"TEXT: {text} & /(.|\n)*\S(.|\n)*/", ""])
    rules = _calls_rules(calling, calls_format, pieces)
    if calling.required:
        rules.append(f"start: {_spelt(opening)} calls")
    elif not first:
        rules += ["start: TEXT | TEXT? call", f"call: {_spelt(opening)} calls", f"TEXT: {text}"]
    elif trigger:
        rules += [
            "start: TEXT | call", f"call: head {_spelt(pieces(calls_format.opening.removeprefix(trigger)))} calls",
            f"head[lazy]: /[^{MARK}]*{head}/", f"TEXT: {text}",
        ]  # fmt: skip
    else:
        rules += ["start: TEXT | call", f"call: {_spelt(opening)} calls", f"TEXT: {text}"]
    return "\n".join(["%llguidance {}", *rules, ""])


def _calls_rules(calling: Calling, calls_format: CallFormat, pieces: Pieces) -> list[str]:
    """The rules of one call and of several, behind their opening."""
    tools = calling.callable
    said = "one"
    if calling.several and calls_format.joint is not None:
        said += f" ({_spelt(pieces(calls_format.joint))} one){{0,{MOST_CALLS - 1}}}"
    return [
        f"one: {' | '.join(f'one_{i}' for i in range(len(tools)))}",
        *(f"one_{i}: {_one(tool, calls_format, pieces)}" for i, tool in enumerate(tools)),
        f"calls: {said} {_spelt(pieces(calls_format.closing))}",
    ]


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
    looks = CallFormat(marked(f.opening), marked(f.middle), marked(f.closing), joint, f.separators)
    return Speaking(grammar_of(calling, f, pieces), shown, looks)


def _one(tool: Tool, calls_format: CallFormat, pieces: Pieces) -> str:
    schema = json.dumps(schema_of(tool, calls_format.separators))
    return f"{_spelt(pieces(tool.name + calls_format.middle))} %json {schema}"


def _spelt(pieces: Sequence[str | int]) -> str:
    """Pieces of a text as the grammar names them."""
    return " ".join(f"<[{p}]>" if isinstance(p, int) else json.dumps(p, ensure_ascii=False) for p in pieces)
