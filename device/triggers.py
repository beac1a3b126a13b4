"""Triggers: buttons, speech, motion, doors, nearness, a menu, the clock. Each calls `fire` when its time has come.

gpiozero debounces and calls back from threads of its own; nothing here waits in one of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import date, datetime, timedelta
from typing import Any, Protocol

import gpiozero

from device.hearing.ears import Ears
from device.hearing.talk import PushToTalk, WakeWords
from device.sensors.sensors import Sensors
from flashd.config.devices import AnyTrigger, Button, Door, Motion, Near, Rotary, Schedule, Talk

log = logging.getLogger(__name__)

Fire = Callable[..., None]
"""fire(name, **values): the trigger of this name has been set off."""

CLOCK_SECONDS = 10.0
"""How often a schedule looks at the clock, which may jump when the network or a GPS sets it."""


class Closes(Protocol):
    def close(self) -> None: ...


def _nobody(_: str) -> None:
    """Nobody looks at what a menu stands at, or cares for a press."""


class Triggers:
    """The configured triggers, live until closed.

    Args:
        settings: of each trigger.
        sensors: what a trigger of kind near looks at.
        fire: is called when a trigger goes off.
        turned: is told what a menu stands at.
        pressed: is told whose button went down, before it is clear which press it will be, or whose wake word came.
        ears: what hears for triggers of kind talk; they are left out without it.

    Raises gpiozero.GPIOZeroError where a pin cannot be had.
    """

    def __init__(
        self, settings: list[AnyTrigger], sensors: Sensors, fire: Fire, turned: Callable[[str], None] = _nobody,
        pressed: Callable[[str], None] = _nobody, ears: Ears | None = None,
    ) -> None:  # fmt: skip
        self._sensors, self._fire, self._turned, self._pressed, self._ears = sensors, fire, turned, pressed, ears
        self._open: list[Closes] = []
        try:
            for pin in sorted({t.pin for t in settings if isinstance(t, Button)}):
                buttons = [t for t in settings if isinstance(t, Button) and t.pin == pin]
                self._open.append(Presses(buttons, fire, pressed))
            for trigger in settings:
                self._open += self._opened(trigger)
            awake = [t for t in settings if isinstance(t, Talk) and t.wake]
            if awake and ears is not None:
                self._open.append(WakeWords(awake, ears, pressed, lambda name, heard: fire(name, heard=heard)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for each in self._open:
            each.close()
        self._open.clear()

    def _opened(self, trigger: AnyTrigger) -> list[Closes]:
        fire = self._fire
        if isinstance(trigger, Talk) and trigger.pin is not None and self._ears is not None:
            return [
                PushToTalk(
                    trigger, trigger.pin, self._ears, lambda: self._pressed(trigger.name),
                    lambda heard: fire(trigger.name, heard=heard),
                )
            ]  # fmt: skip
        if isinstance(trigger, Motion):
            motion = gpiozero.MotionSensor(trigger.pin)
            motion.when_motion = lambda: fire(trigger.name)
            return [motion]
        if isinstance(trigger, Door):
            return [_door(trigger, fire)]
        if isinstance(trigger, Near):
            return [Nearness(trigger, self._sensors, fire)]
        if isinstance(trigger, Rotary):
            return [Menu(trigger, fire, self._turned, self._pressed)]
        if isinstance(trigger, Schedule):
            return [Clock(trigger, fire)]
        return []


def _door(trigger: Door, fire: Fire) -> Closes:
    # a reed contact to ground is closed, so pressed, while the door is
    door = gpiozero.Button(trigger.pin, pull_up=trigger.pull_up, bounce_time=trigger.bounce or None)
    if trigger.when == "open":
        door.when_released = lambda: fire(trigger.name)
    else:
        door.when_pressed = lambda: fire(trigger.name)
    return door  # type: ignore[no-any-return]


class Presses:
    """One button: short, long and double presses told apart, as far as there are triggers for them."""

    def __init__(self, triggers: list[Button], fire: Fire, pressed: Callable[[str], None]) -> None:
        self._names = {t.press: t.name for t in triggers}
        self._fire = fire
        self._lock = threading.Lock()
        self._held = False
        self._pending: threading.Timer | None = None
        first = triggers[0]
        by_press = {t.press: t for t in triggers}
        self._gap = by_press.get("double", first).gap
        self._button = gpiozero.Button(
            first.pin, pull_up=first.pull_up, bounce_time=first.bounce or None,
            hold_time=by_press.get("long", first).hold,
        )  # fmt: skip
        self._button.when_pressed = lambda: pressed(first.name)
        if "long" in self._names:
            self._button.when_held = self._hold
        self._button.when_released = self._release

    def close(self) -> None:
        self._button.close()
        with self._lock:
            if self._pending is not None:
                self._pending.cancel()

    def _hold(self) -> None:
        self._held = True
        self._fire(self._names["long"])

    def _release(self) -> None:
        if self._held:
            self._held = False
            return
        with self._lock:
            second = self._pending
            if second is not None:
                second.cancel()
                self._pending = None
            elif "double" in self._names:
                # short only once it is clear that no second press follows
                self._pending = threading.Timer(self._gap, self._single)
                self._pending.daemon = True
                self._pending.start()
                return
        self._say("double" if second is not None else "short")

    def _single(self) -> None:
        with self._lock:
            self._pending = None
        self._say("short")

    def _say(self, press: Any) -> None:
        if press in self._names:
            self._fire(self._names[press])


class _Loop:
    """A thread that does something again and again until closed."""

    def __init__(self, name: str) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def close(self) -> None:
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5)

    def _run(self) -> None:
        while not self._stopping.wait(self._pause()):
            self._turn()

    def _pause(self) -> float:
        raise NotImplementedError

    def _turn(self) -> None:
        raise NotImplementedError


class Nearness(_Loop):
    """Fires when something comes near, and again only after it has gone."""

    def __init__(self, trigger: Near, sensors: Sensors, fire: Fire) -> None:
        super().__init__(f"trigger {trigger.name}")
        self._trigger, self._sensors, self._fire = trigger, sensors, fire
        self._near = False
        self._thread.start()

    def _pause(self) -> float:
        return self._trigger.every

    def _turn(self) -> None:
        reading = self._sensors.read_one(self._trigger.sensor)
        if reading.value is None:
            return
        near = reading.value < self._trigger.below
        if near and not self._near:
            self._fire(self._trigger.name, distance=round(reading.value, 2))
        self._near = near


class Menu:
    """A rotary encoder that goes round a menu, `turned` to a choice, and a button that picks it."""

    def __init__(
        self, trigger: Rotary, fire: Fire, turned: Callable[[str], None], pressed: Callable[[str], None]
    ) -> None:
        self._trigger = trigger
        self._encoder = gpiozero.RotaryEncoder(trigger.a, trigger.b, max_steps=0)
        try:
            self._button = gpiozero.Button(trigger.button, bounce_time=trigger.bounce or None)
        except BaseException:
            self._encoder.close()
            raise
        self._pressed, self._fire = pressed, fire
        self._button.when_pressed = self._pick
        self._encoder.when_rotated = lambda: turned(self.choice)

    @property
    def choice(self) -> str:
        """What the menu stands at."""
        return self._trigger.menu[int(self._encoder.steps) % len(self._trigger.menu)]

    def _pick(self) -> None:
        self._pressed(self._trigger.name)
        self._fire(self._trigger.name, choice=self.choice)

    def close(self) -> None:
        self._button.close()
        self._encoder.close()


class Clock(_Loop):
    """Every so many seconds by a clock that cannot jump; or once a day, when the wall clock has passed a time."""

    def __init__(self, trigger: Schedule, fire: Fire) -> None:
        super().__init__(f"trigger {trigger.name}")
        self._trigger, self._fire = trigger, fire
        self._next = None if trigger.at is None else next_time(datetime.now(), trigger.at)
        self._last: date | None = None  # when it last fired: a clock that is put back does not fire twice on a day
        self._thread.start()

    def _pause(self) -> float:
        if self._trigger.every is not None:
            return self._trigger.every
        return CLOCK_SECONDS

    def _turn(self) -> None:
        if self._trigger.at is not None:
            now = datetime.now()
            assert self._next is not None
            due, self._next = now >= self._next, next_time(now, self._trigger.at)
            if not due or now.date() == self._last:
                return
            self._last = now.date()
        self._fire(self._trigger.name)


def next_time(now: datetime, at: str) -> datetime:
    """The next time of day `at`, strictly after now."""
    hour, minute = map(int, at.split(":"))
    today = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return today if today > now else today + timedelta(days=1)
