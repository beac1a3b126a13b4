"""Pins that decisions drive: on for an answer, never longer than allowed, off at start, stop and error."""

from __future__ import annotations

import logging
import threading

import gpiozero

from flashd.config import AnyTrigger, Drive
from flashd.daemon.job import Job, State

log = logging.getLogger(__name__)


class Drives:
    """The output pins of triggers that have one. They are off unless a decision has just turned one on.

    Raises gpiozero.GPIOZeroError where a pin cannot be had.
    """

    def __init__(self, triggers: list[AnyTrigger]) -> None:
        self._drives: dict[str, _Drive] = {}
        try:
            for trigger in triggers:
                if trigger.drive is not None:
                    self._drives[f"trigger:{trigger.name}"] = _Drive(trigger.drive)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Turns all off and lets the pins go."""
        for drive in self._drives.values():
            drive.close()
        self._drives.clear()

    def decided(self, job: Job) -> None:
        """A job has ended: its trigger's pin follows the answer; anything but an answer turns it off."""
        drive = self._drives.get(job.request.source)
        if drive is not None:
            drive.set(job.state is State.DONE and job.result.text == drive.settings.answer)


class _Drive:
    def __init__(self, settings: Drive) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._pin = gpiozero.DigitalOutputDevice(settings.pin, active_high=settings.active_high, initial_value=False)

    def set(self, on: bool) -> None:
        with self._lock:
            self._stop_timer()
            if on:
                # the timer first: there is no moment in which the pin is on and nothing turns it off
                self._timer = threading.Timer(self.settings.most, self._time_is_up)
                self._timer.daemon = True
                self._timer.start()
                self._pin.on()
            else:
                self._pin.off()

    def close(self) -> None:
        with self._lock:
            self._stop_timer()
            self._pin.off()
            self._pin.close()

    def _time_is_up(self) -> None:
        with self._lock:
            if not self._pin.closed:
                self._pin.off()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
