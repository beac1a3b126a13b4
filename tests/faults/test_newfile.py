"""A new file is killed, torn and unplugged at each write: what is there afterwards is the old one or the new one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from flashd.bundle.reader import Bundle
from flashd.pack.pack import pack
from flashd.system.new_file import NewFile
from tests import tiny
from tests.faults.layers import fuse
from tests.faults.power import cuts, read_log

CALLS = ("pwrite", "fsync", "link", "rename", "open")


def killed_at(action: Callable[[], object], number: int) -> bool:
    """Runs `action` in a child that kills itself at its number-th call of CALLS, a write half done; did it?"""

    def run() -> None:
        left, writer = number, os.getpid()  # it may make children, which only read

        def wrapped(name: str) -> Callable[..., object]:
            real = getattr(os, name)

            def call(*args: object, **more: object) -> object:
                nonlocal left
                reads = name == "open" and args[1] & os.O_ACCMODE == os.O_RDONLY  # type: ignore[operator]
                counts = os.getpid() == writer and not reads
                left -= counts
                if left == 0 and counts:
                    if name == "pwrite":
                        real(args[0], bytes(args[1])[: len(bytes(args[1])) // 2], args[2])  # type: ignore[call-overload]
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)

            return call

        for name in CALLS:
            setattr(os, name, wrapped(name))
        action()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def write_in_parts(path: Path) -> None:
    with NewFile(path) as new:
        for i in range(4):
            new.write(bytes([65 + i]) * 3000, 3000 * i)
        new.publish()


OLD, NEW = b"old", b"".join(bytes([65 + i]) * 3000 for i in range(4))


@pytest.mark.parametrize("named", [False, True])
def test_a_kill_at_each_write_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """With files that have no name while they grow, and as on a USB stick's FAT, which knows no such files."""
    if named:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    path = tmp_path / "file"
    found = []
    for number in range(1, 100):
        path.write_bytes(OLD)
        killed = killed_at(lambda: write_in_parts(path), number)
        found.append(path.read_bytes())
        # and what a kill has left over is gone with the next try
        write_in_parts(path)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
        if not killed:
            break
    assert set(found) == {OLD, NEW} and found == sorted(found, key=[OLD, NEW].index) and len(found) >= 8


def test_a_kill_at_each_write_of_a_bundle(tmp_path: Path) -> None:
    path, source = tmp_path / "m.flash", tiny.write(tmp_path / "m.gguf", "qwen2")
    old = tiny.write(tmp_path / "old.gguf")
    pack(old, path, "int4")
    before = path.read_bytes()
    names = []
    for number in [1, 2, 5, 12, *range(26, 60)]:
        path.write_bytes(before)
        killed = killed_at(lambda: _pack(source, path), number)
        with Bundle(path) as bundle:
            bundle.verify()
            names.append(bundle.header.model.name)
        if not killed:
            break
    assert names[0] == "tiny llama" and names[-1] == "tiny qwen2" and len(names) > 8


def _pack(source: Path, path: Path) -> None:
    pack(source, path, "int4")


@pytest.mark.fuse
def test_a_power_cut_at_each_write(tmp_path: Path) -> None:
    with fuse(tmp_path) as layer:
        path = layer.folder / "file"
        (layer.behind / "file").write_bytes(OLD)
        write_in_parts(path)
        assert path.read_bytes() == NEW
        changes = read_log(layer.log)
    seen = set()
    for n, end, files in cuts({"/file": OLD}, changes):
        assert files["/file"] in (OLD, NEW), (n, end)
        seen.add(files["/file"])
    # once it was published, it is the new one whatever the card had kept back
    assert all(files["/file"] == NEW for n, _, files in cuts({"/file": OLD}, changes) if n == len(changes))
    assert seen == {OLD, NEW} and len(changes) >= 7
