"""An answer that may have calls is told apart as it comes: what is text, and what is part of a call."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

from flashd.engine.decoding.overlap import overlap
from flashd.engine.decoding.tools.calls import CallPart
from flashd.engine.decoding.tools.formats import CallFormat


class _At(Enum):
    START = auto()
    TEXT = auto()
    NAME = auto()
    ARGUMENTS = auto()
    BEHIND = auto()  # a call: another one may follow, or the answer ends


class Listener:
    """Takes the characters of one answer, which a grammar of `calls_format` has made.

    `calls_format` has its control tokens as they are shown.
    """

    def __init__(self, calls_format: CallFormat) -> None:
        self._format, self._at, self._held, self._index = calls_format, _At.START, "", -1
        self._object = _Object()

    @property
    def called(self) -> bool:
        """Whether there is a call, even a part of one."""
        return self._index >= 0 or self._at is _At.NAME

    @property
    def whole(self) -> bool:
        """Whether the answer may end here, its calls being complete."""
        return not self.called or (self._at is _At.BEHIND and self._held == self._format.closing)

    def push(self, text: str) -> Iterator[str | CallPart]:
        """Takes more of the answer. Gives what of it is text, and the parts of calls."""
        self._held += text
        while True:
            before = self._at, self._held
            yield from self._step()
            if before == (self._at, self._held):
                return

    def finish(self) -> str:
        """The text that was held back, since a call might have followed."""
        if self.called:
            return ""
        held, self._held = self._held, ""
        return held

    def _step(self) -> Iterator[str | CallPart]:
        match self._at:
            case _At.START:
                self._begin()
            case _At.TEXT:
                yield from self._text()
            case _At.NAME:
                name, middle, rest = self._held.partition(self._format.middle)
                if middle:
                    self._index += 1
                    self._at, self._held, self._object = _At.ARGUMENTS, rest, _Object()
                    yield CallPart(index=self._index, name=name)
            case _At.ARGUMENTS:
                taken = self._object.take(self._held)
                said, self._held = self._held[:taken], self._held[taken:]
                if self._object.whole:
                    self._at = _At.BEHIND
                if said:
                    yield CallPart(index=self._index, arguments=said)
            case _At.BEHIND:
                joint = self._format.joint
                if joint is not None and self._held.startswith(joint):
                    self._at, self._held = _At.NAME, self._held[len(joint) :]

    def _begin(self) -> None:
        """A format whose calls nothing announces has them at the beginning of an answer or nowhere."""
        opening = self._format.opening
        if self._held.startswith(opening):
            self._at, self._held = _At.NAME, self._held[len(opening) :]
        elif not opening.startswith(self._held):
            self._at = _At.TEXT

    def _text(self) -> Iterator[str]:
        opening = self._format.opening
        if self._format.trigger:
            said, found, rest = self._held.partition(opening)
            if found:
                self._at, self._held = _At.NAME, rest
                said = said.rstrip()
            else:
                cut = len(self._held) - overlap(self._held, opening)
                cut = len(self._held[:cut].rstrip())
                said, self._held = self._held[:cut], self._held[cut:]
        else:
            said, self._held = self._held, ""
        if said:
            yield said


class _Object:
    """Finds the end of a JSON object."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False
        self.whole = False

    def take(self, text: str) -> int:
        """How many characters of a text belong to it."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.whole = True
                    return i + 1
        return len(text)
