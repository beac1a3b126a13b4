"""What a device may do: submit jobs, start triggers, ask how things stand. Devices know this and no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from flashd.config.settings import Settings
from flashd.daemon.job import Calling, Job
from flashd.daemon.jobs import Jobs


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What only the daemon knows: the model in words, the figures of the last answer, none before the first, and
    whether the board is a mock one."""

    model: dict[str, str] = {}
    last: dict[str, float] = {}
    demo: bool = False


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How things stand, for people and for JSON."""

    phase: str
    muted: bool
    waiting: int  # jobs
    running: list[int]  # numbers of jobs
    sensors: dict[str, str]  # readings in words
    temperature: float | None  # of the processor, °C
    throttled: bool | None  # None: the board does not say
    title: str
    presets: list[str]
    triggers: list[str]
    model: dict[str, str]
    last: dict[str, float]
    demo: bool  # whether there is no board, so that pages show a mock one


class Shown(msgspec.Struct, frozen=True):
    """What the appliance shows: its phase, and words that are to be read at once, which it may have none of."""

    phase: str
    notice: str = ""


class Controls(Protocol):
    """The appliance as a console, a trigger or the kiosk sees it."""

    jobs: Jobs

    @property
    def settings(self) -> Settings: ...

    @property
    def muted(self) -> bool: ...

    def mute(self, muted: bool) -> None:
        """While muted, triggers start nothing, and nothing is said aloud or recorded."""

    def start(self, name: str, **values: str | float) -> Job:
        """Starts a trigger's job. Raises KeyError, Busy, UsageError; NotStarted if it is muted or asks nothing."""

    def calling(self, names: Sequence[str], asked: str = "") -> Calling | None:
        """What the model is told of the tools of these names, or of those of the preset that `asked` is.

        None if there are none.
        """

    def status(self) -> Status:
        """How things stand; the sensors are read for it."""

    def watch_shown(self, sink: Callable[[Shown], None]) -> Callable[[], None]:
        """Tells `sink` the phase now and whenever it changes, and what was heard or is wrong with hearing, until the
        function that this returns is called.

        It is told in whatever thread that happens, and must not wait.
        """
