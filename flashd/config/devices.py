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
from flashd.config.tools import ROUNDS, Rounds

# --- sensors ----------------------------------------------------------------------------------------------


class Sensor(Strict, tag_field="kind", frozen=True, kw_only=True):
    """What prompts can name as {{ sensors.NAME }}. A sensor that does not answer reads unknown there."""

    # kinds of devices that systemd is to allow, as DeviceAllow= names them
    needs: ClassVar[tuple[str, ...]] = ()
    name: Name
    """The sensor's name in prompts."""
    unit: str = ""
    """The text behind the value."""
    timeout: Positive = 2.0
    """Seconds to wait for a value."""


class Distance(Sensor, tag="distance", frozen=True, kw_only=True):
    """An ultrasonic ranger, in metres."""

    echo: Pin
    """The pin that hears the echo."""
    trigger: Pin
    """The pin that sends the sound."""
    unit: str = "m"
    """The text behind the value."""
    range: Positive = 4.0
    """The farthest distance, in metres."""


class Light(Sensor, tag="light", frozen=True, kw_only=True):
    """A light-dependent resistor with a capacitor, from 0 (dark) to 1 (bright)."""

    pin: Pin
    """The pin between the resistor and the capacitor."""


class Analog(Sensor, tag="mcp3008", frozen=True, kw_only=True):
    """A channel of an MCP3008 converter on SPI."""

    # gpiozero opens its pins' chip before the converter's bus, even if that selects the chip itself
    needs: ClassVar[tuple[str, ...]] = ("char-gpiochip", "char-spi")
    channel: Annotated[int, msgspec.Meta(ge=0, le=7)]
    """The channel's number."""
    low: float = 0.0
    """The value at 0 volts."""
    high: float = 1.0
    """The value at full scale."""


class OneWire(Sensor, tag="ds18b20", frozen=True, kw_only=True):
    """A thermometer on the 1-Wire bus, a DS18B20 or its kin, in degrees Celsius."""

    id: OneWireId | None = None
    """The thermometer's number. Without this key it is the first one that is found."""
    unit: str = "°C"
    """The text behind the value."""


class Iio(Sensor, tag="iio", frozen=True, kw_only=True):
    """A channel of any Linux IIO device, such as temp, pressure or humidityrelative of a bme280."""

    device: str
    """The device's name in /sys/bus/iio."""
    channel: Channel
    """The channel's name."""


AnySensor = Distance | Light | Analog | OneWire | Iio


# --- triggers ---------------------------------------------------------------------------------------------


class Drive(Strict, frozen=True, kw_only=True):
    """A pin that a decision drives: on after one of the answers, and off otherwise."""

    pin: Pin
    """The pin."""
    answer: str
    """The answer of choose that turns it on."""
    most: Positive = 10.0
    """Seconds after which it is turned off in any case."""
    active_high: bool = True
    """Whether on is 3.3 V. With false on is 0 V."""


