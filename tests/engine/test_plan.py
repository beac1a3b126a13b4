"""What the system lets a process hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashd.system.memory import MIB, group_limits

LIMITS = {"": 900, "machine.slice": 400, "machine.slice/flashd.service": None, "machine.slice/other": 1, "other": 2}
"""Of a tree of control groups, in MiB; None: no limit of its own."""


@pytest.mark.parametrize(
    ("line", "folder", "name", "unlimited"),
    [
        ("0::{}", "", "memory.max", "max"),
        ("5:memory:{}", "memory", "memory.limit_in_bytes", "9223372036854771712"),
    ],
)
@pytest.mark.parametrize(
    ("group", "least"), [("/machine.slice/flashd.service", 400), ("/machine.slice", 400), ("/", 900)]
)
def test_the_limits_of_all_groups_above_bind_too(
    tmp_path: Path, line: str, folder: str, name: str, unlimited: str, group: str, least: int
) -> None:
    for path, limit in LIMITS.items():
        (tmp_path / folder / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / path / name).write_text(f"{limit * MIB if limit else unlimited}\n")
    (tmp_path / "cgroup").write_text(f"1:name=systemd:/other\n3:cpu,cpuacct:/other\n{line.format(group)}\n")
    assert min(group_limits(tmp_path / "cgroup", tmp_path)) == int(least * MIB * 0.95)


@pytest.mark.parametrize("group", ["/gone", "/../above"])
def test_a_group_that_cannot_be_seen_has_no_limit(tmp_path: Path, group: str) -> None:
    (tmp_path / "cgroup").write_text(f"0::{group}\n")
    assert group_limits(tmp_path / "cgroup", tmp_path) == []
