"""A small display, through luma.oled."""

from __future__ import annotations

import logging
import threading
from typing import Any

from device.outputs.output import OneText, Output, Phase, Surroundings
from flashd.config.devices import Display
from flashd.daemon.job import Event
from flashd.errors import InputMissing

log = logging.getLogger(__name__)


def open_display(settings: Display, _: Surroundings) -> Output:
    """The display, or nothing if none answers: it may hang on loose wires, and the rest goes on without it."""
    try:
        return Screen(luma_device(settings))
    except InputMissing as error:
        log.warning("%s; left out until a reload or restart", error)
        return Output()


def luma_device(settings: Display) -> Any:
    """A luma device. Raises ImportError without luma, InputMissing if none answers."""
    from luma.core.interface.serial import i2c
    from luma.oled import device

    try:
        return getattr(device, settings.driver)(i2c(port=settings.port, address=settings.address))
    except Exception as error:  # luma's and smbus's own are no kin
        raise InputMissing(f"display {settings.driver} on I2C bus {settings.port}: {error}") from error


class Screen(OneText):
    """A luma device as a small text terminal: the phase, what a menu stands at, the answer as it comes."""

    def __init__(self, device: Any) -> None:
        from luma.core.virtual import terminal

        super().__init__()
        self._device = device
        self._terminal = terminal(device, animate=False)
        self._lock = threading.Lock()
        self._fresh = True  # what is shown is no part of the answer that begins

    def show(self, phase: Phase) -> None:
        if phase in (Phase.LOADING, Phase.LISTENING, Phase.UNDERSTANDING, Phase.THINKING, Phase.ERROR):
            self.notice(str(phase))

    def notice(self, text: str) -> None:
        with self._lock:
            self._terminal.clear()
            self._terminal.println(text)
            self._fresh = True

    def close(self) -> None:
        self._device.cleanup()

    def _follow(self, event: Event) -> None:
        if event.kind in ("started", "restarted"):
            self._fresh = True
        elif event.kind == "text":
            with self._lock:
                if self._fresh:
                    self._terminal.clear()
                self._fresh = False
                self._terminal.puts(event.text)
                self._terminal.flush()
