"""A buzzer: one beep for an answer, three for an error, none while muted."""

from __future__ import annotations

import gpiozero

from device.outputs.output import Output, Phase, Surroundings
from flashd.config.devices import Buzzer
from flashd.daemon.job import Event, State


class Beeper(Output):
    def __init__(self, settings: Buzzer, around: Surroundings) -> None:
        self._buzzer, self._muted = gpiozero.Buzzer(settings.pin), around.muted

    def show(self, phase: Phase) -> None:
        if phase is Phase.ERROR and not self._muted():
            self._buzzer.beep(0.1, 0.1, n=3)

    def event(self, event: Event) -> None:
        if event.end is not None and event.end.state is State.DONE and not self._muted():
            self._buzzer.beep(0.1, 0.1, n=1)

    def close(self) -> None:
        self._buzzer.close()
