"""Chat templates, as the transformers library renders them: with its filters, functions, tags and values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser

from flashd.system.template import Template

SWITCHES = ("enable_thinking", "thinking")
"""The names by which templates are told whether the model may think: most models' name, and Granite's."""

LONGEST_PROMPT = 1 << 20
"""Characters that a chat template may make; as many bytes are the most that a request may have."""


class Generation(Extension):
    """The tag {% generation %}, by which training finds what a model says. Its body is rendered as if it were not
    there."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> Node:
        """The tag's body."""
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def chat_template(source: str) -> Template:
    """The template, of which nothing is made yet."""
    return Template(
        source, LONGEST_PROMPT,
        {"trim_blocks": True, "lstrip_blocks": True, "extensions": [loopcontrols, Generation]},
        {"tojson": _to_json}, {"raise_exception": _refuse, "strftime_now": _now},
    )  # fmt: skip


def chat_values(
    turns: Sequence[Mapping[str, Any]], bos_token: str, eos_token: str, unk_token: str,
    tools: Sequence[Mapping[str, Any]] = (), prompt: bool = True, think: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What a template is rendered with. flashd has no documents.

    Args:
        turns: the messages.
        tools: the functions that the next answer may call.
        prompt: whether the text ends with the beginning of the next answer.
        think: whether the model may think before it answers.
    """
    return {
        **dict.fromkeys(SWITCHES, think),
        "messages": [dict(turn) for turn in turns], "tools": [dict(tool) for tool in tools] or None,
        "documents": None, "add_generation_prompt": prompt,
        "bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token,
    }  # fmt: skip


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