class Trigger(Strict, tag_field="kind", frozen=True, kw_only=True):
    """What starts a job."""

    name: Name
    """The trigger's name."""
    prompt: str
    """What is asked: a Jinja template with sensors, now, last (the last answer) and the trigger's own values. If what
    comes out is empty, nothing is asked."""
    system: str | None = None
    """Another system prompt for this job."""
    priority: Priority = 5
    """The job with the highest priority goes first."""
    deadline: Positive | None = None
    """Seconds. A job that is not answered so soon ends as expired. Without this key it has as long as it takes."""
    barge_in: bool = False
    """Whether the job interrupts one of lower priority."""
    coalesce: bool = True
    """Whether a job that waits stands for further starts of this trigger."""
    per_minute: PerMinute | None = None
    """The most jobs that are started in a minute. Without this key any number is started."""
    cooldown: Seconds = 0.0
    """Seconds after a start in which the trigger starts nothing."""
    max_tokens: Count | None = None
    """The answer ends after this many tokens. Without this key it is as answer.max_tokens says."""
    choose: list[str] | None = None
    """The answer is the one of these that the model finds likeliest."""
    json_schema: dict[str, Any] | None = None
    """The answer is JSON of this schema. It needs schemas: true."""
    drive: Drive | None = None
    """A pin that follows the decision. It needs choose."""
    tools: list[Name] = []
    """What the model may have the board do while it answers: the names of tools. They need schemas: true."""
    rounds: Rounds = ROUNDS
    """So often the answer may call tools, up to 8 at once. Then it must be in words."""
    must_call: bool = False
    """Whether the answer must begin with a call. Without this key the model may answer at once."""

    def __post_init__(self) -> None:
        if self.choose is not None and (len(self.choose) < 2 or len(set(self.choose)) != len(self.choose)):
            raise ValueError("choose needs two different answers or more")
        if self.choose is not None and not all(c.strip() for c in self.choose):
            raise ValueError("choose has an empty answer")
        if self.choose and self.json_schema:
            raise ValueError("choose and json_schema exclude each other")
        if self.must_call and not self.tools:
            raise ValueError("must_call needs tools")
        if self.tools and (self.choose or self.json_schema):
            raise ValueError(f"tools and {'choose' if self.choose else 'json_schema'} exclude each other")
        if self.drive and (self.choose is None or self.drive.answer not in self.choose):
            raise ValueError("drive needs choose, with drive.answer among them")


class Button(Trigger, tag="button", frozen=True, kw_only=True):
    """A button."""

    pin: Pin
    """The pin."""
    press: Literal["short", "long", "double"] = "short"
    """How it is pressed. Several triggers may share a button if this differs."""
    hold: Positive = 1.0
    """A long press takes this many seconds or more."""
    gap: Positive = 0.4
    """The two presses of a double press are at most this many seconds apart."""
    bounce: Seconds = 0.05
    """Seconds in which the contact may chatter."""
    pull_up: bool = True
    """Whether the button connects the pin to ground. With false it connects it to 3.3 V."""


class Talk(Trigger, tag="talk", frozen=True, kw_only=True):
    """A button to talk: while it is held, speech is recorded, and what was understood is asked. Or wake words.

    It needs hearing. The prompt may use heard. A press or a wake word stops what is said aloud, and the answer of
    this trigger that is still being made. A press that is too short to say anything does only that.
    """

    pin: Pin | None = None
    """The button's pin. If you leave it out, the trigger has no button, and you must set wake."""
    tap: bool = False
    """Whether a short press records too, until the end of speech or another press. It needs hearing.listener."""
    wake: Annotated[list[str], msgspec.Meta(min_length=1)] | None = None
    """Words after which speech is recorded, until its end. It needs hearing.listener with spotter.

    The microphone is then always on, unless it is muted. Some words of two to four syllables are spotted best. If the
    spotter's folder has no bpe.model, write the model's own tokens, with spaces.
    """
    prompt: str = "{{ heard }}"
    """What is asked: a Jinja template with heard, sensors, now, and last (the last answer).

    If what comes out is empty, nothing is asked.
    """
    coalesce: bool = False
    """Whether a job that waits stands for what is asked meanwhile."""
    bounce: Seconds = 0.05
    """Seconds in which the contact may chatter."""
    pull_up: bool = True
    """Whether the button connects the pin to ground. With false it connects it to 3.3 V."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pin is None and self.wake is None:
            raise ValueError("a trigger of kind talk has pin, wake or both")
        if self.pin is None and self.tap:
            raise ValueError("tap needs pin")
        if self.wake is not None and not all(word.strip() for word in self.wake):
            raise ValueError("wake has an empty word")


class Motion(Trigger, tag="motion", frozen=True, kw_only=True):
    """A motion sensor (PIR)."""

    pin: Pin
    """The pin."""


class Door(Trigger, tag="door", frozen=True, kw_only=True):
    """A contact that opens or closes."""

    pin: Pin
    """The pin."""
    when: Literal["open", "close"] = "open"
    """What starts the job."""
    bounce: Seconds = 0.05
    """Seconds in which the contact may chatter."""
    pull_up: bool = True
    """Whether the contact connects the pin to ground. With false it connects it to 3.3 V."""


class Near(Trigger, tag="near", frozen=True, kw_only=True):
    """Something is near a distance sensor. The prompt may use distance, in metres."""

    sensor: Name
    """The name of a sensor of kind distance."""
    below: Positive
    """Metres. Something nearer than this starts the job."""
    every: Positive = 0.5
    """Seconds between two looks."""


class Rotary(Trigger, tag="rotary", frozen=True, kw_only=True):
    """A rotary encoder that picks from a menu, and a button that asks. The prompt may use choice."""

    a: Pin
    """The encoder's first pin."""
    b: Pin
    """The encoder's second pin."""
    button: Pin
    """The button's pin."""
    menu: Annotated[list[str], msgspec.Meta(min_length=1)]
    """The choices."""
    bounce: Seconds = 0.05
    """Seconds in which the contacts may chatter."""


