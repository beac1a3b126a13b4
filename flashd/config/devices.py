"""Settings of what hangs on the board: sensors, triggers, outputs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from flashd.config.fields import (
    Channel,
    Count,
    Name,
    OneWireId,
    PerMinute,
    Pin,
    Positive,
    Priority,
    Seconds,
    Strict,
    TimeOfDay,
)

# --- sensors ----------------------------------------------------------------------------------------------


class Sensor(Strict, tag_field="kind", frozen=True, kw_only=True):
    """What every sensor has. `needs`: kinds of devices that systemd is to allow, as DeviceAllow= names them."""

    needs: ClassVar[tuple[str, ...]] = ()
    name: Name
    unit: str = ""
    timeout: Positive = 2.0


class Distance(Sensor, tag="distance", frozen=True, kw_only=True):
    """An ultrasonic ranger. Metres."""

    echo: Pin
    trigger: Pin
    unit: str = "m"
    range: Positive = 4.0


class Light(Sensor, tag="light", frozen=True, kw_only=True):
    """A light-dependent resistor with a capacitor. 0 dark to 1 bright."""

    pin: Pin


class Analog(Sensor, tag="mcp3008", frozen=True, kw_only=True):
    """A channel of an MCP3008. `low` and `high` are what 0 and full scale stand for."""

    # gpiozero opens its pins' chip before the converter's bus, even if that selects the chip itself
    needs: ClassVar[tuple[str, ...]] = ("char-gpiochip", "char-spi")
    channel: Annotated[int, msgspec.Meta(ge=0, le=7)]
    low: float = 0.0
    high: float = 1.0


class OneWire(Sensor, tag="ds18b20", frozen=True, kw_only=True):
    """A thermometer on the 1-Wire bus: a DS18B20 or its kin. Degrees Celsius. Without an id the first found."""

    id: OneWireId | None = None
    unit: str = "°C"


class Iio(Sensor, tag="iio", frozen=True, kw_only=True):
    """A channel of a Linux IIO device, such as temp, pressure or humidityrelative of a bme280."""

    device: str
    channel: Channel


AnySensor = Distance | Light | Analog | OneWire | Iio


# --- triggers ---------------------------------------------------------------------------------------------


class Drive(Strict, frozen=True, kw_only=True):
    """An output pin that a decision drives: on after the answer `answer`, for at most `most` seconds."""

    pin: Pin
    answer: str
    most: Positive = 10.0
    active_high: bool = True


class Trigger(Strict, tag_field="kind", frozen=True, kw_only=True):
    """What starts a job. `prompt` is a Jinja template with `sensors`, `now`, `last` and the trigger's own values."""

    name: Name
    prompt: str
    system: str | None = None
    priority: Priority = 5
    deadline: Positive | None = None
    barge_in: bool = False
    coalesce: bool = True
    per_minute: PerMinute | None = None
    cooldown: Seconds = 0.0
    max_tokens: Count | None = None
    choose: list[str] | None = None
    json_schema: dict[str, Any] | None = None
    drive: Drive | None = None

    def __post_init__(self) -> None:
        if self.choose is not None and (len(self.choose) < 2 or len(set(self.choose)) != len(self.choose)):
            raise ValueError("choose needs two different answers or more")
        if self.choose is not None and not all(c.strip() for c in self.choose):
            raise ValueError("choose has an empty answer")
        if self.choose and self.json_schema:
            raise ValueError("choose and json_schema exclude each other")
        if self.drive and (self.choose is None or self.drive.answer not in self.choose):
            raise ValueError("drive needs choose, with drive.answer among them")


class Button(Trigger, tag="button", frozen=True, kw_only=True):
    pin: Pin
    press: Literal["short", "long", "double"] = "short"
    hold: Positive = 1.0
    gap: Positive = 0.4
    bounce: Seconds = 0.05
    pull_up: bool = True


class Motion(Trigger, tag="motion", frozen=True, kw_only=True):
    pin: Pin


class Door(Trigger, tag="door", frozen=True, kw_only=True):
    """A contact that opens, or closes."""

    pin: Pin
    when: Literal["open", "close"] = "open"
    bounce: Seconds = 0.05
    pull_up: bool = True


class Near(Trigger, tag="near", frozen=True, kw_only=True):
    """Something nearer to a distance sensor than `below` metres."""

    sensor: Name
    below: Positive
    every: Positive = 0.5


class Rotary(Trigger, tag="rotary", frozen=True, kw_only=True):
    """A rotary encoder that picks from `menu` and a button that asks; the template has `choice`."""

    a: Pin
    b: Pin
    button: Pin
    menu: Annotated[list[str], msgspec.Meta(min_length=1)]
    bounce: Seconds = 0.05


class Schedule(Trigger, tag="schedule", frozen=True, kw_only=True):
    """Every so many seconds, or at a time of day."""

    every: Positive | None = None
    at: TimeOfDay | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.every is None) == (self.at is None):
            raise ValueError("a schedule has either every: SECONDS or at: HH:MM")


class Manual(Trigger, tag="manual", frozen=True, kw_only=True):
    """Started only by name: from a console, the API or the kiosk."""


AnyTrigger = Button | Motion | Door | Near | Rotary | Schedule | Manual


# --- outputs ----------------------------------------------------------------------------------------------


class Output(Strict, tag_field="kind", frozen=True, kw_only=True):
    """What every output has. `needs`: kinds of devices that systemd is to allow, as DeviceAllow= names them."""

    needs: ClassVar[tuple[str, ...]] = ()


class Led(Output, tag="led", frozen=True, kw_only=True):
    """One LED that shows what the appliance does by how it blinks."""

    pin: Pin
    active_high: bool = True


class RgbLed(Output, tag="rgb", frozen=True, kw_only=True):
    red: Pin
    green: Pin
    blue: Pin
    active_high: bool = True


class Buzzer(Output, tag="buzzer", frozen=True, kw_only=True):
    """Beeps once for an answer and three times for an error."""

    pin: Pin


class Speech(Output, tag="speech", frozen=True, kw_only=True):
    """A program that is given a sentence on its standard input and says it."""

    needs: ClassVar[tuple[str, ...]] = ("char-alsa",)
    command: Annotated[list[str], msgspec.Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["espeak-ng", "--stdin"]
    )


class Display(Output, tag="display", frozen=True, kw_only=True):
    """A small display of the luma.oled package, on I2C."""

    needs: ClassVar[tuple[str, ...]] = ("char-i2c",)
    driver: Literal["ssd1306", "sh1106", "ssd1309"] = "ssd1306"
    port: Annotated[int, msgspec.Meta(ge=0, le=63)] = 1
    address: Annotated[int, msgspec.Meta(ge=3, le=119)] = 0x3C


class Hook(Output, tag="hook", frozen=True, kw_only=True):
    """A program that is run when a job comes to `event`, with the job as JSON on its standard input."""

    event: Literal["accepted", "started", "done", "failed", "cancelled"] = "done"
    command: Annotated[list[str], msgspec.Meta(min_length=1)]
    timeout: Positive = 10.0


AnyOutput = Led | RgbLed | Buzzer | Speech | Display | Hook
