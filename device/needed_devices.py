"""Which device nodes a configuration needs, as systemd's DeviceAllow= names them."""

from __future__ import annotations

import re
from pathlib import Path

from flashd.config.settings import Settings, pins

PLUGGED = re.compile(r"^tty(USB|ACM)\d+$")
"""Adapters, which come back under another number when they are plugged in again: their whole kind is needed."""


def needed_devices(settings: Settings) -> list[str]:
    """Paths below /dev, and char-KIND for every device of a kind."""
    wanted = {name for entry in settings.serial for name in _of_port(Path(entry.port))}
    if pins(settings):
        wanted.add("char-gpiochip")
    hearing = [settings.hearing] if settings.hearing else []
    for entry in (*settings.sensors, *settings.outputs, *hearing):
        wanted.update(entry.needs)
    return sorted(wanted)


def _of_port(port: Path) -> list[str]:
    node = port.resolve()  # /dev/serial0 is a link to the board's UART
    if port.is_relative_to("/dev/serial"):  # by-id, by-path: a link to an adapter, when it is there
        return ["char-ttyACM", "char-ttyUSB"]
    adapter = PLUGGED.match(node.name)
    if adapter:
        return [f"char-tty{adapter.group(1)}"]
    return [str(node)] if node.is_relative_to("/dev") else []
