"""What a power cut leaves, rebuilt from the changes that a file system was asked to make.

A card keeps what was synced. Of the rest it may have all, some or none, and of the write that the cut fell into it
may have the first half. Three ends are tried at every change: everything up to it with the last write torn; only
what was synced; and names as they were last, with only the bytes that were synced (which is what a file system that
orders its names but not its data leaves: a file of the right name, too short). After Pillai et al., "All File
Systems Are Not Created Equal", OSDI 2014.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec


class Change(msgspec.Struct, frozen=True):
    """One change: create, write, truncate, sync (of a file, or of a folder's names), rename, unlink."""

    kind: str
    path: str
    offset: int = 0
    data: bytes = b""
    to: str = ""


def read_log(path: Path) -> list[Change]:
    data, at, out = path.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        out.append(msgspec.msgpack.decode(data[at + 4 : at + 4 + size], type=Change))
        at += 4 + size
    return out


@dataclass
class _File:
    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


class _Disk:
    def __init__(self, start: dict[str, bytes]) -> None:
        self.names = {name: _File(bytearray(data), data) for name, data in start.items()}
        self.synced_names = dict(self.names)

    def apply(self, change: Change, torn: bool = False) -> None:
        file = self.names.get(change.path)
        if change.kind == "create":
            self.names[change.path] = _File()
        elif change.kind == "rename":
            self.names[change.to] = self.names.pop(change.path)
        elif change.kind == "unlink":
            del self.names[change.path]
        elif change.kind == "sync" and file is None:
            self.synced_names = dict(self.names)
        elif file is not None and change.kind == "sync":
            file.synced = bytes(file.now)
        elif file is not None and change.kind == "truncate":
            del file.now[change.offset :]
            file.now.extend(bytes(change.offset - len(file.now)))
        elif file is not None:
            data = change.data[: len(change.data) // 2] if torn else change.data
            file.now.extend(bytes(max(0, change.offset - len(file.now))))
            file.now[change.offset : change.offset + len(data)] = data


def cuts(
    start: dict[str, bytes], changes: list[Change], every: int = 1
) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """(changes that had been answered, which end, the files by path) for a cut before each change and after all."""
    disk = _Disk(start)
    for n in range(len(changes) + 1):
        if n % every == 0 or n == len(changes):
            torn = _Disk(start)
            for change in changes[:n]:
                torn.apply(change)
            if n < len(changes) and changes[n].kind == "write":
                torn.apply(changes[n], torn=True)
            yield n, "torn", {p: bytes(f.now) for p, f in torn.names.items()}
            yield n, "synced", {p: f.synced for p, f in disk.synced_names.items()}
            yield n, "names", {p: f.synced for p, f in disk.names.items()}
        if n < len(changes):
            disk.apply(changes[n])
