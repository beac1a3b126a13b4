"""Takes a model or a configuration from a folder, such as a USB stick's, all of it verified before anything changes.

Each file is copied and the copy checked: its SHA-256 first, and only then is it parsed. A stick that gives other
bytes at a second reading so gains nothing. The file in use is kept as NAME.old, and the copy takes its place. If the
daemon does not start with it, or the power goes before it has, the old one is put back.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from flashd.bundle.reader import Bundle
from flashd.config import settings, typed_yaml
from flashd.config.typed_yaml import Wrong
from flashd.errors import CannotWrite, ConfigError, DataError, FlashdError, InputMissing
from flashd.system.new_file import NewFile
from flashd.update.folder import CHUNK, Folder
from flashd.update.manifest import Manifest, Part, read_manifest
from flashd.update.places import Places
from flashd.update.undo import Change, alone, strike_out, undo_written, write_down


@dataclass(frozen=True)
class _Copy:
    """A checked copy of a file of the stick, which has no name yet, and where it will go."""

    path: Path
    folder: Folder
    file: NewFile
    change: Change


def update(stick: Path, places: Places, restart: Callable[[], None]) -> list[Path]:
    """Takes what `stick` has. Returns the files that were changed, none if all are in place already.

    One update at a time goes on. `restart` starts the daemon with what there is then, and raises FlashdError if it
    does not come up.

    Raises:
        InputMissing: no manifest, a file that it names is not there, or flashd is not installed here.
        DataError, ConfigError: something is damaged, not signed, not for this flashd or wrong; nothing was changed.
        CannotWrite: the disk is full or may not be written; nothing was changed.
        FlashdError: the daemon did not start with it; the old one is in place again.
    """
    with ExitStack() as stack:
        source = stack.enter_context(_opened(stick))
        manifest = read_manifest(source, places)
        state = stack.enter_context(alone(places))
        undo_written(state, places)
        wanted = _wanted(manifest, source, places)
        copies = [copy for part, to in wanted if (copy := _copied(part, to, source, places, stack))]
        if copies:
            write_down(state, [copy.change for copy in copies])
            _switch(copies, state, places, restart, stick)
            strike_out(state)
    return [copy.path for copy in copies]


def _opened(stick: Path) -> Folder:
    try:
        return Folder.at(stick)
    except OSError as error:
        raise InputMissing(f"{stick}: {error.strerror}; name the folder that has flashd-update.yaml") from error


def _wanted(manifest: Manifest, stick: Folder, places: Places) -> list[tuple[Part, Path]]:
    """What the manifest names and where it goes. The configuration comes last: it may only fit the new model."""
    parts, configured, names_model = [], None, places.configuration
    if manifest.configuration is not None:
        names_model = stick.path / manifest.configuration.file
        configured = _configuration(stick, manifest.configuration)
        parts = [(manifest.configuration, places.configuration)]
    if manifest.bundle is not None:
        model = (configured or settings.load(places.configuration)).model
        if not model:
            raise ConfigError(f"{names_model}: it names no model, so there is no place for a bundle")
        parts = [(manifest.bundle, Path(model)), *parts]
    return parts


def _configuration(stick: Folder, part: Part) -> settings.Settings:
    """A stick's configuration, parsed only if its SHA-256 is right. Raises InputMissing, DataError, ConfigError."""
    shown = stick.path / part.file
    with _file(stick, part.file) as file:
        data = b"".join(_parts(file, shown, settings.LONGEST + 1))
    if len(data) <= settings.LONGEST:
        _check_sum(hashlib.sha256(data).hexdigest(), part, shown)
    try:
        text = typed_yaml.text_of(data, settings.LONGEST)
    except Wrong as error:
        raise ConfigError(f"{shown}{error}") from error
    return settings.parse(text, str(shown))


def _copied(part: Part, to: Path, stick: Folder, places: Places, stack: ExitStack) -> _Copy | None:
    """A checked copy, which the stack closes; None if the file is in place already."""
    shown = stick.path / part.file
    source = stack.enter_context(_file(stick, part.file))
    nbytes = os.fstat(source.fileno()).st_size
    folder = stack.enter_context(places.folder_of(to))
    try:
        if folder.holds(to.name, nbytes, part.sha256):
            return None
        change = Change(str(to), nbytes, part.sha256, replaces=folder.has(to.name))
    except OSError as error:
        raise CannotWrite(f"{to}: {error.strerror}; an update leaves it alone") from error
    copy = stack.enter_context(folder.new(to.name))
    _copy(source, copy, nbytes, part, shown)
    if to != places.configuration:
        _verify_bundle(copy, shown)
    return _Copy(to, folder, copy, change)


def _file(stick: Folder, name: str) -> BufferedReader:
    try:
        return stick.open(name)
    except OSError as error:
        raise InputMissing(f"{stick.path / name}: {error.strerror}") from error


def _parts(file: BufferedReader, shown: Path, most: int) -> Iterator[bytes]:
    """The first `most` bytes of a file of the stick, some at a time. Raises InputMissing if the stick is pulled."""
    try:
        while most > 0 and (part := file.read(min(CHUNK, most))):
            yield part
            most -= len(part)
    except OSError as error:
        raise InputMissing(f"{shown}: {error.strerror}; is the stick still in?") from error


def _copy(source: BufferedReader, copy: NewFile, nbytes: int, part: Part, shown: Path) -> None:
    """Raises DataError if what was copied has not the SHA-256 that it should have."""
    sha, at = hashlib.sha256(), 0
    for data in _parts(source, shown, nbytes):
        sha.update(data)
        copy.write(data, at)
        at += len(data)
    _check_sum(sha.hexdigest(), part, shown)


def _check_sum(found: str, part: Part, shown: Path) -> None:
    if found != part.sha256:
        raise DataError(f"{shown}: its SHA-256 is {found}, not {part.sha256}; copy it to the stick again")


def _verify_bundle(copy: NewFile, shown: Path) -> None:
    """Raises DataError if a copy is not a whole bundle."""
    path = f"/proc/self/fd/{copy.fileno()}"
    try:
        with Bundle(path) as bundle:
            bundle.verify()
    except DataError as error:
        raise DataError(str(error).replace(path, str(shown))) from error


def _switch(copies: list[_Copy], state: Folder, places: Places, restart: Callable[[], None], stick: Path) -> None:
    """Gives the copies their names and starts the daemon; puts the old files back if it does not come up."""
    try:
        for copy in copies:
            _replace(copy)
        restart()
    except FlashdError as error:
        undo_written(state, places)
        if isinstance(error, CannotWrite):
            raise
        restart()
        raise FlashdError(f"{stick}: not taken, the old one is in place again: {error}") from error


def _replace(copy: _Copy) -> None:
    """The new file in place of the old, which stays as NAME.old."""
    try:
        if copy.change.replaces:
            copy.folder.keep(copy.path.name)
    except OSError as error:
        raise CannotWrite(f"{copy.path}.old: {error.strerror}") from error
    copy.file.publish()
