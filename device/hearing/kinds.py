"""Every kind of recogniser: its settings, and what opens it. A new kind is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from device.hearing.by_program import ByProgram
from device.hearing.by_sherpa import BySherpa
from device.hearing.recogniser import Recogniser
from flashd.config.hearing import AnyRecogniser, Hearing, Program, Sherpa

KINDS: dict[type[AnyRecogniser], Callable[[Any, Hearing], Recogniser]] = {
    Program: ByProgram,
    Sherpa: BySherpa,
}
"""Each is called with its settings and those of hearing."""
