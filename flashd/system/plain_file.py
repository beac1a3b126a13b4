"""Opens files whose names are known, in folders where others may write: a link leads nowhere, a pipe is not waited
for."""

from __future__ import annotations

import errno
import os
import pwd
import stat
from pathlib import Path

NOT_PLAIN = "not a file but a link, a folder, a pipe or a device; remove it"


def open_plain(path: Path, flags: int = os.O_RDONLY, mode: int = 0o660) -> int:
    """A descriptor of a plain file. Raises OSError, whose `strerror` says what is in its place or whose it is."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV):
            raise OSError(errno.EINVAL, NOT_PLAIN, str(path)) from error
        if error.errno == errno.EACCES and (owner := _owner(path)):
            raise PermissionError(errno.EACCES, f"{error.strerror}; it belongs to {owner}", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, NOT_PLAIN, str(path))
    return fd


def read_plain(path: Path, most: int) -> bytes:
    """The bytes of a plain file. Raises OSError, also if it has more than `most`."""
    with os.fdopen(open_plain(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
    return data


def _owner(path: Path) -> str:
    """Whose a file is that is not ours; nothing if it is, or if there is none."""
    try:
        owner = path.lstat().st_uid
    except OSError:
        return ""
    if owner == os.geteuid():
        return ""
    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return f"user {owner}"
