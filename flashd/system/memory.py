"""How much RAM this process holds and may hold, and sizes that users write, such as 512M."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from flashd.errors import UsageError

MIB = 1 << 20
"""Bytes of a mebibyte."""


def resident_now() -> int:
    """Bytes of RAM that this process holds now, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The most bytes of RAM that this process ever held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def available_memory() -> int:
    """Bytes that this process may hold: 90 % of what the kernel has, or its control group's limit if that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024 + resident_now()
    return min([int(free * 0.9), *group_limits()])


def group_limits(proc: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """95 % of the limits, in bytes, of the process's control groups and their parents. Both versions are read."""
    limits = []
    for line in proc.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        group = PurePosixPath(path)
        for folder in (group, *group.parents):
            file = root / folder.relative_to("/") / name
            text = file.read_text().strip() if file.is_file() else ""
            if text.isdigit():
                limits.append(int(int(text) * 0.95))
    return limits


SIZE = r"(?i)^(?=[0-9.]*[1-9])([0-9]+(?:\.[0-9]+)?) *([KMG])(?:I?B)?\Z|^[0-9]{7,}\Z"
"""How a size is written: 512M, 512MB, 512 MB, 512MiB, 1.5G, or plain bytes. All units are powers of 1024."""

MOST = 1 << 50


def parse_size(text: str) -> int:
    """A size in words -> bytes. Raises UsageError if it is not one, or is less than 1 MiB."""
    match = re.match(SIZE, text.strip())
    size = 0
    if match:
        number, unit = match.groups()
        size = int(float(number) * (1 << {"K": 10, "M": 20, "G": 30}[unit.upper()])) if unit else int(match.group())
    if not MIB <= size < MOST:
        raise UsageError(f"{text!r} is not a size of memory that works; write for example 512M or 1.5G")
    return size
