"""How much RAM this process holds and may hold, and sizes that users write, such as 512M."""

from __future__ import annotations

import os
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


def parse_size(text: str) -> int:
    """Bytes of a size such as '512M', '1.5G', '800K' or '1048576'. Raises UsageError for anything else."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        unit = units.get(text[-1:].upper())
        number = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        number = -1
    if not MIB <= number < 1 << 50:
        raise UsageError(f"{text!r} is not an amount of memory to work with; write for example 512M or 1.5G")
    return int(number)
