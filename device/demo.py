"""The appliance with no board: mock pins that are drawn and can be pressed, and a pseudo-terminal for the cable."""

from __future__ import annotations

import asyncio
import os
import select
import threading
import tty
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from device.controls import Controls
from device.feed import QUIET_SECONDS, TRIGGER, who
from device.mock_board import HOLD_SECONDS, PRESS_SECONDS, MockBoard, Part
from flashd.config.settings import Settings, parse
from flashd.daemon.events import Events
from flashd.daemon.job import Event, State
from flashd.errors import UsageError

SHOW_SECONDS = 0.5
"""After which the times are shown anew, if nothing happens."""

SETTINGS = """
answer: {{max_tokens: 64}}
api: {{socket: {folder}/flashd.sock, loopback: 8765}}
spool: {{path: {folder}/spool.db}}
snapshots: false
kiosk:
  title: flashd demo
  presets: ["What can you do?", "Why is the sky blue?", "Tell me a joke."]
serial:
  - {{name: console, port: {port}}}
triggers:
  - {{kind: button, name: front, pin: 17, prompt: "Say hello to whoever has just pressed the button."}}
  - kind: button
    name: held
    pin: 17
    press: long
    prompt: "It is {{{{ now.strftime('%H:%M') }}}}. Wish a good time of day."
  - kind: door
    name: door
    pin: 27
    per_minute: 6
    prompt: "A door was opened. Should the light be switched on? Answer yes or no."
    choose: ["yes", "no"]
    drive: {{pin: 5, answer: "yes", most: 5}}
outputs:
  - {{kind: led, pin: 22}}
"""


class Cable:
    """Two pseudo-terminals joined like the ends of a null modem: `ours` for flashd, `theirs` for a terminal program.

    Close it.
    """

    def __init__(self) -> None:
        self._masters, self._slaves = [], []
        for _ in range(2):
            master, slave = os.openpty()
            tty.setraw(slave)
            self._masters.append(master)
            self._slaves.append(slave)  # held open, so that the line does not hang up between two programs
        self.ours, self.theirs = (os.ttyname(slave) for slave in self._slaves)
        self._closing, self._close = os.pipe()
        self._thread = threading.Thread(target=self._relay, name="cable", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._close, b"x")
        self._thread.join()
        for fd in (*self._masters, *self._slaves, self._closing, self._close):
            os.close(fd)

    def _relay(self) -> None:
        other = dict(zip(self._masters, reversed(self._masters), strict=True))
        while True:
            ready, _, _ = select.select([*self._masters, self._closing], [], [])
            if self._closing in ready:
                return
            for fd in ready:
                os.write(other[fd], os.read(fd, 4096))


class Screen(Protocol):
    """Where the demo shows what happens."""

    def say(self, text: str) -> None:
        """Lines that stay."""

    def show(self, line: str) -> None:
        """The line at the bottom, in place of the one before."""

    def take_log(self) -> None:
        """Has the log's lines stay above that one."""


class Demo:
    """A board of mock pins, a cable, and what happens on them in words. Close it."""

    def __init__(self, folder: Path, screen: Screen) -> None:
        self.board = MockBoard()
        self.cable = Cable()
        self._screen = screen
        self._is_ready = False
        self.settings: Settings = parse(SETTINGS.format(folder=folder, port=self.cable.ours), "the demo")

    def close(self) -> None:
        self.cable.close()
        self.board.close()

    def routes(self, controls: Controls) -> list[Route]:
        """The routes of its board. From now on the screen shows what happens, until the jobs are closed."""
        happens: SimpleQueue[int | Event | None] = SimpleQueue()
        unwatch = self.board.watch(happens.put)
        controls.jobs.watch(sink=happens.put)
        threading.Thread(target=self._follow, args=(controls, happens, unwatch), name="demo", daemon=True).start()
        return routes(self.board, controls)

    def ready(self) -> None:
        """Says what the person who tries it needs to know."""
        self.board.rest(self.settings)
        self._is_ready = True
        self._screen.say(f"""\
the cable    screen {self.cable.theirs}
the button   curl -X POST http://127.0.0.1:8765/demo/press/17      (hold/17 holds it, press/27 opens the door)
the kiosk    http://127.0.0.1:8765      (it shows the board too)
the answers  flashd jobs --spool {self.settings.spool.path}
Ctrl-C ends the demo.""")

    def _follow(
        self, controls: Controls, happens: SimpleQueue[int | Event | None], unwatch: Callable[[], None]
    ) -> None:
        while True:
            try:
                event = happens.get(timeout=SHOW_SECONDS)
            except Empty:
                event = -1
            if event is None:
                break
            parts = self.board.parts(controls.settings)
            for line in told(event, controls) if isinstance(event, Event) else self._changed(event, parts):
                self._screen.say(line)
            self._screen.show("  ".join(map(drawn, parts)))
        unwatch()

    def _changed(self, pin: int, parts: Sequence[Part]) -> list[str]:
        """What became of a pin that changed. LEDs are drawn and not told."""
        return [
            f"{part.label}: {part.word}" + ("" if part.on else f" after {part.lasted:.1f} s")
            for part in parts
            if self._is_ready and part.pin == pin and part.role != "led"
        ]


