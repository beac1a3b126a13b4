"""The commands of updates: update takes one, sign makes one that boards trust."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashd.errors import CannotWrite, DataError, InputMissing, UsageError


def add_commands(commands: Any) -> None:
    """Adds the commands to the parser's."""
    update = commands.add_parser("update", help="a model or configuration from a folder, such as a USB stick's")
    update.add_argument("folder", type=Path, nargs="?", metavar="PATH", help="where flashd-update.yaml is")
    update.add_argument("--undo", action="store_true", help="put the old files back if the last did not end")
    update.set_defaults(run=_update)

    sign = commands.add_parser("sign", help="sign an update, so that boards take it which have your public key")
    sign.add_argument("folder", type=Path, nargs="?", metavar="PATH", help="where flashd-update.yaml is")
    sign.add_argument("--key", type=Path, metavar="FILE", help="your secret key")
    sign.add_argument("--new-key", type=Path, metavar="FILE", help="make a secret key, and FILE.pub for the boards")
    sign.set_defaults(run=_sign)


def _update(args: argparse.Namespace) -> None:
    """flashd update"""
    _needs_extra()
    from flashd.update import service
    from flashd.update.install import update
    from flashd.update.places import Places
    from flashd.update.undo import undo

    if (args.folder is None) == (not args.undo):
        raise UsageError("flashd update needs either a PATH or --undo")
    if args.undo:
        back = undo(Places())
        for path in back:
            print(f"{path}: the old one is in place again, since the last update did not come to its end")
        if back:
            service.restart_if_running()
        return
    changed = update(args.folder, Places(), service.restart)
    for path in changed:
        print(f"{path}: updated; the old one is {path.name}.old")
    if not changed:
        print(f"{args.folder}: all of it is in place already")


def _sign(args: argparse.Namespace) -> None:
    """flashd sign"""
    _needs_extra()
    if args.new_key is not None:
        if args.folder is not None or args.key is not None:
            raise UsageError("--new-key makes a key and signs nothing: leave out the rest")
        _make_key(args.new_key)
    elif args.folder is None or args.key is None:
        raise UsageError("flashd sign needs a PATH and --key FILE, or --new-key FILE to make a key first")
    else:
        _sign_folder(args.folder, args.key)


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


def _needs_extra() -> None:
    """Raises InputMissing if what updates need is not installed."""
    try:
        import cryptography  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise InputMissing(
            f"updates need the appliance extra ({error.name}): pip install 'flashd[appliance]'"
        ) from error
