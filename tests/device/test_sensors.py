"""Sensors: the kernel's files as fixtures, gpiozero's through mock pins, and those that are missing or hang."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import get_args

import pytest
from gpiozero.pins.mock import MockFactory

from device.prompt import Prompt
from device.sensors.kinds import KINDS
from device.sensors.reading import Reading
from device.sensors.sensors import Sensors
from flashd.config.devices import AnySensor
from flashd.config.settings import parse
from flashd.errors import ConfigError, UsageError
from flashd.system import board
from tests.device.conftest import Echo, Mcp3008
from tests.waiting import wait

W1 = "{bytes} : crc=xx {crc}\n{bytes} t={milli}\n"
"""What the kernel says of a thermometer: its scratchpad, whether the checksum is right, thousandths of a degree."""

MEASURED, POWER_ON, TRUE_85, ZEROS = (
    "5c 01 4b 46 7f ff 04 10 a1", "50 05 4b 46 7f ff 0c 10 1c", "50 05 4b 46 7f ff 10 10 c1",
    "00 00 00 00 00 00 00 00 00",
)  # fmt: skip


def sensors(text: str) -> list[AnySensor]:
    return parse(f"sensors: [{text}]").sensors


def one_wire(
    sysfs: Path, crc: str = "YES", milli: int = 21750, number: str = "28-0123456789ab", scratchpad: str = MEASURED
) -> None:
    folder = sysfs / "bus/w1/devices" / number
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "w1_slave").write_text(W1.format(bytes=scratchpad, crc=crc, milli=milli))


def iio(sysfs: Path, name: str, **files: str) -> None:
    folder = sysfs / "bus/iio/devices" / f"iio:device{len(list(sysfs.glob('bus/iio/devices/*')))}"
    folder.mkdir(parents=True)
    for file, text in {"name": name, **files}.items():
        (folder / file).write_text(text + "\n")


def read(settings: list[AnySensor], sysfs: Path) -> dict[str, Reading]:
    opened = Sensors(settings, sysfs)
    try:
        return opened.read()
    finally:
        opened.close()


def test_one_wire(tmp_path: Path) -> None:
    wanted = sensors("{kind: ds18b20, name: t}")
    assert str(read(wanted, tmp_path)["t"]) == "unknown"
    one_wire(tmp_path)
    assert str(read(wanted, tmp_path)["t"]) == "21.75 °C"
    one_wire(tmp_path, milli=-1250)
    assert read(wanted, tmp_path)["t"].value == -1.25
    one_wire(tmp_path, crc="NO")
    assert not read(wanted, tmp_path)["t"].known
    assert not read(sensors("{kind: ds18b20, name: t, id: 28-000000000001}"), tmp_path)["t"].known


@pytest.mark.parametrize(
    ("scratchpad", "milli", "says", "why"),
    [
        (POWER_ON, 85000, "unknown", "the thermometer lost its power and has not measured since"),
        (TRUE_85, 85000, "85 °C", ""),
        (ZEROS, 0, "unknown", "the thermometer says nothing but zeros; is its data line shorted to ground?"),
        ("00 00 4b 46 7f ff 10 10 6f", 0, "0 °C", ""),
    ],
)
def test_a_thermometer_that_did_not_measure_is_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scratchpad: str, milli: int, says: str, why: str
) -> None:
    one_wire(tmp_path, milli=milli, scratchpad=scratchpad)
    assert str(read(sensors("{kind: ds18b20, name: t}"), tmp_path)["t"]) == says
    assert caplog.messages == ([f"sensor t is unknown: ValueError: {why}"] if why else [])


@pytest.mark.parametrize("family", ["10", "22", "28", "3b", "42"])
def test_every_family_of_thermometers_is_read(tmp_path: Path, family: str) -> None:
    one_wire(tmp_path, number="00-000000000001", milli=1000)  # something else on the bus
    one_wire(tmp_path, number=f"{family}-0123456789ab")
    for more in ("", f", id: {family}-0123456789ab"):
        assert str(read(sensors(f"{{kind: ds18b20, name: t{more}}}"), tmp_path)["t"]) == "21.75 °C"


def test_iio_channels_with_a_modifier_share_scale_and_offset(tmp_path: Path) -> None:
    """An MLX90614, whose object and ambient temperatures have both in common; an accelerometer; a light sensor."""
    iio(
        tmp_path, "mlx90614", in_temp_object_raw="15482", in_temp_ambient_raw="15000", in_temp_scale="20",
        in_temp_offset="-13657.5",
    )  # fmt: skip
    iio(tmp_path, "adxl345", in_accel_x_raw="100", in_accel_scale="0.038312")
    iio(tmp_path, "tsl2591", in_intensity0_ir_raw="90000", in_intensity_ir_scale="2", in_intensity_scale="7")
    wanted = sensors(
        "{kind: iio, name: object, device: mlx90614, channel: temp_object},"
        "{kind: iio, name: ambient, device: mlx90614, channel: temp_ambient},"
        "{kind: iio, name: x, device: adxl345, channel: accel_x},"
        "{kind: iio, name: ir, device: tsl2591, channel: intensity0_ir}"
    )
    found = {name: str(reading) for name, reading in read(wanted, tmp_path).items()}
    assert found == {"object": "36.49 °C", "ambient": "26.85 °C", "x": "3.831 m/s²", "ir": "180000"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (15482.0, "15482"), (101325.4, "101325"), (9999.96, "10000"), (1013.25, "1013"), (48.2115, "48.21"),
        (0.00001234, "0.00001234"), (-0.5, "-0.5"), (-0.0, "0"), (85.0, "85"), (1e12, "1000000000000"),
    ],
)  # fmt: skip
def test_numbers_are_never_in_scientific_form(value: float, words: str) -> None:
    assert str(Reading(value)) == words


def test_what_is_not_a_number_is_unknown(tmp_path: Path) -> None:
    iio(tmp_path, "odd", in_temp_input="nan")
    assert str(read(sensors("{kind: iio, name: t, device: odd, channel: temp}"), tmp_path)["t"]) == "unknown"


def test_every_kind_of_sensor_has_a_class_that_reads_it() -> None:
    assert set(KINDS) == set(get_args(AnySensor))


def test_iio(tmp_path: Path) -> None:
    iio(tmp_path, "other", in_temp_input="1")
    iio(tmp_path, "bme280", in_temp_input="21370", in_humidityrelative_input="48211.5", in_pressure_input="101.325")
    iio(tmp_path, "ads1015", in_voltage0_raw="1000", in_voltage0_scale="3", in_voltage_offset="-100")
    wanted = sensors(
        "{kind: iio, name: t, device: bme280, channel: temp},"
        "{kind: iio, name: p, device: bme280, channel: pressure},"
        "{kind: iio, name: h, device: bme280, channel: humidityrelative, unit: percent},"
        "{kind: iio, name: v, device: ads1015, channel: voltage0}, {kind: iio, name: n, device: none, channel: temp}"
    )
    found = {name: str(reading) for name, reading in read(wanted, tmp_path).items()}
    assert found == {"t": "21.37 °C", "p": "1013 hPa", "h": "48.21 percent", "v": "2.7 V", "n": "unknown"}


def test_a_sensor_that_hangs_holds_nothing_up(tmp_path: Path) -> None:
    """A 1-Wire bus that hangs is a file whose reading does not return: here a pipe that nobody writes."""
    one_wire(tmp_path, number="28-00000000000a")
    (tmp_path / "bus/w1/devices/28-00000000000b").mkdir()
    pipe = tmp_path / "bus/w1/devices/28-00000000000b/w1_slave"
    os.mkfifo(pipe)
    settings = sensors(
        "{kind: ds18b20, name: good, id: 28-00000000000a},"
        "{kind: ds18b20, name: hung, id: 28-00000000000b, timeout: 0.2}"
    )
    opened = Sensors(settings, tmp_path)
    started = time.monotonic()
    for _ in range(3):
        found = opened.read()
        assert found["good"].known and not found["hung"].known
    assert time.monotonic() - started < 5
    # not one thread more for each try
    assert sum(t.name == "sensor hung" for t in threading.enumerate()) == 1
    opened.close()
    pipe.write_text(W1.format(bytes=MEASURED, crc="YES", milli=1))


def test_sensors_that_hang_are_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later readings, which a page asks for every other second, do not wait for them."""
    for n in range(4):
        (folder := tmp_path / f"bus/w1/devices/28-{n:012x}").mkdir(parents=True)
        os.mkfifo(folder / "w1_slave")  # a read hangs until somebody writes
    entries = ", ".join(f"{{kind: ds18b20, name: s{n}, id: 28-{n:012x}, timeout: 0.1}}" for n in range(4))
    opened = Sensors(sensors(entries), tmp_path)
    waits: list[float | None] = []
    wait_for = threading.Condition.wait

    def counted(self: threading.Condition, timeout: float | None = None) -> bool:
        waits.append(timeout)
        return wait_for(self, timeout)

    try:
        assert not any(reading.known for reading in opened.read().values())
        time.sleep(0.2)
        monkeypatch.setattr(threading.Condition, "wait", counted)
        assert not any(reading.known for reading in opened.read().values())
        assert waits == []
    finally:
        monkeypatch.undo()
        opened.close()
        for n in range(4):
            (tmp_path / f"bus/w1/devices/28-{n:012x}/w1_slave").write_text(
                W1.format(bytes=MEASURED, crc="YES", milli=1)
            )


