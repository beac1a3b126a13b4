"""An answer that may have calls is told apart as it comes: what is text, and what is part of a call."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

from flashd.engine.decoding.overlap import overlap
from flashd.engine.decoding.tools.blocks import Blocks
from flashd.engine.decoding.tools.calls import CallPart
from flashd.engine.decoding.tools.formats import CallFormat


class _At(Enum):
    START = auto()
    TEXT = auto()
    NAME = auto()
    ARGUMENTS = auto()
    BEHIND = auto()  # a call: another one may follow, or the answer ends


class Listener:
    """Takes the characters of one answer, which a grammar of `calls_format` and `blocks` has made.

    `calls_format` has its control tokens as they are shown.
    """

    def __init__(self, calls_format: CallFormat, blocks: Blocks | None = None) -> None:
        self._format, self._at, self._held, self._index = calls_format, _At.START, "", -1
        self._blocks, self._in_block = blocks, False
        self._begun = False  # there is text already
        self._object = _Object()

    @property
    def called(self) -> bool:
        """Whether there is a call, even a part of one."""
        return self._index >= 0 or self._at is _At.NAME

    @property
    def whole(self) -> bool:
        """Whether the answer may end here, its calls being complete."""
        if not self.called:
            return True
        if self._in_block and self._blocks:
            return self._at is _At.BEHIND and self._blocks.end(self._held)
        return self._at is _At.BEHIND and self._held == self._format.closing

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
                    yield self._named(name, rest)
            case _At.ARGUMENTS:
                taken = self._object.take(self._held)
                said, self._held = self._held[:taken], self._held[taken:]
                if self._object.whole:
                    self._at = _At.BEHIND
                if said:
                    yield CallPart(index=self._index, arguments=said)
            case _At.BEHIND if self._in_block and self._blocks:
                if found := self._blocks.next(self._held):
                    yield self._named(found["name"], self._held[found.end() :])
            case _At.BEHIND:
                joint = self._format.joint
                if joint is not None and self._held.startswith(joint):
                    self._at, self._held = _At.NAME, self._held[len(joint) :]

    def _named(self, name: str, rest: str) -> CallPart:
        """The beginning of a call, whose arguments begin `rest`."""
        self._index += 1
        self._at, self._held, self._object = _At.ARGUMENTS, rest, _Object()
        return CallPart(index=self._index, name=name)

    def _begin(self) -> None:
        """A format whose calls nothing announces has them at the beginning of an answer or nowhere."""
        opening, words = self._format.opening, self._format.words
        if self._held.startswith(opening):
            self._at, self._held = _At.NAME, self._held[len(opening) :]
        elif words and self._held.startswith(words):
            self._at, self._held = _At.TEXT, self._held[len(words) :]
        elif not opening.startswith(self._held) and not words.startswith(self._held):
            self._at = _At.TEXT

    def _text(self) -> Iterator[str | CallPart]:
        opening = self._format.opening if self._format.trigger else None
        native = self._held.find(opening) if opening else -1
        block = self._blocks.find(self._held, self._begun) if self._blocks else None
        part = None
        if opening and native >= 0 and (block is None or native < block.start()):
            said, self._held, self._at = self._held[:native].rstrip(), self._held[native + len(opening) :], _At.NAME
        elif block and self._blocks:
            said, self._in_block = self._blocks.words(self._held[: block.start()]), True
            part = self._named(block["name"], self._held[block.end() :])
        else:
            said = self._told()
            self._held = self._held[len(said) :]
        if said:
            self._begun = True
            yield said
        if part:
            yield part

    def _told(self) -> str:
        """What of the text is certainly none of a call."""
        cut = len(self._held)
        if self._format.trigger:
            cut = len(self._held[: cut - overlap(self._held, self._format.opening)].rstrip())
        if self._blocks:
            cut = min(cut, self._blocks.held(self._held, self._begun))
        return self._held[:cut]


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
