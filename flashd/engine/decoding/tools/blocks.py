"""Calls that a model writes as blocks of JSON, whatever its template says.

Many models that are trained on code do that, Qwen2.5-Coder for one:

    ```json
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    ```

A block begins a line. It is a call from the place on where it has named a tool and its arguments begin; what follows
is then held to the tool's schema. A block that names no tool is text, and so is one within a line of words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flashd.engine.decoding.tools.calls import MOST_CALLS

BLANKS = r"[ \t\r\n]*"
KIND = f'("type"{BLANKS}:{BLANKS}"function"{BLANKS},{BLANKS})?'
BEGINS = rf'[ \t]*(\[{BLANKS})?\{{{BLANKS}{KIND}"name"{BLANKS}:{BLANKS}"'
"""What stands before the name of a block's tool, in a list or alone."""

NAMED = rf'"{BLANKS},{BLANKS}"(arguments|parameters)"{BLANKS}:'
"""What stands behind it."""

BETWEEN = r'[ \n]?\}\s?(,|```\s{1,2}```(json)?)?\s{0,2}\{\s?"name": ?"'
"""What stands between the arguments of a call and the name of the next."""

BEHIND = r"[ \n]?\}(\n?\])?(\n?```)?"
"""What stands behind the arguments of the last call."""

FENCES = "", "```", "```json", "```tool_call"
"""Lines of which one may stand before a block."""


@dataclass(frozen=True)
class Blocks:
    """Tells blocks from text, in the grammar of an answer and in what comes of it.

    Args:
        names: of the tools that may be called.
        several: whether an answer may have several calls.
        at_start: whether a block may be the beginning of an answer. Otherwise a text is before it.
    """

    names: Sequence[str]
    several: bool
    at_start: bool

    def rules(self, free: str, starts: str, behind: Sequence[str]) -> list[str]:
        """The rules of `block`, a text that ends with calls or that has something like them in it.

        The lexer takes a `lazy` lexeme as soon as it is whole, so a text ends where a block has begun. Only then the
        names are looked at. So a text's lexemes stay few, however many tools there are.

        Args:
            free: any text, as a regular expression.
            starts: what a text before the first block begins with, as one, if there must be such a text.
            behind: what else may follow when a block has turned out to be text.
        """
        before = rf"({free}\n)?" if self.at_start else rf"{starts}{free}\n"
        calls = [f"block_{i}" for i in range(len(self.names))]
        said = f"({' | '.join(calls)})"
        said += f" (BETWEEN {said}){{0,{MOST_CALLS - 1}}}" if self.several else ""
        return [
            "block: first named", f"named: {' | '.join([*behind, 'REST', 'more named'])} | {said} BEHIND",
            f"first[lazy]: /{before}{BEGINS}/", rf"more[lazy]: /{free}\n{BEGINS}/", f"REST: /{free}/",
            f"BETWEEN: /{BETWEEN}/", f"BEHIND: /{BEHIND}/",
            *(f"name_{i}[lazy]: /{name}{NAMED}/" for i, name in enumerate(self.names)),
            *(rf"block_{i}: name_{i} /[ \n]?/ arguments_{i}" for i in range(len(self.names))),
        ]  # fmt: skip

    def find(self, text: str, begun: bool) -> re.Match[str] | None:
        """The first block of a text that is a call, up to its arguments. `begun`: the answer has text before this."""
        before = r"\n" if begun or not self.at_start else r"(?:\A|\n)"
        return re.search(rf"{before}{BEGINS}(?P<name>{self._any}){NAMED}{BLANKS}(?=\{{)", text)

    def words(self, text: str) -> str:
        """The text before a block, without the line that belongs to the block."""
        words, _, line = text.rstrip().rpartition("\n")
        return (words if line.strip() in FENCES else text).rstrip()

    def next(self, text: str) -> re.Match[str] | None:
        """Another call behind the arguments of one, up to its arguments."""
        if not self.several:
            return None
        return re.match(rf"{BETWEEN}(?P<name>{self._any}){NAMED}{BLANKS}(?=\{{)", text)

    def end(self, text: str) -> bool:
        """Whether an answer may end with this behind the arguments of a call."""
        return re.fullmatch(BEHIND, text) is not None

    def held(self, text: str, begun: bool) -> int:
        """From where on a text may be the beginning of a block that is a call, or of the line before it."""
        starts = [] if begun else [0]
        for at in [*starts, *(m.start() for m in re.finditer("\n", text))]:
            line = re.sub(r"\s", "", text[at:])
            if any(whole.startswith(line) for whole in self._squeezed):
                return at
        return len(text)

    @cached_property
    def _any(self) -> str:
        return "|".join(map(re.escape, self.names))

    @cached_property
    def _squeezed(self) -> list[str]:
        """All that may stand before the arguments of a call, without blanks."""
        return [
            f'{fence}{bracket}{{{kind}"name":"{name}","{arguments}":{{'
            for fence in FENCES for bracket in ("", "[")
            for kind in ("", '"type":"function",') for name in self.names for arguments in ("arguments", "parameters")
        ]  # fmt: skip
