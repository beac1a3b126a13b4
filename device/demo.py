"""The appliance with no board: gpiozero's mock pins, a pseudo-terminal for the cable, a page to press buttons."""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
import tty
from pathlib import Path

import gpiozero
from gpiozero.pins.mock import MockFactory, MockPin
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashd.config.settings import Settings, parse
from flashd.errors import UsageError

PRESS_SECONDS = 0.2

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


class Demo:
    """Mock pins and a cable. Close it."""

    def __init__(self, folder: Path) -> None:
        self._factory = MockFactory()
        gpiozero.Device.pin_factory = self._factory
        self.cable = Cable()
        self.settings: Settings = parse(SETTINGS.format(folder=folder, port=self.cable.ours), "the demo")

    def close(self) -> None:
        self.cable.close()
        self._factory.reset()

    @property
    def manual(self) -> str:
        """What the person who tries it needs to know."""
        return f"""\
the cable    screen {self.cable.theirs}
the button   curl -X POST http://127.0.0.1:8765/demo/press/17      (pin 27: the door)
the kiosk    http://127.0.0.1:8765
the answers  flashd jobs --spool {self.settings.spool.path}
Ctrl-C ends the demo."""


def press(pin: int) -> None:
    """Presses the button on a mock pin for a moment: the contact pulls it to ground, as a real one does.

    Raises UsageError if there is no such pin, or if it is an output.
    """
    try:
        mock = gpiozero.Device.pin_factory.pin(pin)
    except gpiozero.PinInvalidPin as error:
        raise UsageError(f"there is no pin {pin}") from error
    assert isinstance(mock, MockPin)
    if mock.function != "input":
        raise UsageError(f"pin {pin} is an output; only a pin with a button or a contact can be pressed")
    mock.drive_low()
    time.sleep(PRESS_SECONDS)
    mock.drive_high()


def routes() -> list[Route]:
    """Presses buttons over HTTP; only where pins are mock ones."""

    async def pressed(http: Request) -> Response:
        pin = http.path_params["pin"]
        try:
            await asyncio.to_thread(press, pin)
        except UsageError as error:
            return JSONResponse({"error": str(error)}, 404)
        return JSONResponse({"pressed": pin})

    return [Route("/demo/press/{pin:int}", pressed, methods=["POST"])]
