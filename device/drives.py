"""Pins that decisions and tools drive: on for a while, never longer than allowed, off at start, stop and error.

Those that are held are written down before they are taken: after a crash they are turned off whatever has become
of the configuration.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gpiozero
import msgspec

from flashd.config.devices import Drive
from flashd.config.settings import Settings
from flashd.config.tools import SetOutput
from flashd.daemon.job import Job, State
from flashd.errors import NOT_JSON, ConfigError, DataError, FlashdError, InputMissing
from flashd.system.child import FORKING
from flashd.system.new_file import NewFile
from flashd.system.plain_file import read_plain

log = logging.getLogger(__name__)

LONGEST = 64 << 10
"""Bytes of a record."""


class Held(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pin that is driven. Off, its safe level, is low where it is `active_high` and high where it is not."""

    pin: int
    active_high: bool


def held(settings: Settings) -> list[Held]:
    """The pins that triggers and tools drive."""
    drives = [trigger.drive for trigger in settings.triggers if trigger.drive is not None]
    outputs = [tool for tool in settings.tools if isinstance(tool, SetOutput)]
    driven: list[Drive | SetOutput] = [*drives, *outputs]
    return [Held(each.pin, each.active_high) for each in driven]


def read_record(record: Path) -> list[Held] | None:
    """The pins that a daemon took and has not let go, None where there is no record.

    Raises InputMissing where it may not be read, DataError where it is damaged.
    """
    try:
        return msgspec.json.decode(read_plain(record, LONGEST), type=list[Held])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputMissing(f"{record}: {error.strerror}") from error
    except NOT_JSON as error:
        raise DataError(f"{record}: damaged ({error}); remove it and run flashd safe again") from error


def turn_off(pins: list[Held]) -> None:
    """Turns pins off that nobody holds any more, all that can be. Raises FlashdError naming those that cannot."""
    left = []
    for each in pins:
        try:
            _open(each.pin, each.active_high).close()
        except ConfigError as error:
            left.append(str(error))
    if left:
        raise FlashdError(f"not turned off, is flashd still running? {'; '.join(left)}")


@contextmanager
def taking_pins(what: str) -> Iterator[None]:
    """What goes wrong while pins are taken is the configuration's: one that is not there, or that somebody holds."""
    try:
        with FORKING:
            yield
    except FlashdError:
        raise
    except gpiozero.BadPinFactory as error:  # an ImportError
        raise ConfigError(
            "no pins can be used here: is this a board with /dev/gpiochip0, is lgpio installed, are you in the group"
            " gpio? flashd serve --demo needs none"
        ) from error
    except ImportError as error:
        raise ConfigError(f"an output needs a package that is missing: {error.name}") from error
    except Exception as error:  # lgpio's own, of a pin that somebody holds, is no GPIOZeroError
        raise ConfigError(f"{what}: {error}") from error


@contextmanager
def letting_go() -> Iterator[None]:
    """What goes wrong while a pin is let go is logged: the others are to be let go all the same."""
    try:
        with FORKING:
            yield
    except Exception:
        log.exception("a pin was not let go")


def _open(pin: int, active_high: bool, graded: bool = False) -> gpiozero.OutputDevice:
    """Raises ConfigError where it cannot be had. `graded`: it may be on in part, by pulses."""
    with taking_pins(f"pin {pin}"):
        kind = gpiozero.PWMOutputDevice if graded else gpiozero.DigitalOutputDevice
        return kind(pin, active_high=active_high, initial_value=0)


def _write_down(pins: list[Held], record: Path) -> None:
    """Makes the record name these. Where it does, nothing is written: a full disk does not keep pins from anybody."""
    if not pins:
        record.unlink(missing_ok=True)
        return
    try:
        if read_record(record) == pins:
            return
    except FlashdError:
        log.warning("%s: cannot be read; written anew", record)
    with NewFile(record) as file:
        file.write(msgspec.json.encode(pins), 0)
        file.publish()


class Drives:
    """The output pins of triggers and of tools. They are off unless a decision or a call has just turned one on.

    `record` names them as long as pins are held, see `forget`.

    Raises ConfigError where a pin cannot be had, CannotWrite where the record cannot be made.
    """

    def __init__(self, settings: Settings, record: Path) -> None:
        self._drives: dict[str, _Drive] = {}
        self._lines: dict[str, Line] = {}
        self._record = record
        _write_down(held(settings), record)
        try:
            for trigger in settings.triggers:
                if trigger.drive is not None:
                    self._drives[f"trigger:{trigger.name}"] = _Drive(trigger.drive)
            for tool in settings.tools:
                if isinstance(tool, SetOutput):
                    self._lines[tool.name] = Line(tool.pin, tool.active_high, tool.graded)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Turns all off and lets the pins go."""
        for line in (*self._drives.values(), *self._lines.values()):
            with letting_go():
                line.close()
        self._drives.clear()
        self._lines.clear()

    def forget(self) -> None:
        """Removes the record: the pins were let go and will not be taken again."""
        self._record.unlink(missing_ok=True)

    def decided(self, job: Job) -> None:
        """A job has ended: its trigger's pin follows the answer; anything but an answer turns it off."""
        drive = self._drives.get(job.request.source)
        if drive is not None:
            drive.set(job.state is State.DONE and job.result.text == drive.settings.answer)

    def of_tool(self, name: str) -> Line:
        """The pin that a tool sets. Raises KeyError."""
        return self._lines[name]


class Line:
    """A pin that is on for so long and no longer."""

    def __init__(self, pin: int, active_high: bool, graded: bool = False) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._pin = _open(pin, active_high, graded)

    def turn(self, share: float, seconds: float) -> None:
        """Turns it on for so many seconds, in full with a share of 1, or off with 0."""
        with self._lock:
            self._stop_timer()
            if share:
                # the timer first: there is no moment in which the pin is on and nothing turns it off
                self._timer = threading.Timer(seconds, self._time_is_up)
                self._timer.daemon = True
                self._timer.start()
            self._pin.value = share

    def close(self) -> None:
        with self._lock:
            self._stop_timer()
            self._pin.off()
            self._pin.close()

    def _time_is_up(self) -> None:
        with self._lock:
            if not self._pin.closed:
                self._pin.off()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Drive(Line):
    """A trigger's pin."""

    def __init__(self, settings: Drive) -> None:
        self.settings = settings
        super().__init__(settings.pin, settings.active_high)

    def set(self, on: bool) -> None:
        self.turn(float(on), self.settings.most)
