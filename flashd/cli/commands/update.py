"""flashd update takes a model or a configuration from a USB stick; flashd sign makes a stick that boards trust."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from flashd.cli.needs import check_appliance
from flashd.cli.options import Sign, Update
from flashd.errors import CannotWrite, DataError, InputMissing


def update(options: Update) -> None:
    """Installs what a folder has, or puts the old files back."""
    check_appliance()
    from flashd.update import service
    from flashd.update.install import update
    from flashd.update.places import Places
    from flashd.update.undo import undo

    if options.folder is None:
        back = undo(Places())
        for path in back:
            print(f"{path}: the old file is back, since the last update was interrupted")
        if back:
            service.restart_if_running()
        return
    changed = update(options.folder, Places(), service.restart)
    for path in changed:
        print(f"{path}: updated; the old file is {path.name}.old")
    if not changed:
        print(f"{options.folder}: everything in it is installed already")


def sign(options: Sign) -> None:
    """Makes a key, or signs a folder with one."""
    check_appliance()
    if options.new_key is not None:
        _make_key(options.new_key)
    elif options.folder is not None and options.key is not None:
        _sign_folder(options.folder, options.key)


def _make_key(path: Path) -> None:
    from flashd.update.places import Places
    from flashd.update.signature import SecretKey

    key, public = SecretKey.new(), path.with_name(f"{path.name}.pub")
    _write(path, key.text(), 0o600, os.O_EXCL)
    _write(public, key.public_text(), 0o644, os.O_EXCL)
    print(f"{path}: your secret key {key.name}; keep it to yourself, who has it can sign updates")
    print(f"{public}: the public key; copy it into {Places().keys} of each board that is to trust you")


def _sign_folder(folder: Path, key_file: Path) -> None:
    from flashd.update.folder import Folder, sha256_of
    from flashd.update.manifest import SIGNATURE, manifest_bytes, parse_manifest
    from flashd.update.signature import read_secret_key

    key = read_secret_key(key_file)
    try:
        opened = Folder.at(folder)
    except OSError as error:
        raise InputMissing(f"{folder}: {error.strerror}") from error
    with opened as stick:
        data = manifest_bytes(stick)
        manifest = parse_manifest(stick, data)
        for part in filter(None, (manifest.bundle, manifest.configuration)):
            try:
                with stick.open(part.file) as file:
                    found = sha256_of(file)
            except OSError as error:
                raise InputMissing(f"{folder / part.file}: {error.strerror}") from error
            if found != part.sha256:
                raise DataError(
                    f"{folder / part.file}: its SHA-256 is {found}, not {part.sha256}; correct the manifest"
                )
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    _write(folder / SIGNATURE, key.sign(data, f"flashd update, signed {when}"), 0o644, os.O_TRUNC)
    print(f"{folder / SIGNATURE}: signed with the key {key.name}")


def _write(path: Path, text: str, mode: int, how: int) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, mode), "w") as file:
            file.write(text)
    except FileExistsError as error:
        raise CannotWrite(f"{path}: is there already; name another file, or remove it") from error
    except OSError as error:
        raise CannotWrite(f"{path}: {error.strerror}") from error
