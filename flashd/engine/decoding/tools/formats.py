"""How a model writes calls. Its chat template shows it: it writes down the calls of an earlier answer.

So a talk with a made-up call is rendered, and what the template puts around the call's name and arguments is the
format. What was found is checked with other calls. A template that lacks tools gets GENERIC, and so does one that
writes arguments in a way that is not JSON: the tools are explained in the system prompt, or in the first question if
the template takes no system prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from flashd.engine.decoding.text import Message
from flashd.engine.decoding.tools.calls import Call, Calling, Tool
from flashd.errors import DataError

ASKED, ANSWER, AGAIN, RESULT = Message("user", "Zasked1"), "Zanswer2", "Zagain3", "Zresult4"
"""Parts of a made-up talk, which no template has."""

SPACED, TIGHT = (", ", ": "), (",", ":")
"""What JSON has between items, and between a key and its value."""

CALL_ID = re.compile(r',\s*"id":\s*"[0-9]{9}"')


@dataclass(frozen=True)
class CallFormat:
    """How calls are written: `opening NAME middle ARGUMENTS closing`, and `joint` between two calls."""

    opening: str
    middle: str
    closing: str
    joint: str | None  # with what closes one call and opens the next; None: an answer has one call at the most
    separators: tuple[str, str] = SPACED
    native: bool = True  # the template knows tools
    takes_system: bool = True
    words: str = ""  # begins an answer that calls nothing, if that has a beginning of its own

    @property
    def trigger(self) -> str:
        """What announces a call anywhere in an answer. Empty if calls begin an answer or do not come."""
        if self.words:
            return ""
        return re.split(r'[{\["]', self.opening)[0].rstrip()

    def written(self, calls: Sequence[Call]) -> str:
        """The calls as the model writes them."""
        said = [f"{call.name}{self.middle}{self._arguments(call)}" for call in calls]
        return self.opening + (self.joint or "").join(said) + self.closing

    def _arguments(self, call: Call) -> str:
        return json.dumps(json.loads(call.arguments), ensure_ascii=False, separators=self.separators)


GENERIC = CallFormat(
    '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>",
    '}\n</tool_call>\n<tool_call>\n{"name": "', native=False,
)  # fmt: skip

HARMONY = CallFormat(
    "<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "", None, (",", ":"),
    words="<|channel|>final<|message|>",
)  # fmt: skip
"""How gpt-oss calls, see reasoning/channels.py. Its template writes down calls in another of its ways."""

EXPLAINED = """You may call these functions, each given as JSON:
{tools}
If you need one, answer with its name and its arguments, like this:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
The result then comes between <tool_response> and </tool_response>."""
"""What a model is told of GENERIC."""


class Renders(Protocol):
    """A chat template with the texts that it knows by name."""

    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool] = (), prompt: bool = True) -> str:
        """The text of some messages, with the beginning of an answer unless `prompt` is false. Raises DataError."""


def learnt(render: Renders, ends: Sequence[str]) -> CallFormat:
    """The format of a template. `ends`: the texts of the tokens that end an answer."""
    try:
        found = _learnt(render, [end for end in ends if end])
    except DataError:
        found = None
    return found or replace(GENERIC, takes_system=_takes_system(render))


def harmony(render: Renders, ends: Sequence[str]) -> CallFormat:
    """HARMONY, if the template of a model with channels knows tools."""
    try:
        knows = _lists_tools(render) and _said(render, render([ASKED]), [_call("Zone5", {}, 1)], ends) is not None
    except DataError:
        knows = False
    return HARMONY if knows else replace(GENERIC, takes_system=_takes_system(render))


def _learnt(render: Renders, ends: Sequence[str]) -> CallFormat | None:
    if not _lists_tools(render):
        return None
    one, other = _call("Zone5", {"zkey6": "zvalue7", "zkey8": 9}, 1), _call("Ztwo5", {"zkey6": [{"z": True}]}, 2)
    begun = render([ASKED])
    written = _said(render, begun, [one], ends)
    for separators in (SPACED, TIGHT):
        arguments = json.dumps(json.loads(one.arguments), separators=separators)
        if written is None or written.count(one.name) != 1 or written.count(arguments) != 1:
            continue
        opening, _, rest = written.partition(one.name)
        middle, _, closing = rest.partition(arguments)
        found = CallFormat(opening.lstrip(), middle, CALL_ID.sub("", closing), None, separators)
        if one.id in opening + middle or not re.match(r"[^a-zA-Z0-9_-]", middle) or not found.opening.strip():
            return None
        found = _with_joint(found, lambda calls: _said(render, begun, calls, ends), [one, other])
        again = _said(render, begun, [other], ends)
        return found if again and _same(again, found.written([other])) else None
    return None


def _with_joint(found: CallFormat, said: Callable[[Sequence[Call]], str | None], calls: Sequence[Call]) -> CallFormat:
    """The format with what stands between two calls, if the template writes several calls."""
    try:
        written = CALL_ID.sub("", said(calls) or "")
    except DataError:
        return found
    first, second = (f"{call.name}{found.middle}{found._arguments(call)}" for call in calls)
    joint = written.partition(first)[2].partition(second)[0]
    joined = replace(found, joint=joint)
    return joined if joint and _same(written, joined.written(calls)) else found


def _lists_tools(render: Renders) -> bool:
    tool = Tool(name="Ztool", description="Zdescription", parameters={"properties": {"Zparameter": {}}})
    text = render([ASKED], [tool])
    return all(word in text for word in ("Ztool", "Zdescription", "Zparameter"))


def _said(render: Renders, begun: str, calls: Sequence[Call], ends: Sequence[str]) -> str | None:
    """The calls as the template writes them. None if it does not, or does not show what a tool gave."""
    results = [Message("tool", RESULT, call=call.id, name=call.name) for call in calls]
    talk = [ASKED, Message("assistant", "", calls=tuple(calls)), *results]
    whole = render([*talk, Message("assistant", ANSWER), Message("user", AGAIN)])
    if not whole.startswith(begun):
        # a template may begin an answer with a thought, and leave out thoughts that are past
        same = next((i for i, (one, other) in enumerate(zip(begun, whole, strict=False)) if one != other), 0)
        begun = begun[:same]
        begun = begun[: 1 + max(begun.rfind(last) for last in "\n>]")]
        if not begun.startswith(render([ASKED], prompt=False)):
            return None
    said = whole[len(begun) :]
    said, found, _ = said.partition(RESULT)
    at = [said.find(end) for end in ends if end in said]
    return said[: min(at)] if found and at else None


def _same(one: str, other: str) -> bool:
    return CALL_ID.sub("", one).strip() == other.strip()


def _takes_system(render: Renders) -> bool:
    try:
        return ANSWER in render([Message("system", ANSWER), ASKED])
    except DataError:
        return False


def _call(name: str, arguments: dict[str, object], number: int) -> Call:
    return Call(id=f"{number:09d}", name=name, arguments=json.dumps(arguments))


def plain_talk(messages: Sequence[Message], calling: Calling | None, calls_format: CallFormat) -> list[Message]:
    """A talk for a template that knows no tools: calls and results are texts, and the tools are explained."""
    talk: list[Message] = []
    for message in messages:
        if message.role == "tool":
            message = Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
            if talk and talk[-1].role == "user":  # many templates want questions and answers in turn
                message = Message("user", f"{talk.pop().content}\n{message.content}")
        elif message.calls:
            said = "\n".join(filter(None, [message.content, calls_format.written(message.calls)]))
            message = Message(message.role, said)
        talk.append(message)
    return _explained(talk, calling, calls_format.takes_system) if calling else talk


def _explained(talk: list[Message], calling: Calling, takes_system: bool) -> list[Message]:
    tools = "\n".join(json.dumps(_described(tool), ensure_ascii=False) for tool in calling.tools)
    words = EXPLAINED.format(tools=tools)
    role = "system" if takes_system else "user"
    at = next((i for i, message in enumerate(talk) if message.role == role), None)
    if at is None:
        return [Message(role, words), *talk]
    said = f"{talk[at].content}\n\n{words}" if takes_system else f"{words}\n\n{talk[at].content}"
    return [*talk[:at], replace(talk[at], content=said), *talk[at + 1 :]]


def _described(tool: Tool) -> dict[str, object]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.described}