def test_pins(pins: MockFactory) -> None:
    """A light sensor whose capacitor is charged within the time, and an analog channel on a bus with no chip."""
    settings = sensors(
        "{kind: light, name: light, pin: 5, timeout: 3}, {kind: mcp3008, name: soil, channel: 0, low: -5, high: 5}"
    )
    opened = Sensors(settings)
    try:
        pins.pin(5).drive_high()
        found = opened.read()
        assert set(found) == {"light", "soil"}
        assert found["soil"].value is not None and -5 <= found["soil"].value <= 5
    finally:
        opened.close()


def test_analog_channels_are_scaled(pins: MockFactory) -> None:
    """From `low` at 0 to `high` at 1023, the chip's full scale; `high` may be the smaller, as for dry soil."""
    chip = Mcp3008(pins, {0: 0, 3: 341, 5: 682, 7: 1023})
    opened = Sensors(
        sensors(
            "{kind: mcp3008, name: plain, channel: 3, timeout: 30},"
            "{kind: mcp3008, name: percent, channel: 5, high: 100, unit: '%', timeout: 30},"
            "{kind: mcp3008, name: around, channel: 0, low: -5, high: 5, timeout: 30},"
            "{kind: mcp3008, name: dry, channel: 7, low: 100, high: 0, timeout: 30}"
        )
    )
    try:
        values = {name: reading.value for name, reading in opened.read().items()}
        assert values == pytest.approx({"plain": 1 / 3, "percent": 200 / 3, "around": -5, "dry": 0}, abs=1e-9)
        chip.levels = {0: 1023, 3: 1, 5: 0, 7: 0}
        values = {name: reading.value for name, reading in opened.read().items()}
        assert values == pytest.approx({"plain": 1 / 1023, "percent": 0, "around": 5, "dry": 100}, abs=1e-9)
        assert str(opened.read_one("percent")) == "0 %"
    finally:
        opened.close()


