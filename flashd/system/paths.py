"""Where flashd keeps what nobody configures a place for."""

from __future__ import annotations

import os
from pathlib import Path

SERVICE = Path("/var/cache/flashd")
"""The service's XDG_CACHE_HOME."""


def cache_folder() -> Path:
    """The cache folder: XDG_CACHE_HOME names it; the service's for who may write there, else the user's.

    So what `sudo flashd doctor` measured is what the service knows.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "flashd"
    return (SERVICE if os.access(SERVICE, os.W_OK) else Path.home() / ".cache") / "flashd"


def snapshot_folder() -> Path:
    """Where what prompts begin with is kept."""
    return cache_folder() / "snapshots"


def pins_record(spool: Path) -> Path:
    """The record of pins that are held: in the service's state folder, else beside the spool.

    systemd names that folder to all that a unit runs, so there it is found with a configuration that is broken.
    """
    state = os.environ.get("STATE_DIRECTORY")
    return (Path(state) if state else spool.absolute().parent) / "pins.json"
