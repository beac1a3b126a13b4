"""flashd update: a model or a configuration from a folder, as a USB stick has it, verified before anything changes.

The folder's `flashd-update.yaml` names what it brings. Each file is copied and checked, the one in use is kept
beside it as NAME.old, and only then takes the new one its place; a power cut leaves one or the other. Where the
daemon does not start with what is new, the old one is put back.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import yaml

import flashd
from flashd import config
from flashd.bundle.reader import Bundle
from flashd.errors import CannotWrite, ConfigError, DataError, FlashdError, InputMissing
from flashd.newfile import NewFile

log = logging.getLogger(__name__)

MANIFEST = "flashd-update.yaml"
MOST_MANIFEST = 64 << 10
CHUNK = 4 << 20


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file beside the manifest and its SHA-256."""

    file: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an update brings. `needs`: the earliest flashd that it is for."""

    needs: Annotated[str, msgspec.Meta(pattern=r"^\d+(\.\d+)*$")]
    bundle: Part | None = None
    configuration: Part | None = None


@dataclass(frozen=True)
class _Change:
    source: Path
    sha256: str
    to: Path

    @property
    def old(self) -> Path:
        return self.to.with_name(f"{self.to.name}.old")


def update(folder: Path, config_path: Path, restart: Callable[[], None]) -> list[Path]:
    """Brings what `folder` has; the files that were changed, none where all is in place already.

    `restart` starts the daemon with what there is then and raises FlashdError where it does not come up.

    Raises:
        InputMissing: no manifest, or a file that it names is not there.
        DataError, ConfigError: something is damaged, not for this flashd or wrong; nothing was changed.
        CannotWrite: the disk is full or may not be written; nothing was changed.
        FlashdError: the daemon did not start with it; the old one is in place again.
    """
    manifest = read_manifest(folder)
    changes = [
        c for c in _changes(manifest, folder, config_path) if not (c.to.exists() and _sha256(c.to) == c.sha256)
    ]
    for change in changes:
        _verify(change, config_path)
    done: list[_Change] = []
    try:
        for change in changes:
            done.append(change)
            _replace(change)
        if done:
            restart()
    except FlashdError as error:
        for change in reversed(done):
            _put_back(change)
        if isinstance(error, CannotWrite):
            raise
        restart()
        raise FlashdError(f"{folder}: not taken, the old one is in place again: {error}") from error
    return [change.to for change in done]


def read_manifest(folder: Path) -> Manifest:
    """Raises InputMissing, DataError."""
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            text = file.read(MOST_MANIFEST + 1)
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    if len(text) > MOST_MANIFEST:
        raise DataError(f"{path}: more than {MOST_MANIFEST} bytes")
    try:
        manifest = msgspec.convert(yaml.safe_load(text), Manifest)
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from error
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


def _changes(manifest: Manifest, folder: Path, config_path: Path) -> list[_Change]:
    changes = []
    settings_from = config_path
    if manifest.configuration is not None:
        settings_from = folder / manifest.configuration.file
        changes.append(_Change(settings_from, manifest.configuration.sha256, config_path))
    if manifest.bundle is not None:
        model = config.load(settings_from).model
        if not model:
            raise ConfigError(f"{settings_from}: it names no model, so there is no place for a bundle")
        changes.append(_Change(folder / manifest.bundle.file, manifest.bundle.sha256, Path(model)))
    return changes[::-1]  # the configuration last: it may only fit the new model


def _verify(change: _Change, config_path: Path) -> None:
    found = _sha256(change.source)
    if found != change.sha256:
        raise DataError(f"{change.source}: its SHA-256 is {found}, not {change.sha256}; copy it to the stick again")
    if change.to == config_path:
        config.load(change.source)
    else:
        with Bundle(change.source) as bundle:
            bundle.verify()


def _replace(change: _Change) -> None:
    """The new file in place of the old, which stays as NAME.old."""
    sha = hashlib.sha256()
    with NewFile(change.to) as new, change.source.open("rb") as source:
        at = 0
        while part := source.read(CHUNK):
            sha.update(part)
            new.write(part, at)
            at += len(part)
        if sha.hexdigest() != change.sha256:
            raise DataError(f"{change.source}: it changed while it was copied; is the stick in order?")
        if change.to.exists():
            _keep(change)
        new.publish()


def _keep(change: _Change) -> None:
    """Another name for the old file: no copy, and no moment in which it has none."""
    fresh = change.old.with_name(f"{change.old.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        os.link(change.to, fresh)
        fresh.rename(change.old)
        fresh.unlink(missing_ok=True)  # rename(2) leaves both names where they are one file's already
    except OSError as error:
        raise CannotWrite(f"{change.old}: {error.strerror}") from error


def _put_back(change: _Change) -> None:
    if change.old.exists():
        if _sha256(change.to) == change.sha256:
            change.old.rename(change.to)
    elif change.to.exists() and _sha256(change.to) == change.sha256:
        change.to.unlink()  # there was none before


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])
