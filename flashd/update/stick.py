"""flashd update: a model or a configuration from a folder, as a USB stick has it, verified before anything changes.

The folder's `flashd-update.yaml` names what it brings. Each file is copied and checked, the one in use is kept
beside it as NAME.old, and only then takes the new one its place. Where the daemon does not start with what is new,
the old one is put back. What is about to change is written down first and struck out when the daemon has started:
where the power goes or the stick is pulled in between, `undo` puts the old files back.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

import flashd
from flashd.bundle.reader import Bundle
from flashd.config import settings, typed_yaml
from flashd.config.typed_yaml import Wrong
from flashd.errors import NOT_JSON, CannotWrite, ConfigError, DataError, FlashdError, InputMissing
from flashd.system.new_file import NewFile, sync_folder

MANIFEST = "flashd-update.yaml"
MOST_MANIFEST = 64 << 10
CHUNK = 4 << 20


FileName = Annotated[
    str,
    msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z", description="the name of a file beside this one"),
]
Sum = Annotated[
    str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z", description="64 digits in quotes, as sha256sum FILE prints them")
]
Version = Annotated[
    str, msgspec.Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9}){0,9}\Z", description="a version in quotes, such as '1.0'")
]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file beside the manifest and its SHA-256."""

    file: FileName
    sha256: Sum


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an update brings. `needs`: the earliest flashd that it is for."""

    needs: Version
    bundle: Part | None = None
    configuration: Part | None = None


@dataclass(frozen=True)
class _Change:
    source: Path
    sha256: str
    to: Path


def update(folder: Path, config_path: Path, unfinished: Path, restart: Callable[[], None]) -> list[Path]:
    """Brings what `folder` has; the files that were changed, none where all is in place already.

    `unfinished` is there while an update is under way, for `undo`; in its folder one update at a time goes on.
    `restart` starts the daemon with what there is then and raises FlashdError where it does not come up.

    Raises:
        InputMissing: no manifest, a file that it names is not there, or flashd is not installed here.
        DataError, ConfigError: something is damaged, not for this flashd or wrong; nothing was changed.
        CannotWrite: the disk is full or may not be written; nothing was changed.
        FlashdError: the daemon did not start with it; the old one is in place again.
    """
    manifest = read_manifest(folder)
    with _alone(unfinished.parent):
        _undo(unfinished)
        changes = [
            c for c in _changes(manifest, folder, config_path) if not (c.to.exists() and _sha256(c.to) == c.sha256)
        ]
        for change in changes:
            _verify(change, config_path)
        if changes:
            _write_down(unfinished, changes)
            _take(changes, unfinished, restart, folder)
            _strike_out(unfinished)
    return [change.to for change in changes]


def undo(unfinished: Path) -> list[Path]:
    """Puts the old files back where an update did not come to its end; those files, none where there is no such.

    Raises DataError where `unfinished` is not what `update` has written; InputMissing, CannotWrite.
    """
    with _alone(unfinished.parent):
        return _undo(unfinished)


def read_manifest(folder: Path) -> Manifest:
    """Raises InputMissing, DataError."""
    path = folder / MANIFEST
    try:
        manifest, _ = typed_yaml.parse(typed_yaml.read(path, MOST_MANIFEST), Manifest)
    except FileNotFoundError as error:
        raise InputMissing(f"{path}: not there; README says under Updates what is in it") from error
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    except Wrong as error:
        raise DataError(f"{path}{error}") from error
    if _version(manifest.needs) > _version(flashd.__version__):
        raise DataError(f"{path}: for flashd {manifest.needs} and later; this is {flashd.__version__}")
    return manifest


def restart_service() -> None:
    """Has systemd restart flashd and waits until it is ready. Raises FlashdError where it does not start."""
    done = subprocess.run(["systemctl", "restart", "flashd.service"], check=False, capture_output=True, text=True)
    if done.returncode:
        raise FlashdError(
            f"flashd does not start: {done.stderr.strip().splitlines()[0] if done.stderr else 'systemctl'}"
        )


def restart_if_running() -> None:
    """Has systemd restart flashd where it runs; waits for nothing, since at boot we come before it."""
    subprocess.run(["systemctl", "try-restart", "--no-block", "flashd.service"], check=False)


def _changes(manifest: Manifest, folder: Path, config_path: Path) -> list[_Change]:
    changes = []
    settings_from = config_path
    if manifest.configuration is not None:
        settings_from = folder / manifest.configuration.file
        changes.append(_Change(settings_from, manifest.configuration.sha256, config_path))
    if manifest.bundle is not None:
        model = settings.load(settings_from).model
        if not model:
            raise ConfigError(f"{settings_from}: it names no model, so there is no place for a bundle")
        changes.append(_Change(folder / manifest.bundle.file, manifest.bundle.sha256, Path(model)))
    return changes[::-1]  # the configuration last: it may only fit the new model


def _verify(change: _Change, config_path: Path) -> None:
    found = _sha256(change.source)
    if found != change.sha256:
        raise DataError(f"{change.source}: its SHA-256 is {found}, not {change.sha256}; copy it to the stick again")
    if change.to == config_path:
        settings.load(change.source)
    else:
        with Bundle(change.source) as bundle:
            bundle.verify()


def _take(changes: list[_Change], unfinished: Path, restart: Callable[[], None], folder: Path) -> None:
    try:
        for change in changes:
            _replace(change)
        restart()
    except FlashdError as error:
        _undo(unfinished)
        if isinstance(error, CannotWrite):
            raise
        restart()
        raise FlashdError(f"{folder}: not taken, the old one is in place again: {error}") from error


def _replace(change: _Change) -> None:
    """The new file in place of the old, which stays as NAME.old."""
    sha = hashlib.sha256()
    with NewFile(change.to) as new:
        at = 0
        for part in _read(change.source):
            sha.update(part)
            new.write(part, at)
            at += len(part)
        if sha.hexdigest() != change.sha256:
            raise DataError(f"{change.source}: it changed while it was copied; is the stick in order?")
        if change.to.exists():
            _keep(change.to)
        new.publish()


def _read(source: Path) -> Iterator[bytes]:
    """A file in parts. Raises InputMissing where the stick is pulled meanwhile."""
    try:
        with source.open("rb") as file:
            while part := file.read(CHUNK):
                yield part
    except OSError as error:
        raise InputMissing(f"{source}: {error.strerror}; is the stick still in?") from error


def _keep(path: Path) -> None:
    """Another name for the old file: no copy, and no moment in which it has none."""
    old = _old(path)
    fresh = old.with_name(f"{old.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        os.link(path, fresh)
        fresh.rename(old)
        fresh.unlink(missing_ok=True)  # rename(2) leaves both names where they are one file's already
    except OSError as error:
        raise CannotWrite(f"{old}: {error.strerror}") from error


# --- an update that does not come to its end --------------------------------------------------------------


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other update goes on. Raises InputMissing, CannotWrite."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise InputMissing(f"{folder}: not there; updates are for a board that deploy/install was run on") from error
    except PermissionError as error:
        raise CannotWrite(f"{folder}: {error.strerror}; use sudo") from error
    except OSError as error:
        raise CannotWrite(f"{folder}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write_down(unfinished: Path, changes: list[_Change]) -> None:
    with NewFile(unfinished) as file:
        file.write(msgspec.json.encode([(str(change.to), change.sha256) for change in changes]), 0)
        file.publish()


def _undo(unfinished: Path) -> list[Path]:
    try:
        begun = msgspec.json.decode(unfinished.read_bytes(), type=list[tuple[str, str]])
    except FileNotFoundError:
        return []
    except NOT_JSON as error:
        raise DataError(f"{unfinished}: damaged ({error}); remove it if flashd runs") from error
    back = [Path(to) for to, sha256 in reversed(begun) if _put_back(Path(to), sha256)]
    _strike_out(unfinished)
    return back


def _put_back(path: Path, sha256: str) -> bool:
    """The old file where the new one is; was it?"""
    if not path.exists() or _sha256(path) != sha256:
        return False
    if _old(path).exists():
        _old(path).rename(path)
    else:
        path.unlink()  # there was none before
    sync_folder(path.parent)
    return True


def _strike_out(unfinished: Path) -> None:
    unfinished.unlink()
    sync_folder(unfinished.parent)


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])
