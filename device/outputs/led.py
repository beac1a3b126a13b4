"""LEDs that show by blinking, or by their colour, what the appliance does."""

from __future__ import annotations

import gpiozero

from device.outputs.output import Output, Phase, Surroundings
from flashd.config.devices import Led, RgbLed

BLINKS: dict[Phase, tuple[float, float]] = {
    Phase.LOADING: (0.5, 0.5), Phase.IDLE: (0.05, 2.95), Phase.LISTENING: (0.9, 0.1),
    Phase.UNDERSTANDING: (0.2, 0.2), Phase.THINKING: (0.2, 0.2), Phase.CONFIRMING: (0.1, 0.9),
    Phase.ANSWERING: (1.0, 0.0), Phase.ERROR: (0.08, 0.08), Phase.MUTED: (0.0, 1.0),
}  # fmt: skip
"""Seconds on and off of a single LED."""

COLOURS: dict[Phase, tuple[float, float, float]] = {
    Phase.LOADING: (1, 1, 0), Phase.IDLE: (0, 1, 0), Phase.LISTENING: (1, 0, 1),
    Phase.UNDERSTANDING: (0, 0, 1), Phase.THINKING: (0, 0, 1), Phase.CONFIRMING: (1, 1, 1),
    Phase.ANSWERING: (0, 1, 1), Phase.ERROR: (1, 0, 0), Phase.MUTED: (0, 0, 0),
}  # fmt: skip


class Light(Output):
    def __init__(self, settings: Led, _: Surroundings) -> None:
        self._led = gpiozero.LED(settings.pin, active_high=settings.active_high)
        self._phase: Phase | None = None

    def show(self, phase: Phase) -> None:
        if phase is self._phase:
            return
        self._phase = phase
        on, off = BLINKS[phase]
        if off == 0:
            self._led.on()
        elif on == 0:
            self._led.off()
        else:
            self._led.blink(on, off)

    def close(self) -> None:
        self._led.close()


class ColourLight(Output):
    def __init__(self, s: RgbLed, _: Surroundings) -> None:
        self._led = gpiozero.RGBLED(s.red, s.green, s.blue, active_high=s.active_high, pwm=False)

    def show(self, phase: Phase) -> None:
        self._led.color = COLOURS[phase]

    def close(self) -> None:
        self._led.close()
