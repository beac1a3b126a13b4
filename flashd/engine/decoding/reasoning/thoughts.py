"""What a reasoning model thinks before it answers, told apart from its answer.

It thinks between two tags in front of the answer. Its chat template has a switch for that, or the prompt ends with
the first of the tags. To have no thoughts, flashd closes them at once, as Qwen3's own template does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flashd.bundle.token_bytes import THOUGHTS, TokenBytes
from flashd.engine.decoding.overlap import overlap

LAST_TOKENS = 16
"""Tokens at the end of a prompt that may spell a tag and the blank lines behind it."""


class Said(NamedTuple):
    """A part of what a model says."""

    text: str
    thought: bool = False


class Thoughts:
    """Tells thoughts from the answer, as both come piece by piece. Blank lines around the tags are left out.

    Args:
        closes: the tag that ends the thought that the prompt has begun. Empty: it has begun none.
    """

    def __init__(self, closes: str = "") -> None:
        self._closes = closes
        self._waits = not closes  # for text that says whether there is a thought
        self._blank = bool(closes)  # what comes next begins with blank lines that mean nothing
        self._held = ""

    def push(self, text: str) -> list[Said]:
        """Takes more text and returns what can be told of it now."""
        self._held += text
        return [said for said in self._parts() if said.text]

    def finish(self) -> list[Said]:
        """What was held back."""
        held, self._held = self._held, ""
        return [Said(held, bool(self._closes))] if held.strip() else []

    def _parts(self) -> Iterator[Said]:
        while self._held:
            if self._blank:
                self._held = self._held.lstrip()
                self._blank = not self._held
            elif self._waits:
                if not self._opened():
                    return
            elif not self._closes:
                said, self._held = self._held, ""
                yield Said(said)
            elif self._closes in self._held:
                thought, _, self._held = self._held.partition(self._closes)
                self._closes, self._blank = "", True
                yield Said(thought.rstrip(), True)
            else:
                told = len(self._held[: len(self._held) - overlap(self._held, self._closes)].rstrip())
                said, self._held = self._held[:told], self._held[told:]
                yield Said(said, True)
                return

    def _opened(self) -> bool:
        """Whether the text so far says if there is a thought."""
        begun = self._held.lstrip()
        for opens, closes in THOUGHTS:
            if begun.startswith(opens):
                self._held, self._closes, self._blank = begun[len(opens) :], closes, True
        self._waits = not self._closes and any(opens.startswith(begun) for opens, _ in THOUGHTS)
        return not self._waits


def tag_that_closes(prompt: Sequence[int], token_bytes: TokenBytes) -> str:
    """The tag that ends the thought with which a prompt ends. Empty if it ends with none."""
    end = b"".join(token_bytes[token] for token in prompt[-LAST_TOKENS:]).decode("utf-8", "replace").rstrip()
    return _closes(end)


def closed(prompt: str) -> str:
    """A prompt's text with the thought closed that it ends with, if it ends with one."""
    end = prompt.rstrip()
    closes = _closes(end)
    return f"{end}\n\n{closes}\n\n" if closes else prompt


def _closes(end: str) -> str:
    """The tag that closes the one with which a text ends. Empty if it ends with none."""
    return next((closes for opens, closes in THOUGHTS if end.endswith(opens)), "")