def test_a_ranger_that_is_pulled_is_unknown(pins: MockFactory) -> None:
    """Not its last distance for ever, as gpiozero has it."""
    wall = Echo(pins, echo=5, trigger=6)
    wall.metres = 2.0
    opened = Sensors(sensors("{kind: distance, name: d, echo: 5, trigger: 6, timeout: 30}"))
    try:
        value = opened.read()["d"].value
        assert value is not None and value > 1.9  # a sleep takes longer at times, never less
        wall.metres = None
        wait(lambda: str(opened.read()["d"]) == "unknown", 30)
        wall.metres = 2.0
        wait(lambda: opened.read()["d"].known, 30)
    finally:
        opened.close()


@pytest.mark.slow
def test_prompts_name_what_is_unknown() -> None:
    prompt = Prompt("Soil {{ sensors.soil }}{% if sensors.soil.known %}, wet{% endif %}. {{ last }}", "t", ["soil"])
    assert prompt.render({"soil": Reading(None)}, "", {}) == "Soil unknown. "
    assert prompt.render({"soil": Reading(0.41, "%")}, "Before.", {}) == "Soil 0.41 %, wet. Before."
    with pytest.raises(UsageError, match="trigger 't': its prompt fails"):
        prompt.render({}, "", {})
    with pytest.raises(ConfigError, match="characters"):
        Prompt("{{ 'x' * 100000 }}", "long", [])
    endless = "{% set r = range(90000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match="the template fails: it takes more than"):
        Prompt(endless, "endless", [])


@pytest.mark.parametrize("node", ["soc/soc:firmware", "soc@107c000000/soc@107c000000:firmware"])
def test_the_board(tmp_path: Path, node: str) -> None:
    assert board.read(tmp_path) == board.Board(None, None) and board.read(tmp_path).throttled is None
    zone = tmp_path / "class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("48312\n")
    flags = tmp_path / "devices/platform" / node / "get_throttled"
    flags.parent.mkdir(parents=True)
    flags.write_text("50000\n")  # it was slowed once, and is not now
    assert board.read(tmp_path) == board.Board(48.312, 0x50000) and board.read(tmp_path).throttled is False
    flags.write_text("50005\n")
    assert board.read(tmp_path).throttled
