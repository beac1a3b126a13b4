"""flashd.yaml -> typed settings. An error names the key, the line and what is allowed.

Every struct refuses unknown keys; msgspec checks types and ranges; what it cannot express is in a struct's
__post_init__. deploy/flashd.example.yaml documents each key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from flashd import typedyaml
from flashd.errors import ConfigError, Misfit
from flashd.typedyaml import Wrong, dotted


def _text(pattern: str, words: str) -> msgspec.Meta:
    """A text that matches a pattern, and in words what that allows."""
    return msgspec.Meta(pattern=pattern, description=words)


Name = Annotated[
    str, _text(r"^[a-z][a-z0-9_-]{0,31}\Z", "a name: a small letter, then up to 31 small letters, digits, - and _")
]
Size = Annotated[str, _text(r"^(?=.*[1-9])([0-9]+(\.[0-9]+)?[KMGkmg]|[0-9]{7,})\Z", "a size, such as 512M or 1.5G")]
TimeOfDay = Annotated[str, _text(r"^([01]\d|2[0-3]):[0-5]\d\Z", "a time of day in quotes, such as '07:30'")]
OneWireId = Annotated[
    str, _text(r"^28-[0-9a-f]{12}\Z", "28- and twelve digits 0 to f, as /sys/bus/w1/devices names it")
]
Channel = Annotated[str, _text(r"^[a-z0-9_]{1,40}\Z", "a channel's name, such as temp or voltage0")]
Pin = Annotated[int, msgspec.Meta(ge=0, le=63)]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=10)]
TopP = Annotated[float, msgspec.Meta(gt=0, le=1)]
Priority = Annotated[int, msgspec.Meta(ge=0, le=9)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400 * 366)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=86400 * 366)]
PerMinute = Annotated[int, msgspec.Meta(ge=1, le=6000)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping of the file in which every key is known."""


class Spool(Strict, frozen=True, kw_only=True):
    path: str = "/var/lib/flashd/spool.db"
    most_waiting: Count = 32
    keep: Count = 1000


class Card(Strict, frozen=True, kw_only=True):
    """What becomes of a job whose card is pulled: after `wait` seconds it fails."""

    wait: Seconds = 0.0


class Answering(Strict, frozen=True, kw_only=True):
    """How an answer is drawn where a job does not say."""

    system: str | None = None
    max_tokens: Count = 128
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0
    min_p: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] = 1.0


class Api(Strict, frozen=True, kw_only=True):
    socket: str = "/run/flashd/flashd.sock"
    loopback: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None


class Serial(Strict, frozen=True, kw_only=True):
    name: Name
    port: str
    baud: Annotated[int, msgspec.Meta(ge=50, le=4_000_000)] = 115200
    mode: Literal["human", "machine"] = "human"
    charset: Literal["utf-8", "ascii"] = "utf-8"
    columns: Annotated[int, msgspec.Meta(ge=20, le=400)] = 80
    flow: Literal["none", "rtscts", "xonxoff"] = "none"


# --- sensors ----------------------------------------------------------------------------------------------


class Sensor(Strict, tag_field="kind", frozen=True, kw_only=True):
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

    channel: Annotated[int, msgspec.Meta(ge=0, le=7)]
    low: float = 0.0
    high: float = 1.0


class OneWire(Sensor, tag="ds18b20", frozen=True, kw_only=True):
    """A DS18B20 thermometer on the 1-Wire bus. Degrees Celsius. Without an id the first that is found."""

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
            raise ValueError("a schedule has either every: SECONDS or at: 'HH:MM'")


class Manual(Trigger, tag="manual", frozen=True, kw_only=True):
    """Started only by name: from a console, the API or the kiosk."""


AnyTrigger = Button | Motion | Door | Near | Rotary | Schedule | Manual


# --- outputs ----------------------------------------------------------------------------------------------


class Led(Strict, tag_field="kind", tag="led", frozen=True, kw_only=True):
    """One LED that shows what the appliance does by how it blinks."""

    pin: Pin
    active_high: bool = True


class RgbLed(Strict, tag_field="kind", tag="rgb", frozen=True, kw_only=True):
    red: Pin
    green: Pin
    blue: Pin
    active_high: bool = True


class Buzzer(Strict, tag_field="kind", tag="buzzer", frozen=True, kw_only=True):
    """Beeps once for an answer and three times for an error."""

    pin: Pin


class Speech(Strict, tag_field="kind", tag="speech", frozen=True, kw_only=True):
    """A program that is given a sentence on its standard input and says it."""

    command: Annotated[list[str], msgspec.Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["espeak-ng", "--stdin"]
    )


class Display(Strict, tag_field="kind", tag="display", frozen=True, kw_only=True):
    """A small display of the luma.oled package, on I2C."""

    driver: Literal["ssd1306", "sh1106", "ssd1309"] = "ssd1306"
    port: Annotated[int, msgspec.Meta(ge=0, le=63)] = 1
    address: Annotated[int, msgspec.Meta(ge=3, le=119)] = 0x3C


