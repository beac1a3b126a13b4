"""What happens to all jobs, as the page shows it: a stream of events for each page that is open.

A trigger's question and answer belong to the board, and whoever stands before it may read them. What a person asks
is that person's: of it others are told only that it waits, is read, is answered, and for whom.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Literal

import msgspec

from device.controls import Controls, Shown
from flashd.config.devices import AnyTrigger, Button, Door, Manual, Motion, Near, Rotary, Schedule, Talk
from flashd.daemon.events import Events
from flashd.daemon.job import API, Event, Job, State
from flashd.errors import Busy

MOST_PAGES = 16
"""Pages that may listen at once."""

QUIET_SECONDS = 10.0
"""After which a line is sent in any case, so that a page that has gone away is noticed."""

RETRY = "retry: 1000\n\n"
"""Milliseconds after which a page that was cut off comes again."""

TRIGGER = "trigger:"
SERIAL = "serial:"


class Told(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of the stream. `phase` is the appliance's; all others are a job's, and `asked` is its first."""

    kind: Literal["phase", "asked", "queued", "moved", "started", "progress", "text", "did", "restarted", "ended"]
    phase: str = ""
    notice: str = ""  # what was heard, or why nothing was
    job: int = 0
    who: str = ""  # asks, in words
    asked: str = ""  # the question, "" if it is a person's
    position: int = 0
    done: int = 0
    total: int = 0
    card_bytes: int = 0
    text: str = ""
    state: str = ""
    cut: bool = False
    probabilities: dict[str, float] = {}
    driven: str = ""  # what the decision did to a pin, in words

    def line(self) -> str:
        return f"data: {msgspec.json.encode(self).decode()}\n\n"


class Feed:
    """Gives each page its stream."""

    def __init__(self, controls: Controls) -> None:
        self._controls = controls
        self._pages = 0

    def open(self) -> AsyncIterator[str]:
        """The events from now on. Raises Busy if too many pages listen."""
        if self._pages >= MOST_PAGES:
            raise Busy(f"{self._pages} pages are open already; close one")
        return self._stream()

    async def _stream(self) -> AsyncIterator[str]:
        self._pages += 1
        events = Events[Event | Shown]()
        watch = self._controls.jobs.watch(sink=events.put)
        unwatch = self._controls.watch_shown(events.put)
        telling = _Telling(self._controls)
        try:
            yield RETRY
            for job in self._controls.jobs.running:
                yield telling.introduce(job, missed=True).line()
            while not events.over:
                event = await events.next(QUIET_SECONDS)
                if event is None:
                    yield ":\n\n"
                elif isinstance(event, Shown):
                    yield Told(kind="phase", phase=event.phase, notice=event.notice).line()
                else:
                    for told in await telling.of(event):
                        yield told.line()
        finally:
            watch.close()
            unwatch()
            self._pages -= 1


class _Telling:
    """What one page is told, and which jobs it knows."""

    def __init__(self, controls: Controls) -> None:
        self._controls = controls
        self._whole: dict[int, bool] = {}  # by the jobs that the page knows: whether it is told the text as it comes
        self._ours: set[int] = set()  # triggers' jobs

    def introduce(self, job: Job, missed: bool) -> Told:
        """A job that the page does not know. With `missed` its text began before; it is then told at the end."""
        source = job.request.source
        own = source.startswith(TRIGGER)
        self._whole[job.id] = own and not missed
        if own:
            self._ours.add(job.id)
        asked = job.request.turns[-1].content if own else ""
        return Told(kind="asked", job=job.id, who=who(source, self._controls.settings.triggers), asked=asked)

    async def of(self, event: Event) -> list[Told]:
        told = []
        if event.job not in self._whole:
            job = event.end or await asyncio.to_thread(self._controls.jobs.get, event.job)
            if job is None:
                return []
            told.append(self.introduce(job, missed=event.kind in ("text", "progress", "did")))
        if event.end is not None:
            del self._whole[event.job]
            self._ours.discard(event.job)
            return [*told, self._ended(event.end)]
        if event.kind == "restarted":
            self._whole[event.job] = event.job in self._ours
        kind = event.kind
        if kind == "call" or kind == "calls" or kind == "thought":  # what they did is told; thoughts are not shown
            return told
        shown = event.job in self._ours if kind == "did" else self._whole[event.job]
        passed_on = Told(
            kind=kind, job=event.job, position=event.position, done=event.done, total=event.total,
            card_bytes=event.card_bytes, text=event.text if shown else "",
        )  # fmt: skip
        return [*told, passed_on]

    def _ended(self, job: Job) -> Told:
        told = Told(kind="ended", job=job.id, state=str(job.state))
        trigger = _trigger(job.request.source, self._controls.settings.triggers)
        if not job.request.source.startswith(TRIGGER):
            return told
        return msgspec.structs.replace(
            told, text=job.result.text, cut=job.result.cut, probabilities=job.result.probabilities,
            driven=_driven(job, trigger),
        )  # fmt: skip


KINDS = {
    Button: "The button", Talk: "The voice", Motion: "The motion sensor", Door: "The door",
    Near: "The distance sensor", Rotary: "The menu", Schedule: "The clock", Manual: "The trigger",
}  # fmt: skip


def who(source: str, triggers: list[AnyTrigger]) -> str:
    """Who asks, in words."""
    trigger = _trigger(source, triggers)
    if trigger is not None:
        kind = KINDS[type(trigger)]
        return kind if kind.lower().endswith(f" {trigger.name}") else f"{kind} “{trigger.name}”"
    if source.startswith(SERIAL):
        return f"Somebody at the console “{source.removeprefix(SERIAL)}”"
    return "Somebody at a screen" if source == API else f"“{source.removeprefix(TRIGGER)}”"


def _trigger(source: str, triggers: list[AnyTrigger]) -> AnyTrigger | None:
    return next((t for t in triggers if f"{TRIGGER}{t.name}" == source), None)


def _driven(job: Job, trigger: AnyTrigger | None) -> str:
    if trigger is None or trigger.drive is None:
        return ""
    drive = trigger.drive
    if job.state is State.DONE and job.result.text == drive.answer:
        return f"Pin {drive.pin} is switched on, for {drive.most:g} seconds at most."
    return f"Pin {drive.pin} is off."
