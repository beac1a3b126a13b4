"""A file system whose card can be pulled and whose power can be cut.

python -m tests.faults.fuse BEHIND MOUNT CONTROL LOG

It passes everything on to the folder BEHIND, with the faults that the file CONTROL asks for, and writes each change
to LOG before it answers, so that a test can rebuild what a power cut at any moment would have left (see power).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import mfusepy
import msgspec

from tests.faults.policy import Faults, Policy
from tests.faults.power import Change


class FaultyCard(mfusepy.Operations):  # type: ignore[misc]
    use_ns = True

    def __init__(self, behind: Path, control: Path, log: Path) -> None:
        self._behind, self._control = behind, control
        self._log = log.open("ab", buffering=0)
        self._policy = Policy(Faults())
        self._loaded = 0, 0
        self._card: dict[int, int] = {}

    # --- reading ------------------------------------------------------------------------------------------

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        self._faults().open()
        found = os.lstat(self._at(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_blocks", "st_ino")
        times = {f"st_{t}time": getattr(found, f"st_{t}time_ns") for t in "amc"}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *(p.name for p in self._at(path).iterdir())]

    def open(self, path: str, flags: int) -> int:
        return self._opened(os.open(self._at(path), flags & ~os.O_DIRECT))

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        policy = self._faults()
        data = os.pread(fh, policy.length(size), offset)
        return policy.read(self._card[fh], offset, data)

    def release(self, path: str, fh: int) -> int:
        self._card.pop(fh, None)
        os.close(fh)
        return 0

    # --- writing ------------------------------------------------------------------------------------------

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        self._note(Change("create", path))
        return self._opened(os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode))

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._note(Change("write", path, offset=offset, data=data))
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        self._note(Change("truncate", path, offset=length))
        os.truncate(self._at(path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._note(Change("sync", path))
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._note(Change("sync", path))
        return 0

    def rename(self, old: str, new: str) -> int:
        self._note(Change("rename", old, to=new))
        self._at(old).rename(self._at(new))
        return 0

    def unlink(self, path: str) -> int:
        self._note(Change("unlink", path))
        self._at(path).unlink()
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        self._at(path).mkdir(mode)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        self._at(path).chmod(mode)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        return 0

    # --- inside -------------------------------------------------------------------------------------------

    def _at(self, path: str) -> Path:
        return self._behind / path.lstrip("/")

    def _opened(self, fd: int) -> int:
        self._card[fd] = self._faults().open()
        return fd

    def _faults(self) -> Policy:
        found = self._control.stat()
        now = found.st_mtime_ns, found.st_ino
        if now != self._loaded:
            self._loaded = now
            self._policy = Policy(msgspec.json.decode(self._control.read_bytes(), type=Faults))
        return self._policy

    def _note(self, change: Change) -> None:
        data = msgspec.msgpack.encode(change)
        self._log.write(len(data).to_bytes(4, "little") + data)


if __name__ == "__main__":
    behind, mount, control, log = sys.argv[1:]
    mfusepy.FUSE(
        FaultyCard(Path(behind), Path(control), Path(log)), mount, foreground=True, nothreads=True,
        attr_timeout=0, entry_timeout=0, negative_timeout=0, hard_remove=True,
    )  # fmt: skip