def drawn(part: Part) -> str:
    """A part and its time, short enough for all of them to stand in 80 columns: `pin 5 ● on 0.2 of 5 s`."""
    word = "" if part.role in ("led", "button") else f"{part.word} "
    time = time_words(part.seconds)
    if part.on and part.most:
        time = f"{min(part.seconds, part.most):.1f} of {part.most:g} s"
    return f"{part.label} {'●' if part.on else '○'} {word}{time}"


def time_words(seconds: float) -> str:
    """A time of at most two digits, up to a hundred hours."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5940 else f"{seconds / 3600:.0f} h"


def told(event: Event, controls: Controls) -> list[str]:
    """What a trigger asks, and later what it was answered. Of others' jobs nothing: they see it themselves."""
    if event.kind == "started":
        job, asks = controls.jobs.get(event.job), True
    else:
        job, asks = event.end, False
    if job is None or not job.request.source.startswith(TRIGGER):
        return []
    if asks:
        return [f"{who(job.request.source, controls.settings.triggers)} asks: {job.request.turns[-1].content}"]
    if job.state is not State.DONE:
        return [f"no answer: {job.state}"]
    shares = ", ".join(f"{name} {100 * p:.0f} %" for name, p in job.result.probabilities.items())
    return [f"the answer: {job.result.text}" + (f"  ({shares})" if shares else "")]


def routes(board: MockBoard, controls: Controls) -> list[Route]:
    """Presses buttons over HTTP, and tells pages what is on the board."""

    async def touched(seconds: float, http: Request) -> Response:
        pin = http.path_params["pin"]
        try:
            await asyncio.to_thread(board.press, controls.settings, pin, seconds)
        except UsageError as error:
            return JSONResponse({"error": str(error)}, 404)
        return JSONResponse({"pressed": pin})

    async def happens(_: Request) -> Response:
        return StreamingResponse(_stream(board, controls), media_type="text/event-stream")

    return [
        Route("/demo/press/{pin:int}", partial(touched, PRESS_SECONDS), methods=["POST"]),
        Route("/demo/hold/{pin:int}", partial(touched, HOLD_SECONDS), methods=["POST"]),
        Route("/demo/board", happens),
    ]


async def _stream(board: MockBoard, controls: Controls) -> AsyncIterator[str]:
    """All parts, anew whenever one changes."""
    events = Events[int | Event]()
    unwatch, watch = board.watch(events.put), controls.jobs.watch(sink=events.put)
    try:
        changed: int | Event | None = 0
        while not events.over:
            if isinstance(changed, int):
                parts = [_described(part) for part in board.parts(controls.settings)]
                yield f"data: {msgspec.json.encode(parts).decode()}\n\n"
            elif changed is None:
                yield ":\n\n"
            changed = await events.next(QUIET_SECONDS)
    finally:
        unwatch()
        watch.close()


def _described(part: Part) -> dict[str, str | int | float | bool]:
    return {**msgspec.structs.asdict(part), "label": part.label, "word": part.word}
