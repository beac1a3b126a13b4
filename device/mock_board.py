"""A board that is not there: gpiozero's mock pins, what hangs on each of them, and since when it is as it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

import gpiozero
import msgspec
from gpiozero.pins.mock import MockFactory, MockPin

from flashd.config.devices import Button, Door, Led, Motion, Talk
from flashd.config.settings import Settings
from flashd.config.tools import SetOutput
from flashd.errors import UsageError

PRESS_SECONDS = 0.2
HOLD_SECONDS = 1.5
"""How long a finger stays. The second is longer than the second after which a press is a long one."""

Role = Literal["button", "door", "motion", "led", "drive"]
TOUCHED: tuple[Role, ...] = ("button", "door", "motion")
"""What a person moves; the rest is moved by flashd."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What hangs on a pin."""

    role: Role
    pin: int
    on: bool  # pressed, open, lit, switched on
    seconds: float  # since it is so
    lasted: float  # seconds; what it was before was so for so long
    most: float = 0.0  # seconds; a pin that is driven is on no longer

    @property
    def label(self) -> str:
        return f"{'pin' if self.role == 'drive' else 'LED' if self.role == 'led' else self.role} {self.pin}"

    @property
    def word(self) -> str:
        return WORDS[self.role][self.on]


WORDS: dict[Role, tuple[str, str]] = {
    "button": ("up", "pressed"),
    "door": ("closed", "open"),
    "motion": ("still", "moves"),
    "led": ("off", "on"),
    "drive": ("off", "on"),
}
"""A part's states, the one at rest first."""


class _Pin(MockPin):  # type: ignore[misc]  # gpiozero has no types
    """Tells its board when it changes."""

    def _change_state(self, value: bool) -> bool:
        changed = bool(super()._change_state(value))
        if changed:
            del self.states[:-1]  # gpiozero keeps all, and an LED blinks for days
            if isinstance(self.factory, _Factory):
                self.factory.changed(int(self.info.name.removeprefix("GPIO")))
        return changed


class _Factory(MockFactory):  # type: ignore[misc]
    def __init__(self, changed: Callable[[int], None]) -> None:
        super().__init__(pin_class=_Pin)
        self.changed = changed


class MockBoard:
    """Takes the place of the board's pins for all of gpiozero. Close it.

    Pins change in any thread; whoever watches is told in that one, and must not wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[int, tuple[float, float]] = {}  # when it changed, and how long it had been as before
        self._made = time.monotonic()
        self._sinks: list[Callable[[int], None]] = []
        self._factory = gpiozero.Device.pin_factory = _Factory(self._changed)

    def close(self) -> None:
        self._factory.reset()

    def watch(self, sink: Callable[[int], None]) -> Callable[[], None]:
        """Tells `sink` each pin that changes, until the function that this returns is called."""
        self._sinks.append(sink)
        return lambda: self._sinks.remove(sink)

    def parts(self, settings: Settings) -> list[Part]:
        """Everything on the board: outputs first, each pin once, in the order of the configuration."""
        found: dict[int, Part] = {}
        for output in settings.outputs:
            if isinstance(output, Led):
                found[output.pin] = self._part("led", output.pin, output.active_high)
        for trigger in settings.triggers:
            if trigger.drive is not None:
                drive = trigger.drive
                found[drive.pin] = self._part("drive", drive.pin, drive.active_high, drive.most)
        for tool in settings.tools:
            if isinstance(tool, SetOutput):
                found[tool.pin] = self._part("drive", tool.pin, tool.active_high, tool.most)
        if settings.confirm is not None:
            found[settings.confirm.pin] = self._part("button", settings.confirm.pin, not settings.confirm.pull_up)
        for trigger in settings.triggers:
            if isinstance(trigger, Button | Talk) and trigger.pin is not None:
                found[trigger.pin] = self._part("button", trigger.pin, not trigger.pull_up)
            elif isinstance(trigger, Door):
                found[trigger.pin] = self._part("door", trigger.pin, trigger.pull_up)
            elif isinstance(trigger, Motion):
                found[trigger.pin] = self._part("motion", trigger.pin, True)
        return list(found.values())

    def rest(self, settings: Settings) -> None:
        """Closes the doors: a contact that nobody has touched reads as open."""
        for part in self.parts(settings):
            if part.role == "door" and part.on:
                self._flip(part.pin)

    def press(self, settings: Settings, pin: int, seconds: float) -> None:
        """Presses a button, moves before a sensor, or opens a door or closes an open one, for so long.

        Raises UsageError if nothing of that kind is on the pin.
        """
        parts = {part.pin: part for part in self.parts(settings)}
        if pin not in parts or parts[pin].role not in TOUCHED:
            there = ", ".join(part.label for part in parts.values() if part.role in TOUCHED)
            what = f"{parts[pin].label} is an output" if pin in parts else f"there is nothing on pin {pin}"
            raise UsageError(f"{what}; what can be touched: {there or 'nothing'}")
        self._flip(pin)
        time.sleep(seconds)
        self._flip(pin)

    def _flip(self, pin: int) -> None:
        mock = self._factory.pin(pin)
        assert isinstance(mock, MockPin)
        mock.drive_low() if mock.state else mock.drive_high()

    def _part(self, role: Role, pin: int, active_high: bool, most: float = 0.0) -> Part:
        with self._lock:
            since, lasted = self._since.get(pin, (self._made, 0.0))
        on = bool(self._factory.pin(pin).state) is active_high
        return Part(role=role, pin=pin, on=on, seconds=time.monotonic() - since, lasted=lasted, most=most)

    def _changed(self, pin: int) -> None:
        now = time.monotonic()
        with self._lock:
            before, _ = self._since.get(pin, (self._made, 0.0))
            self._since[pin] = now, now - before
        for sink in list(self._sinks):
            sink(pin)
