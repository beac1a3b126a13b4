"""What puts the old files back if an update does not come to its end.

What is about to change is written down first, in a folder where only root writes, and struck out when the daemon has
started with it. So after a power cut it is known what to put back.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from flashd.errors import NOT_JSON, CannotWrite, DataError, InputMissing
from flashd.update.folder import Folder
from flashd.update.manifest import Sum
from flashd.update.places import Places

RECORD = "unfinished"
LONGEST = 64 << 10
"""Bytes of a record."""


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that an update changes: what it will be, and whether there was one before."""

    path: str
    nbytes: int
    sha256: Sum
    replaces: bool


@contextmanager
def alone(places: Places) -> Iterator[Folder]:
    """The folder of the record, once no other update goes on. Raises InputMissing, CannotWrite."""
    state = places.state
    try:
        folder = Folder.at(state)
    except FileNotFoundError as error:
        raise InputMissing(f"{state}: not there; updates are for a board that deploy/install was run on") from error
    except PermissionError as error:
        raise CannotWrite(f"{state}: {error.strerror}; use sudo") from error
    except OSError as error:
        raise CannotWrite(f"{state}: {error.strerror}") from error
    with folder:
        fcntl.flock(folder.fd, fcntl.LOCK_EX)
        yield folder


def write_down(state: Folder, changes: list[Change]) -> None:
    """Raises CannotWrite."""
    with state.new(RECORD) as file:
        file.write(msgspec.json.encode(changes), 0)
        file.publish()


def strike_out(state: Folder) -> None:
    state.remove(RECORD)
    state.sync()


def undo(places: Places) -> list[Path]:
    """Puts the old files back if an update did not come to its end. Returns those files, none if all did.

    Raises DataError if the record is not what an update has written; InputMissing, CannotWrite.
    """
    with alone(places) as state:
        return undo_written(state, places)


def undo_written(state: Folder, places: Places) -> list[Path]:
    """`undo`, in a folder that is held already."""
    path = state.path / RECORD
    try:
        changes = msgspec.json.decode(state.read(RECORD, LONGEST), type=list[Change])
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    except NOT_JSON as error:
        raise DataError(f"{path}: damaged ({error}); remove it if flashd runs") from error
    back = [Path(change.path) for change in reversed(changes) if _put_back(change, places)]
    strike_out(state)
    return back


def _put_back(change: Change, places: Places) -> bool:
    """Puts the old file in the place of the new one, if that is there already."""
    path = Path(change.path)
    with places.folder_of(path) as folder:
        try:
            if not folder.holds(path.name, change.nbytes, change.sha256):
                return False
            if change.replaces:
                folder.put_back(path.name)
            else:
                folder.remove(path.name)
            folder.sync()
        except OSError as error:
            raise CannotWrite(f"{path}: cannot be put back: {error.strerror}") from error
    return True
