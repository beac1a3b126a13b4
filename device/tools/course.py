"""What goes on around a call, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Course:
    """What goes on around a call."""

    wanted: Callable[[], bool]  # whether its job was not cancelled, and flashd does not stop
    tell: Callable[[str], None]  # tells people who follow its job a sentence


@dataclass(frozen=True)
class Done:
    """What came of a call."""

    result: str  # as the model is told
    words: str  # as people are told: a sentence


class NotDone(Exception):
    """A call was not made. The text says why, in half a sentence for the model and for people."""
