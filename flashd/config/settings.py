"""flashd.yaml -> typed settings. An error names the key, the line and what is allowed.

Every struct refuses unknown keys. msgspec checks types and ranges; what it cannot express is in a struct's
`__post_init__`, or here if it concerns several entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from flashd.config import typed_yaml
from flashd.config.devices import AnyOutput, AnySensor, AnyTrigger, Button, Distance, Near
from flashd.config.fields import Count, Name, Pin, Seconds, Size, Strict, Temperature, TopP
from flashd.config.typed_yaml import Wrong, dotted
from flashd.errors import ConfigError, Misfit


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
    loopback_jobs: bool = False  # /api/jobs there too, for every user of the machine


class Serial(Strict, frozen=True, kw_only=True):
    name: Name
    port: str
    baud: Annotated[int, msgspec.Meta(ge=50, le=4_000_000)] = 115200
    mode: Literal["human", "machine"] = "human"
    charset: Literal["utf-8", "ascii"] = "utf-8"
    columns: Annotated[int, msgspec.Meta(ge=20, le=400)] = 80
    flow: Literal["none", "rtscts", "xonxoff"] = "none"


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
        return parse(typed_yaml.read(path, LONGEST), str(path), check)
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
        settings, document = typed_yaml.parse(text, Settings)
    except Wrong as error:
        raise ConfigError(f"{name}{error}") from error
    try:
        _check_fit(settings)
        check(settings)
    except Misfit as error:
        raise ConfigError(f"{name}, line {document.line(error.path)}: {dotted(error.path)}{error}") from error
    return settings
