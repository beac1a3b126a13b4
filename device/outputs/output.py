"""What every kind of output offers, what the appliance may be doing, and what an output may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from flashd.daemon.job import Event, State
from flashd.daemon.jobs import Jobs


class Phase(StrEnum):
    """What the appliance does, as an LED shows it."""

    LOADING = "loading"
    IDLE = "idle"
    LISTENING = "listening"
    UNDERSTANDING = "understanding"
    THINKING = "thinking"
    CONFIRMING = "confirming"
    ANSWERING = "answering"
    ERROR = "error"
    MUTED = "muted"


@dataclass(frozen=True)
class Surroundings:
    """What an output may look at."""

    jobs: Jobs
    muted: Callable[[], bool]


class Output:
    """Takes what happens, in any thread, and does nothing about it unless a kind of output does.

    A kind of output is a subclass, made from its settings and its surroundings.
    """

    def show(self, phase: Phase) -> None:
        """The appliance is in a new phase."""

    def event(self, event: Event) -> None:
        """Something happened to a job."""

    def notice(self, text: str) -> None:
        """Something to be read at once: what a menu stands at."""

    def hush(self) -> None:
        """Somebody wants silence: what has begun to be said is not said to its end. It must not wait."""

    def close(self) -> None:
        """Lets go of what it holds."""


class InTurn:
    """Of jobs that are answered together, what happens to one after the other: what is spoken or read is one text."""

    def __init__(self) -> None:
        self._held: dict[int, list[Event]] = {}  # of jobs that have started; the first one's are passed on at once

    @property
    def over(self) -> bool:
        """Whether every job that has started has ended."""
        return not self._held

    def take(self, event: Event) -> Iterator[Event]:
        """What is to be followed now. A job that did not come to its answer behind another's is left out."""
        if event.kind == "started":
            self._held.setdefault(event.job, [])
        if event.job not in self._held:
            return
        if event.job != next(iter(self._held)):
            self._held[event.job].append(event)
            if event.kind == "restarted" or (event.end and event.end.state is not State.DONE):
                del self._held[event.job]
            return
        yield event
        while event.end or event.kind == "restarted":
            del self._held[event.job]
            if not self._held:
                return
            job = next(iter(self._held))
            held, self._held[job] = self._held[job], []
            yield from held
            event = held[-1]


class OneText(Output):
    """Follows what happens to one answer after the other."""

    def __init__(self) -> None:
        self._turns = InTurn()

    def event(self, event: Event) -> None:
        for each in self._turns.take(event):
            self._follow(each)

    def _follow(self, event: Event) -> None:
        """Something happened to the answer whose turn it is."""
        raise NotImplementedError
