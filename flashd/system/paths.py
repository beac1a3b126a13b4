"""The folders of files whose place nobody configures."""

from __future__ import annotations

import os
from pathlib import Path

SERVICE = Path("/var/cache/flashd")
"""XDG_CACHE_HOME of the service."""


def cache_folder() -> Path:
    """The cache folder: in XDG_CACHE_HOME if that is set; else the service's if it can be written; else the user's.

    So the service knows what `sudo flashd doctor` measured.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "flashd"
    return (SERVICE if os.access(SERVICE, os.W_OK) else Path.home() / ".cache") / "flashd"


def snapshot_folder() -> Path:
    """The folder of snapshots, which keep the beginnings of prompts."""
    return cache_folder() / "snapshots"


def pins_record(spool: Path) -> Path:
    """The file that records which pins are held. It is in the service's state folder, or else beside the spool.

    systemd tells that folder to all that a unit runs, so the file is found even if the configuration is broken.
    """
    state = os.environ.get("STATE_DIRECTORY")
    return (Path(state) if state else spool.absolute().parent) / "pins.json"
