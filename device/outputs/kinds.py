"""Every kind of output: its settings, and what opens it. A new kind is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from device.outputs.buzzer import Beeper
from device.outputs.display import open_display
from device.outputs.hook import HookRunner
from device.outputs.led import ColourLight, Light
from device.outputs.output import Output, Surroundings
from device.outputs.speech import Voice
from flashd.config.devices import AnyOutput, Buzzer, Display, Hook, Led, RgbLed, Speech

KINDS: dict[type[AnyOutput], Callable[[Any, Surroundings], Output]] = {
    Led: Light,
    RgbLed: ColourLight,
    Buzzer: Beeper,
    Speech: Voice,
    Display: open_display,
    Hook: HookRunner,
}
"""Each is called with the settings and the surroundings. It raises gpiozero.GPIOZeroError if a pin cannot be had."""
