"""What a command needs beside its options: extras that are installed, and files that can be read."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from flashd.errors import DataError, InputMissing, UsageError

APPLIANCE = ("yaml", "serial", "gpiozero", "starlette", "uvicorn")


def need_pack(error: ImportError) -> InputMissing:
    """The error of a command that needs the pack extra, whose import failed with `error`."""
    return InputMissing(f"this needs the pack extra ({error.name} is missing): pip install 'flashd[pack]'")


def check_appliance() -> None:
    """Raises InputMissing or UsageError if the daemon's parts cannot be used here."""
    missing = [name for name in APPLIANCE if not importlib.util.find_spec(name)]
    if missing:
        raise InputMissing(
            f"this needs the appliance extra ({', '.join(missing)} missing): pip install 'flashd[appliance]'"
        )
    if sys.platform != "linux":
        raise UsageError("the daemon and its commands run on Linux only")


def read_text(path: Path) -> str:
    """The text of a file that an option names. Raises InputMissing, DataError."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from error