class Schedule(Trigger, tag="schedule", frozen=True, kw_only=True):
    """A time. It has either every or at."""

    every: Positive | None = None
    """Seconds between two jobs."""
    at: TimeOfDay | None = None
    """A time of day in quotes, such as '07:30'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.every is None) == (self.at is None):
            raise ValueError("a schedule has either every: SECONDS or at: HH:MM")


class Manual(Trigger, tag="manual", frozen=True, kw_only=True):
    """A trigger that is started only by its name: from a console, the API or the kiosk."""


AnyTrigger = Button | Talk | Motion | Door | Near | Rotary | Schedule | Manual


# --- outputs ----------------------------------------------------------------------------------------------


class Output(Strict, tag_field="kind", frozen=True, kw_only=True):
    """What shows or says the state and the answers."""

    # kinds of devices that systemd is to allow, as DeviceAllow= names them
    needs: ClassVar[tuple[str, ...]] = ()


class Led(Output, tag="led", frozen=True, kw_only=True):
    """One LED: it blinks slowly when idle and fast while the model thinks, and is lit while it answers."""

    pin: Pin
    """The pin."""
    active_high: bool = True
    """Whether the LED lights at 3.3 V. With false it lights at 0 V."""


class RgbLed(Output, tag="rgb", frozen=True, kw_only=True):
    """An LED of three colours: yellow loads, green is idle, blue thinks, red is an error."""

    red: Pin
    """The pin of red."""
    green: Pin
    """The pin of green."""
    blue: Pin
    """The pin of blue."""
    active_high: bool = True
    """Whether the LED lights at 3.3 V. With false it lights at 0 V."""


class Buzzer(Output, tag="buzzer", frozen=True, kw_only=True):
    """A buzzer: one beep for an answer, three for an error."""

    pin: Pin
    """The pin."""


class Speech(Output, tag="speech", frozen=True, kw_only=True):
    """A program that says the answer. It gets one sentence after another on standard input."""

    needs: ClassVar[tuple[str, ...]] = ("char-alsa",)
    command: Annotated[list[str], msgspec.Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["espeak-ng", "--stdin"]
    )
    """The program and its arguments."""
    until: Literal["job", "press", "end"] = "job"
    """What stops it before all is said: job is the next answer or a press of a button, press is a press alone.

    With end nothing but muting does.
    """


class Display(Output, tag="display", frozen=True, kw_only=True):
    """A small display on I2C, through the luma.oled package."""

    needs: ClassVar[tuple[str, ...]] = ("char-i2c",)
    driver: Literal["ssd1306", "sh1106", "ssd1309"] = "ssd1306"
    """The display's chip."""
    port: Annotated[int, msgspec.Meta(ge=0, le=63)] = 1
    """The number of the I2C bus."""
    address: Annotated[int, msgspec.Meta(ge=3, le=119)] = 0x3C
    """The display's address on the bus."""


class Hook(Output, tag="hook", frozen=True, kw_only=True):
    """A program that is run at an event of a job. It gets the job as JSON on standard input."""

    event: Literal["accepted", "started", "done", "failed", "cancelled"] = "done"
    """The event."""
    command: Annotated[list[str], msgspec.Meta(min_length=1)]
    """The program and its arguments."""
    timeout: Positive = 10.0
    """Seconds after which the program is ended."""


AnyOutput = Led | RgbLed | Buzzer | Speech | Display | Hook
