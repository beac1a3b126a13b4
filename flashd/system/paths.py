"""The places of files and folders that nobody configures."""

from __future__ import annotations

import errno
import os
from pathlib import Path

SERVICE = Path("/var/cache/flashd")
"""XDG_CACHE_HOME of the service."""

SNAPSHOTS = "snapshots"

SOCKET = "/run/flashd/flashd.sock"


def socket_path() -> Path:
    """The daemon's socket: FLASHD_SOCKET names it, else it is the service's."""
    return Path(os.environ.get("FLASHD_SOCKET", SOCKET))


def cache_folder() -> Path:
    """The cache folder: in XDG_CACHE_HOME if that is set; else the service's if it can be written; else the user's.

    So the service knows what `sudo flashd doctor` measured. But root does not go where a link of the service's leads.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "flashd"
    linked = any(map(os.path.islink, (SERVICE / "flashd", SERVICE / "flashd" / SNAPSHOTS)))
    return (SERVICE if os.access(SERVICE, os.W_OK) and not linked else Path.home() / ".cache") / "flashd"


def snapshot_folder() -> Path:
    """The folder of snapshots, which keep the beginnings of prompts."""
    return cache_folder() / SNAPSHOTS


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Makes a folder and those above it, if they are missing. What root makes is of the user whose folder it is in.

    So the service can use what `sudo flashd` made before it. Raises OSError.
    """
    for each in (*reversed(folder.parents), folder):
        if each.exists() and not each.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(each))
        if not each.exists():
            each.mkdir(mode if each == folder else 0o777, exist_ok=True)
            if os.geteuid() == 0:
                above = each.parent.stat()
                os.lchown(each, above.st_uid, above.st_gid)


def pins_record(spool: Path) -> Path:
    """The file that records which pins are held. It is in the service's state folder, or else beside the spool.

    systemd tells that folder to all that a unit runs, so the file is found even if the configuration is broken.
    """
    state = os.environ.get("STATE_DIRECTORY")
    return (Path(state) if state else spool.absolute().parent) / "pins.json"
