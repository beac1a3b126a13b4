"""The devices that a configuration needs, as systemd is told them."""

from __future__ import annotations

from pathlib import Path

from device.needed_devices import needed_devices
from flashd.config.settings import parse


def test_each_device_is_named_once_and_no_other() -> None:
    settings = parse("""
serial:
  - {name: a, port: /dev/ttyUSB0}
  - {name: b, port: /dev/ttyUSB3}
  - {name: c, port: /dev/tty1}
  - {name: d, port: /dev/serial/by-id/usb-FTDI-if00-port0}
sensors: [{kind: mcp3008, name: light, channel: 0}]
triggers: [{kind: door, name: door, pin: 4, prompt: p}]
outputs: [{kind: display}, {kind: speech}]
""")
    assert needed_devices(settings) == [
        "/dev/tty1", "char-alsa", "char-gpiochip", "char-i2c", "char-spi", "char-ttyACM", "char-ttyUSB",
    ]  # fmt: skip


def test_a_converter_needs_the_chip_of_its_select_pin_too() -> None:
    settings = parse("sensors: [{kind: mcp3008, name: light, channel: 0}]")
    assert needed_devices(settings) == ["char-gpiochip", "char-spi"]


def test_nothing_configured_needs_nothing() -> None:
    assert needed_devices(parse("")) == []


def test_a_link_is_followed(tmp_path: Path) -> None:
    """/dev/serial0 is one; what is no device needs no permission."""
    (tmp_path / "serial0").symlink_to("/dev/ttyS7")
    settings = parse(f"serial: [{{name: a, port: {tmp_path}/serial0}}, {{name: b, port: 'loop://'}}]")
    assert needed_devices(settings) == ["/dev/ttyS7"]
