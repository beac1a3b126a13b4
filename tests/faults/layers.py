"""Two layers that bring a card's faults about: a FUSE file system, and a seam round the calls that read.

The first is the real thing (the kernel's page cache and its errors are between) and needs Linux with /dev/fuse,
libfuse and root or fusermount. The second is there wherever tests run.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from tests.faults.policy import Faults, Flip, Policy


class Layer(Protocol):
    folder: Path

    def set(self, faults: Faults) -> None: ...


class Card:
    """A bundle on a card whose faults a test decides."""

    def __init__(self, layer: Layer, bundle: Path) -> None:
        self.path = layer.folder / "model.flash"
        self._layer, self._number = layer, 0
        shutil.copy(bundle, self.path)
        layer.set(Faults())

    def pull(self, error: int = errno.EIO, after: int = 0) -> None:
        """Takes the card out, `after` so many reads."""
        self._layer.set(Faults(card=self._number, gone_after=after, error=error))

    def put_back(self) -> None:
        """Puts it in again: what was open stays dead."""
        self._number += 1
        self._layer.set(Faults(card=self._number))

    def flip(self, offset: int, times: int = 1 << 30) -> None:
        self._layer.set(Faults(card=self._number, flips=[Flip(offset, times)]))

    def wear(self, offset: int) -> None:
        """No read of that byte succeeds again."""
        self._layer.set(Faults(card=self._number, bad=offset))

    def hand_out(self, most: int) -> None:
        """Gives at most so many bytes a read."""
        self._layer.set(Faults(card=self._number, most=most))

    def slow(self, delay: float) -> None:
        self._layer.set(Faults(card=self._number, delay=delay))


class Fuse:
    """A mounted FUSE file system in a process of its own."""

    def __init__(self, root: Path) -> None:
        self.folder, self.behind, self.log = root / "mount", root / "behind", root / "log"
        self._control = root / "control"
        for folder in (self.folder, self.behind):
            folder.mkdir()
        self.set(Faults())
        arguments = [str(p) for p in (self.behind, self.folder, self._control, self.log)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fuse", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        until = time.monotonic() + 30
        while not self.folder.is_mount():
            if self._process.poll() is not None or time.monotonic() > until:
                pytest.skip("a FUSE file system cannot be mounted here")
            time.sleep(0.01)

    def set(self, faults: Faults) -> None:
        fresh = self._control.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(faults))
        fresh.rename(self._control)

    def close(self) -> None:
        unmount = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
        subprocess.run([*unmount, str(self.folder)], check=False, capture_output=True)
        self._process.wait(30)
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def fuse(root: Path) -> Iterator[Fuse]:
    """A mounted file system, or a skipped test."""
    try:
        import mfusepy  # noqa: F401 - it looks for libfuse at once
    except (ImportError, OSError) as error:
        pytest.skip(f"needs the mfusepy package and libfuse: {error}")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/fuse")
    layer = Fuse(root)
    try:
        yield layer
    finally:
        layer.close()


class Seam:
    """Stands between flashd and os.open, os.pread, os.preadv and os.dup2 for files that end in .flash."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = root / "seam"
        self.folder.mkdir()
        self.set(Faults())
        self._card: dict[int, int] = {}
        self._real = {name: getattr(os, name) for name in ("open", "pread", "preadv", "dup2")}
        for name, mine in (
            ("open", self._open),
            ("pread", self._pread),
            ("preadv", self._preadv),
            ("dup2", self._dup2),
        ):
            monkeypatch.setattr(os, name, mine)

    def set(self, faults: Faults) -> None:
        self._policy = Policy(faults)

    def _open(self, path: str | Path, flags: int, *args: int, **more: int) -> int:
        card: int | None = None
        inside = str(path).startswith(str(self.folder))
        if inside:
            card = self._policy.open()
        elif str(path).startswith("/proc/self/fd/"):
            card = self._card.get(int(Path(path).name))
        fd: int = self._real["open"](path, flags, *args, **more)
        self._card.pop(fd, None)
        if card is not None:
            self._card[fd] = card
        return fd

    def _dup2(self, fd: int, to: int, inheritable: bool = True) -> int:
        if fd in self._card:
            self._card[to] = self._card[fd]
        return int(self._real["dup2"](fd, to, inheritable))

    def _pread(self, fd: int, length: int, offset: int) -> bytes:
        return self._given(fd, length, offset)

    def _preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        data = self._given(fd, len(buffers[0]), offset)
        buffers[0][: len(data)] = data
        return len(data)

    def _given(self, fd: int, length: int, offset: int) -> bytes:
        if fd not in self._card:
            return bytes(self._real["pread"](fd, length, offset))
        # a descriptor that reads directly wants aligned memory, which bytes are not
        plain = self._real["open"](f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            data = bytes(self._real["pread"](plain, self._policy.length(length), offset))
        finally:
            os.close(plain)
        return self._policy.read(self._card[fd], offset, data)


MakeCard = Callable[[Path], Card]
