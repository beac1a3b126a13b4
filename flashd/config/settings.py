"""flashd.yaml -> typed settings. An error names the key, the line and what is allowed.

Every struct refuses unknown keys. msgspec checks types and ranges; what it cannot express is in a struct's
`__post_init__`, or here if it concerns several entries.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from flashd.config import typed_yaml
from flashd.config.devices import AnyOutput, AnySensor, AnyTrigger, Button, Distance, Near
from flashd.config.fields import Absolute, Count, Loopback, Name, Pin, Seconds, Size, Strict, Temperature, TopP
from flashd.config.pins import PinUse, pins_in
from flashd.config.typed_yaml import Wrong, place_words
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
    socket: Absolute = "/run/flashd/flashd.sock"
    loopback: Loopback | None = None


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
    return [use.pin for use in pins_in(settings)]


def _check_fit(settings: Settings) -> None:
    """What one entry cannot say of itself. Raises Misfit."""
    _check_names(settings)
    distances = {s.name for s in settings.sensors if isinstance(s, Distance)}
    for i, trigger in enumerate(settings.triggers):
        at = ("triggers", i)
        if trigger.json_schema is not None and not settings.schemas:
            raise Misfit((*at, "json_schema"), "answers of a schema need `schemas: true` in the file")
        if isinstance(trigger, Near) and trigger.sensor not in distances:
            there = f"there are {', '.join(sorted(distances))}" if distances else "there are none"
            raise Misfit((*at, "sensor"), f"no distance sensor is called {trigger.sensor!r}; {there}")
    _check_pins(settings)


def _check_names(settings: Settings) -> None:
    for what in ("serial", "sensors", "triggers"):
        names: list[str] = []
        for i, entry in enumerate(getattr(settings, what)):
            if entry.name in names:
                raise Misfit((what, i, "name"), f"two entries of {what} are called {entry.name!r}")
            names.append(entry.name)


def _check_pins(settings: Settings) -> None:
    """Each pin has one user, but for a button that is pressed in several ways."""
    users: dict[int, list[PinUse]] = {}
    for use in pins_in(settings):
        others = users.setdefault(use.pin, [])
        for other in others:
            if not _same_button(use, other):
                where = place_words(other.path, settings)
                raise Misfit(use.path, f"pin {use.pin} is used twice: here and at {where}")
        others.append(use)


def _same_button(use: PinUse, other: PinUse) -> bool:
    one, two = use.owner, other.owner
    return (
        isinstance(one, Button)
        and isinstance(two, Button)
        and one.press != two.press
        and (one.pull_up, one.bounce) == (two.pull_up, two.bounce)
    )


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
        where = place_words(error.path, document.value)
        raise ConfigError(f"{name}, line {document.line(error.path)}: {where}: {error}") from error
    return settings