class Hook(Strict, tag_field="kind", tag="hook", frozen=True, kw_only=True):
    """A program that is run when a job comes to `event`, with the job as JSON on its standard input."""

    event: Literal["accepted", "started", "done", "failed", "cancelled"] = "done"
    command: Annotated[list[str], msgspec.Meta(min_length=1)]
    timeout: Positive = 10.0


AnyOutput = Led | RgbLed | Buzzer | Speech | Display | Hook


class Kiosk(Strict, frozen=True, kw_only=True):
    title: str = "Ask me"
    presets: list[str] = msgspec.field(default_factory=lambda: ["What can you do?"])


class Settings(Strict, frozen=True, kw_only=True):
    """The whole file."""

    model: str | None = None
    memory: Size | None = None
    context: Annotated[int, msgspec.Meta(ge=16, le=1 << 20)] = 1024
    threads: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    card: Card = Card()
    answer: Answering = Answering()
    api: Api = Api()
    spool: Spool = Spool()
    kiosk: Kiosk = Kiosk()
    mute_pin: Pin | None = None
    schemas: bool = False
    snapshots: bool = True
    serial: list[Serial] = []
    sensors: list[AnySensor] = []
    triggers: list[AnyTrigger] = []
    outputs: list[AnyOutput] = []


def pins(settings: Settings) -> list[int]:
    """The pins of everything configured; one that two entries use is there twice."""
    return [pin for _, entry in _entries(settings) for pin in _pins(entry)] + _mute(settings)


def _check_fit(settings: Settings) -> None:
    """What one entry cannot say of itself. Raises Misfit."""
    _check_names(settings)
    distances = {s.name for s in settings.sensors if isinstance(s, Distance)}
    for i, trigger in enumerate(settings.triggers):
        at = ("triggers", i)
        if trigger.json_schema is not None and not settings.schemas:
            raise Misfit((*at, "json_schema"), f"trigger {trigger.name!r} has one, which needs schemas: true")
        if isinstance(trigger, Near) and trigger.sensor not in distances:
            wanted = f"a distance sensor called {trigger.sensor!r}"
            raise Misfit((*at, "sensor"), f"trigger {trigger.name!r} needs {wanted}")
    _check_pins(settings)


def _check_names(settings: Settings) -> None:
    for what in ("serial", "sensors", "triggers"):
        names: list[str] = []
        for i, entry in enumerate(getattr(settings, what)):
            if entry.name in names:
                raise Misfit((what, i, "name"), f"two {what} are called {entry.name!r}")
            names.append(entry.name)


def _check_pins(settings: Settings) -> None:
    """Each pin has one user, but for a button that is pressed in several ways."""
    users: dict[int, list[Any]] = {pin: [None] for pin in _mute(settings)}
    for path, entry in _entries(settings):
        for pin in _pins(entry):
            others = users.setdefault(pin, [])
            if others and not all(_same_button(entry, other) for other in others):
                raise Misfit(path, f"pin {pin} is used twice")
            others.append(entry)


def _same_button(one: Any, other: Any) -> bool:
    return (
        isinstance(one, Button)
        and isinstance(other, Button)
        and one.press != other.press
        and (one.pull_up, one.bounce) == (other.pull_up, other.bounce)
    )


def _entries(settings: Settings) -> Iterator[tuple[tuple[str, int], Any]]:
    """What may have pins, each with the path to it."""
    for what in ("sensors", "triggers", "outputs"):
        for i, entry in enumerate(getattr(settings, what)):
            yield (what, i), entry


def _mute(settings: Settings) -> list[int]:
    return [] if settings.mute_pin is None else [settings.mute_pin]


def _pins(entry: Any) -> list[int]:
    names = ("pin", "echo", "trigger", "a", "b", "button", "red", "green", "blue")
    pins = [value for name in names if isinstance(value := getattr(entry, name, None), int)]
    drive = getattr(entry, "drive", None)
    return pins + ([drive.pin] if drive else [])


LONGEST = 1 << 20
"""Bytes of a file."""

Check = Callable[[Settings], None]


def _no_more(_: Settings) -> None:
    """Checks nothing."""


def load(path: Path, check: Check = _no_more) -> Settings:
    """The settings of a file. Raises ConfigError naming the line, the key and what is allowed.

    Args:
        path: the file.
        check: looks at what this module knows nothing of, such as templates. Raises Misfit.
    """
    try:
        return parse(typedyaml.read(path, LONGEST), str(path), check)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: not there; make it after deploy/flashd.example.yaml, name another with --config, or try"
            " flashd serve --demo"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except Wrong as error:
        raise ConfigError(f"{path}{error}") from error


def parse(text: str, name: str = "flashd.yaml", check: Check = _no_more) -> Settings:
    """The settings of a text called `name`. Raises ConfigError."""
    try:
        settings, document = typedyaml.parse(text, Settings)
    except Wrong as error:
        raise ConfigError(f"{name}{error}") from error
    try:
        _check_fit(settings)
        check(settings)
    except Misfit as error:
        raise ConfigError(f"{name}, line {document.line(error.path)}: {dotted(error.path)}{error}") from error
    return settings
